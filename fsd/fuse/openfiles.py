"""FUSE requests about open files and directories, as raw messages: file data in place, listings."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from protocol import fuse
from protocol.fuse import Fopen, Opcode

from ..cache.coherent import CoherentCache
from ..files.appends import Bypass
from ..files.handle import Handle
from ..files.inode import Inode
from ..files.passthrough import Entry
from .backing import Backing, Reply
from .channelfile import READY, ChannelFile
from .handles import IdleHandle
from .hidden import HiddenHandle
from .nodes import Caching, Nodes
from .operations import Operations
from .pending import Loop, Waiting
from .record import SessionRecord
from .request import Request

LONG_POLL = 10.0
"""Seconds that a read of the channel waits if poll(2) cannot: a killed agent stays in it until it
is answered, and over virtiofs the server does not learn of the kill (docs/protocol.md)."""
LONG_POLL_WITH_POLL = 1.0
"""The same if an idle agent waits in poll(2)."""
CHANNEL_WRITE_LIMIT = 1 << 20
"""Bytes of frames in one write: the kernel sends at most that."""
LISTING_LIMIT = 1 << 17
"""Bytes of a listing in one reply, even if the guest has room for more: READDIRPLUS looks up about
800 names for it, which takes 10 ms. The kernel asks again, from the end of the reply."""
_ENTRY_SIZE = fuse.ENTRY_SIZE
_DIRENT_SIZE = fuse.DIRENT.size
_NO_ENTRY = bytes(_ENTRY_SIZE)
_DIRECT_IO, _KEEP_CACHE = int(Fopen.DIRECT_IO), int(Fopen.KEEP_CACHE)
_CACHE_DIR, _NOFLUSH = int(Fopen.CACHE_DIR), int(Fopen.NOFLUSH)


class Files:
    """Handlers of one guest."""

    def __init__(
        self,
        operations: Operations,
        nodes: Nodes,
        loop: Loop,
        waiting: Waiting,
        caching: Caching,
        *,
        notify: Callable[[bytes], None] | None,
        direct_io: bool = False,
        cache: CoherentCache | None = None,
        backing: Backing | None = None,
    ) -> None:
        self._cache = cache
        self._backing = backing
        self._operations = operations
        self._direct_io = os.O_DIRECT if direct_io else 0
        self._nodes = nodes
        self._loop = loop
        self._notify = notify
        self._handles: set[int] = set()
        self._channels: dict[int, ChannelFile] = {}
        self._waiting = waiting
        keep = _KEEP_CACHE if caching.keep_data else 0
        self.bypass = Bypass()
        self._file_flags = _DIRECT_IO if caching.direct_io else keep
        self._directory_flags = _KEEP_CACHE | _CACHE_DIR if caching.keep_listings else 0
        self.handlers: dict[int, Callable[[Request], bytes | None]] = {
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FLUSH: self._flush,
            Opcode.RELEASE: self._release,
            Opcode.FSYNC: self._fsync,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._release,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.POLL: self._poll,
            Opcode.TMPFILE: self._tmpfile,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.COPY_FILE_RANGE: self._copy_file_range,
            Opcode.COPY_FILE_RANGE_64: self._copy_file_range_64,
            Opcode.IOCTL: self._ioctl,
            Opcode.SYNCFS: self._syncfs,
        }

    def resume(self, kept: SessionRecord, inodes: Mapping[int, Inode]) -> None:
        """Take over files that were open in another process."""
        self._handles.update(self._operations.handles.resume(kept, inodes))
        for handle in self._operations.handles.files():  # in the order of opening
            self.bypass.opened(handle)

    def closing(self) -> Iterator[Callable[[], None]]:
        """Steps that close everything."""
        return (partial(self._close, fh) for fh in list(self._handles))

    def _close(self, fh: int) -> None:
        self._handles.discard(fh)
        self._channels.pop(fh, None)
        self.bypass.closed(fh)
        self._operations.files.release(fh)
        if self._backing is not None:
            self._backing.closed(fh)

    def _opened(self, request: Request, fh: int, flags: int, backing: int = 0) -> bytes:
        self._handles.add(fh)
        return fuse.OPEN_OUT.pack(fh, flags, backing)

    def _open(self, request: Request) -> bytes:
        flags, more = fuse.OPEN_IN.unpack(request.body)
        kill = bool(more & fuse.OPEN_KILL_SUIDGID)
        fh = self._operations.files.open(request.who, request.nodeid, flags, kill=kill)
        request.on_lost = lambda: self._close(fh)
        handle = self._operations.handles.handle(fh)
        if isinstance(handle, HiddenHandle) and handle.channel is not None:
            self._channels[fh] = ChannelFile(handle.channel)
        if isinstance(handle, HiddenHandle):  # its data must not be cached
            return self._opened(request, fh, _DIRECT_IO)
        if isinstance(handle, IdleHandle):
            return self._replayed(request, fh, handle.inode)
        if flags & self._direct_io:
            self._bypass_cache(fh)
        flags, backing = self._data_reply(request, handle, flags)
        if flags == _KEEP_CACHE and self._nodes.is_watched(handle.inode):
            flags = 0
        return self._opened(request, fh, flags, backing)

    def _replayed(self, request: Request, fh: int, inode: Inode) -> bytes:
        """The replayer's, which has no data and no locks that a flush would end."""
        reply = None if self._backing is None else self._backing.replayed(fh, inode)
        flags, backing = reply or Reply(_DIRECT_IO)
        return self._opened(request, fh, flags | _NOFLUSH, backing)

    def _data_reply(self, request: Request, handle: Handle, flags: int) -> Reply:
        """How a file that was opened with these flags is used from now on."""
        if self._backing is not None:
            reply = self._backing.opened(handle, flags, request.who)
            if reply is not None:
                if self._cache is not None:
                    self._cache.give_up_content(handle.inode)
                return reply
        return Reply(self._data_flags(handle, flags))

    def _data_flags(self, handle: Handle, flags: int) -> int:
        """What the guest's kernel may cache of a file that it opens with these flags."""
        if self.bypass.opened(handle):
            return _DIRECT_IO
        if self._cache is None or self._nodes.is_watched(handle.inode):
            return self._file_flags
        if flags & os.O_ACCMODE == os.O_WRONLY and not self._cache.gives_content(handle.inode):
            return 0  # an open that reads will drop what it writes: nothing to take back
        is_current = self._cache.keeps_content(handle.inode)
        if is_current is None and self.bypass.mixes:
            return _DIRECT_IO  # two changes of one tick of its mtime look alike to the kernel
        return _KEEP_CACHE if is_current else 0

    def _bypass_cache(self, fh: int) -> None:
        """O_DIRECT for an open file. Raises OSError EINVAL if its file system does not support
        it.
        """
        fd = self._operations.handles.file_fd(fh)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError:
            self._close(fh)
            raise

    def _create(self, request: Request) -> bytes:
        flags, mode, umask, more = fuse.CREATE_IN.unpack(request.body)
        name = fuse.name(request.body, fuse.CREATE_IN.size)
        self._nodes.check_room()
        who = request.who._replace(umask=umask & 0o777)
        kill = bool(more & fuse.OPEN_KILL_SUIDGID)
        entry, fh = self._operations.create(who, request.nodeid, name, mode, flags, kill=kill)
        return self._made(request, entry, name, fh, flags)

    def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _more = fuse.CREATE_IN.unpack(request.body)
        self._nodes.check_room()
        who = request.who._replace(umask=umask & 0o777)
        entry, fh = self._operations.tmpfile(who, request.nodeid, mode, flags)
        return self._made(request, entry, b"", fh, flags)

    def _made(self, request: Request, entry: Entry, name: bytes, fh: int, flags: int) -> bytes:
        forget = self._nodes.hold(entry.inode)
        if flags & self._direct_io:
            try:
                self._bypass_cache(fh)
            except OSError:
                forget()
                raise

        def undo() -> None:
            self._close(fh)
            forget()

        request.on_lost = undo
        reply = self._nodes.entry(request.who, entry, request.nodeid, name)
        handle = self._operations.handles.handle(fh)
        if isinstance(handle, IdleHandle):
            return reply + self._replayed(request, fh, handle.inode)
        handle = self._operations.handles.with_data(handle)
        return reply + self._opened(request, fh, *self._data_reply(request, handle, flags))

    def _read(self, request: Request) -> bytes | None:
        fh, offset, size, *_ = fuse.READ_IN.unpack(request.body)
        channel = self._channels.get(fh)
        if channel is not None:
            self._read_channel(request, channel, min(size, request.room))
            return None
        handle = self._operations.handles.handle(fh)
        if isinstance(handle, HiddenHandle):
            return handle.text[offset : offset + min(size, request.room)]
        views = request.data_out(size)
        request.reply_in_place(self._operations.files.read_into(fh, views, offset) if views else 0)
        return None

    def _write(self, request: Request) -> bytes | None:
        write = fuse.WRITE_IN.unpack(request.body)
        fh, offset, size, flags, *_ = write
        views = request.data_in(size)
        channel = self._channels.get(fh)
        if channel is not None:
            if size > CHANNEL_WRITE_LIMIT:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._write_channel(request, channel, b"".join(views))
            return None
        kill = bool(flags & fuse.WRITE_KILL_SUIDGID)
        written = self._operations.files.write_from(
            request.who, fh, views, offset, kill=kill, append=write.appends
        )
        if self._cache is not None:
            self._cache.catch_up()
        return fuse.WRITE_OUT.pack(written)

    def _flush(self, request: Request) -> bytes:
        fh, owner = fuse.FLUSH_IN.unpack(request.body)
        self._operations.files.flush(fh, owner)
        return b""

    def _release(self, request: Request) -> bytes:
        fh, _flags, release_flags, _owner = fuse.RELEASE_IN.unpack(request.body)
        if release_flags & fuse.RELEASE_FLOCK_UNLOCK:
            self._operations.files.unlock(fh)
        self._close(fh)
        return b""

    def _fallocate(self, request: Request) -> bytes:
        fh, offset, length, mode = fuse.FALLOCATE_IN.unpack(request.body)
        self._operations.files.fallocate(request.who, fh, mode, offset, length)
        return b""

    def _lseek(self, request: Request) -> bytes:
        fh, offset, whence = fuse.LSEEK_IN.unpack(request.body)
        return fuse.LSEEK_OUT.pack(self._operations.files.lseek(fh, offset, whence))

    def _copy_file_range(self, request: Request) -> bytes:
        return fuse.WRITE_OUT.pack(self._copied(request))

    def _copy_file_range_64(self, request: Request) -> bytes:
        return fuse.COPY_FILE_RANGE_OUT.pack(self._copied(request))

    def _copied(self, request: Request) -> int:
        fh, offset, nodeid_out, fh_out, offset_out, size, flags = fuse.COPY_FILE_RANGE_IN.unpack(
            request.body
        )
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._nodes.check(nodeid_out)
        return self._operations.files.copy_file_range(
            request.who, fh, offset, fh_out, offset_out, size
        )

    def _ioctl(self, request: Request) -> bytes:
        fh, flags, command, _arg, in_size, out_size = fuse.IOCTL_IN.unpack(request.body)
        if flags & (fuse.IOCTL_UNRESTRICTED | fuse.IOCTL_COMPAT):
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        start = fuse.IOCTL_IN.size
        data = request.body[start : start + in_size]
        result = self._operations.files.ioctl(request.who, fh, command, data)[:out_size]
        return fuse.IOCTL_OUT.pack(0, 0, 0, 0) + result

    def _syncfs(self, request: Request) -> bytes:
        self._operations.files.syncfs()
        return b""

    def _fsync(self, request: Request) -> bytes:
        fh, flags = fuse.FSYNC_IN.unpack(request.body)
        self._operations.files.fsync(fh, data_only=bool(flags & fuse.FSYNC_FDATASYNC))
        return b""

    # Requests that wait

    def _read_channel(self, request: Request, channel: ChannelFile, size: int) -> None:
        """The long poll: frames, or nothing when its time is over."""
        if channel.is_ready:
            request.reply(channel.read(size))
            return
        self._waiting.check(request)

        def answer() -> None:
            self._waiting.finish(request, lambda: channel.read(size))

        # Not at once: a wake comes from the midst of the core's work.
        unwait = channel.wait(lambda: self._loop.soon(answer))
        bound = LONG_POLL if self._notify is None else LONG_POLL_WITH_POLL
        cancel = self._loop.later(bound, answer)

        def stop() -> None:
            unwait()
            cancel()

        self._waiting.add(request, stop)

    def _write_channel(self, request: Request, channel: ChannelFile, data: bytes) -> None:
        """Answered at once, unless too much of the earlier writes is still to be handled."""
        self._waiting.check(request)
        channel.write(data)
        reply = fuse.WRITE_OUT.pack(len(data))
        if not channel.is_full:
            request.reply(reply)
            return

        def answer() -> None:
            self._waiting.finish(request, lambda: reply)

        self._waiting.add(request, _nothing, interruptible=False)
        channel.when_taken(lambda: self._loop.soon(answer))

    def _poll(self, request: Request) -> bytes:
        fh, kernel_handle, flags, _events = fuse.POLL_IN.unpack(request.body)
        channel = self._channels.get(fh)
        if channel is None:
            self._operations.handles.handle(fh)
            return fuse.POLL_OUT.pack(READY)
        notify = self._notify
        if notify is None:  # always readable: the read waits
            return fuse.POLL_OUT.pack(channel.poll(None) | READY)
        if not flags & fuse.POLL_SCHEDULE_NOTIFY:
            return fuse.POLL_OUT.pack(channel.poll(None))
        size = fuse.OUT_HEADER.size + fuse.NOTIFY_POLL_OUT.size
        message = fuse.OUT_HEADER.pack(size, fuse.NOTIFY_POLL, 0)
        message += fuse.NOTIFY_POLL_OUT.pack(kernel_handle)
        return fuse.POLL_OUT.pack(channel.poll(lambda: notify(message)))

    # Directories

    def _opendir(self, request: Request) -> bytes:
        self._nodes.looks_into(request.who, request.nodeid)
        fh = self._operations.files.opendir(request.who, request.nodeid)
        request.on_lost = lambda: self._close(fh)
        flags = self._directory_flags
        handle = self._operations.handles.handle(fh)
        if not isinstance(handle, Handle) or self._nodes.is_watched_node(handle.inode.nodeid):
            flags = 0
        elif self._cache is not None:
            is_current = self._cache.keeps_content(handle.inode)
            if is_current is not None:
                flags = _CACHE_DIR | (_KEEP_CACHE if is_current else 0)
        return self._opened(request, fh, flags)

    def _readdir(self, request: Request) -> bytes:
        fh, offset, size, *_ = fuse.READ_IN.unpack(request.body)
        size = min(size, request.room, LISTING_LIMIT)
        node, entries = self._operations.files.names(fh, offset, size * 3 // 4)
        number = self._nodes.numbering(node)
        reply = bytearray()
        for name, ino, kind, following in entries:
            if name == b".":
                ino = self._nodes.ino(node)
            elif name == b"..":
                ino = self._nodes.ino(node.parent or node)
            elif number is not None:
                ino = number(name, ino)
            record = fuse.dirent(ino, following, kind, name)
            if len(reply) + len(record) > size:
                break  # read again by the next request
            reply += record
        return bytes(reply)

    def _readdirplus(self, request: Request) -> bytes:
        fh, offset, size, *_ = fuse.READ_IN.unpack(request.body)
        size = min(size, request.room, LISTING_LIMIT)
        node, entries = self._operations.files.names(fh, offset, size * 3 // 16)
        number = self._nodes.numbering(node)
        reply = bytearray()
        undo: list[Callable[[], None]] = []
        request.on_lost = lambda: [forget() for forget in undo].clear()
        for name, ino, kind, following in entries:
            if len(reply) + _ENTRY_SIZE + _DIRENT_SIZE + len(name) + 7 & ~7 > size:
                break
            plus = _NO_ENTRY
            if name in (b".", b".."):
                above = node if name == b"." else node.parent or node
                ino = self._nodes.ino(above)
            else:
                is_full = self._nodes.is_full
                entry = None if is_full else self._operations.files.entry(fh, name)
                if entry is not None:  # else only the name: the kernel asks if it needs more
                    entry.inode.lookups += 1
                    undo.append(self._nodes.hold(entry.inode))
                    plus = self._nodes.entry(request.who, entry, node.nodeid, name)
                    ino, kind = self._nodes.ino(entry.inode), entry.attr.st_mode >> 12
                elif number is not None:
                    ino = number(name, ino)
            reply += plus + fuse.dirent(ino, following, kind, name)
        return bytes(reply)


def _nothing() -> None:
    """A thread continues to its end."""
