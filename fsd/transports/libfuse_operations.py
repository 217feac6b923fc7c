"""The operations that pyfuse3 calls: a thin adapter on those of fsd.fuse, for the libfuse
transport.

It is the boundary for errors: an OSError becomes its errno, anything else EIO and one logged
traceback. pyfuse3 would unmount on any exception other than FUSEError. It is long because pyfuse3
wants one method for each operation.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import stat
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar, cast

import pyfuse3
import structlog
import trio

from protocol.frames import FSD_DIR

from ..files.appends import Bypass, Ends
from ..files.attributes import StatLike
from ..files.caller import Caller
from ..files.changes import Changes
from ..files.handle import Handle
from ..files.inode import Inode
from ..files.passthrough import Entry
from ..files.slowcalls import THREADS, Later, Outcome, Outcomes, SlowCall
from ..fuse.access import Events
from ..fuse.channelfile import READY, ChannelFile
from ..fuse.hidden import HiddenHandle
from ..fuse.nodes import REPLAYER_TIMEOUT_NS, WATCHED_TIMEOUT
from ..fuse.operations import Operations
from ..guests.history import PATIENCE as ORDERS_PATIENCE
from ..guests.history import Undelivered, Wait

log = structlog.get_logger()
_LISTING = 1024
"""Bytes of a directory that are read at a time: as much as fits a reply of 4 KiB."""
_F = TypeVar("_F", bound=Callable[..., Awaitable[Any]])

_DOTS = (b".", b"..")
LONG_POLL = 1.0
"""Seconds that a read of the channel waits. Short, because a killed agent stays in the read until
it is answered; an idle agent waits in poll(2) instead, without a limit."""
PATIENCE = 1.0
"""Seconds to wait for a file system below the share that does not answer. Short, because the kernel
makes all look-ups in one directory wait for the first: libfuse does not agree on
PARALLEL_DIROPS."""

WALKS_LIMIT = 256
"""Processes whose last look-up is remembered, each a few bytes: for STATFS, which comes next."""


def _guarded(handler: _F) -> _F:
    @functools.wraps(handler)
    async def guarded(adapter: LibfuseOperations, *args: Any) -> Any:
        outcomes: Outcomes = {}
        try:
            while True:
                try:
                    adapter._set_outcomes(outcomes)
                    return await handler(adapter, *args)
                except Later as later:
                    adapter._set_outcomes({})
                    outcomes[later.call.what] = await adapter._make(later.call)
                except Undelivered as undelivered:
                    adapter._set_outcomes({})
                    await _over(undelivered.wait)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except (pyfuse3.FUSEError, trio.Cancelled):
            raise
        except Exception:
            log.exception("request failed", request=handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            if outcomes:
                adapter._set_outcomes({})
                for outcome in outcomes.values():
                    outcome.drop()

    return cast(_F, guarded)


def _second_ino() -> int:
    """Offset of st_ino in EntryAttributes, which stores it separately from the nodeid, and sets
    both as one. -1 if its layout is different.
    """
    entry, number = pyfuse3.EntryAttributes(), 0x1D1F_3A5C_7B9E
    entry.st_ino = number
    parts = ctypes.string_at(id(entry), type(entry).__basicsize__).split(struct.pack("Q", number))
    return len(parts[0]) + 8 + len(parts[1]) if len(parts) == 3 else -1


_SECOND_INO = _second_ino()


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)


def _attributes(inode: Inode, attr: StatLike) -> pyfuse3.EntryAttributes:
    """The reply. Timeouts are 0: the host may change anything at any time, and the replayer's
    look-ups must reach the server.
    """
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode.nodeid
    if inode.number != inode.nodeid and _SECOND_INO >= 0:
        ctypes.c_uint64.from_address(id(entry) + _SECOND_INO).value = inode.number
    entry.generation = inode.generation
    entry.entry_timeout = entry.attr_timeout = 0
    entry.st_mode = attr.st_mode
    entry.st_nlink = attr.st_nlink
    entry.st_uid = attr.st_uid
    entry.st_gid = attr.st_gid
    entry.st_rdev = attr.st_rdev
    entry.st_size = attr.st_size
    entry.st_blksize = attr.st_blksize
    entry.st_blocks = attr.st_blocks
    entry.st_atime_ns = attr.st_atime_ns
    entry.st_mtime_ns = attr.st_mtime_ns
    entry.st_ctime_ns = attr.st_ctime_ns
    return entry


def _name_alone(ino: int) -> pyfuse3.EntryAttributes:
    """READDIRPLUS entry for a name that cannot be looked at: without a type, which the kernel
    refuses (fuse_direntplus_link in fs/fuse/readdir.c) after it has passed the name on. It then
    forgets the nodeid, which libfuse also shows as the inode number: one that no node has, and not
    0.
    """
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino | FSD_DIR
    entry.st_mode = 0
    entry.entry_timeout = entry.attr_timeout = 0
    return entry


async def _over(wait: Wait) -> None:
    """Return once the changes before a request are delivered, or the wait is too long."""
    event = trio.Event()
    wait.begin(event.set)
    seconds = ORDERS_PATIENCE
    try:
        while seconds:
            with trio.move_on_after(seconds):
                await event.wait()
                return
            seconds = wait.left()
    finally:
        wait.end()


async def _read(channel: ChannelFile, size: int) -> bytes:
    """Frames, after waiting for some; b"" at the time limit."""
    if not channel.is_ready:
        event = trio.Event()
        cancel = channel.wait(event.set)
        with trio.move_on_after(LONG_POLL):
            await event.wait()
        cancel()
    return channel.read(size)


class LibfuseOperations(pyfuse3.Operations):
    """One mount's requests. ``is_judged``: the kernel checks permissions; not needed if the server
    works for its own user only.
    """

    supports_dot_lookup = True
    # No flush: at the first ENOSYS the kernel stops asking, a round trip less at each close.

    def __init__(self, operations: Operations, *, is_judged: bool = True) -> None:
        super().__init__()
        self.enable_acl = is_judged  # makes the kernel judge permissions, ACLs included
        operations.acls = True  # else the host checks, for the one user of the mount
        self._operations = operations
        self._channels: dict[int, ChannelFile] = {}
        self._walked: dict[int, int] = {}  # by process: what its last LOOKUP found
        self._limiters: dict[int, trio.CapacityLimiter] = {}  # by the mount that is waited for
        self._ends, self._bypass = Ends(), Bypass()
        operations.slow.use_threads(self._close_slowly, PATIENCE)

    def _set_outcomes(self, outcomes: Outcomes) -> None:
        """Set what threads have done for the request that a handler begins with now."""
        self._operations.slow.outcomes = outcomes

    async def _make(self, call: SlowCall) -> Outcome:
        """Make a call in a thread. Raises OSError EIO if it takes longer than its patience."""
        outcome, watcher = Outcome(call), self._operations.export.watcher
        limiter = self._limiters.setdefault(call.mount, trio.CapacityLimiter(THREADS))
        end = watcher.expect(self._operations.guest, call.expected)
        try:
            with trio.fail_after(math.inf if call.patience is None else call.patience):
                await trio.to_thread.run_sync(outcome, abandon_on_cancel=True, limiter=limiter)
        except trio.TooSlowError:
            outcome.drop()
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        except BaseException:
            outcome.drop()
            raise
        finally:
            end()
        return outcome

    def _close_slowly(self, fd: int, expected: Events) -> None:
        """In a separate thread, as no request waits for it."""
        token = trio.lowlevel.current_trio_token()
        end = self._operations.export.watcher.expect(self._operations.guest, expected)

        def close() -> None:
            os.close(fd)
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(end)

        Thread(target=close, daemon=True).start()

    def _reach(self, nodeid: int, name: bytes | None = None, fh: int = 0) -> None:
        """Wait for a file system below the share that may not answer."""
        body = struct.pack("<Q", fh) if name is None else name
        self._operations.files.reach(nodeid, body, is_name=name is not None)

    @staticmethod
    def invalidate(inode: Inode) -> None:
        """Make the kernel ask for an inode's attributes again."""
        with suppress(OSError):  # the kernel has forgotten it
            pyfuse3.invalidate_inode(inode.nodeid, attr_only=True)

    @_guarded
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._reach(parent_inode, name)
        entry = self._operations.lookup(_caller(ctx), parent_inode, name)
        self._walked[ctx.pid] = entry.inode.nodeid
        if len(self._walked) > WALKS_LIMIT:
            del self._walked[next(iter(self._walked))]
        if parent_inode >= FSD_DIR:  # a directory that is moved there: users may look at it next
            return self._entry(entry)
        return self._lasting(*entry, self._entry(entry), ctx)

    @_guarded
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for nodeid, count in inode_list:
            self._operations.forget(nodeid, count)

    @_guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        self._walked.pop(ctx.pid, None)
        self._reach(inode)
        node, attr = self._operations.getattr(_caller(ctx), inode)
        return self._lasting(node, attr, self._own_ino(node, attr), ctx)

    def _lasting(
        self,
        inode: Inode,
        attr: StatLike,
        entry: pyfuse3.EntryAttributes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """For the replayer a directory's attributes are valid longer, else its kernel asks for them
        at every step (docs/decisions/timeouts.md).
        """
        if inode.is_dir and self._operations.access.is_replayer(_caller(ctx)):
            if self._operations.guest.history.is_sought(inode):
                return entry
            covers = self._operations.export.watcher.covers_attributes(inode)
            inode.attr_given = attr if covers else None
            entry.attr_timeout = WATCHED_TIMEOUT if covers else REPLAYER_TIMEOUT_NS / 1e9
        return entry

    def _entry(self, entry: Entry) -> pyfuse3.EntryAttributes:
        return self._attributes(entry.inode, entry.attr)

    def _attributes(self, inode: Inode, attr: StatLike) -> pyfuse3.EntryAttributes:
        if inode.kind == stat.S_IFREG:
            self._ends.size_reported(inode.nodeid, attr.st_size)
        return _attributes(inode, attr)

    def _own_ino(self, inode: Inode, attr: StatLike) -> pyfuse3.EntryAttributes:
        """GETATTR's reply carries no nodeid."""
        entry = self._attributes(inode, attr)
        entry.st_ino = inode.number
        return entry

    @_guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._reach(inode)
        changes = Changes(
            attr.st_mode if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            attr.st_size if fields.update_size else None,
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._own_ino(*self._operations.setattr(_caller(ctx), inode, changes, fh))

    @_guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        self._reach(inode)
        return self._operations.readlink(inode)

    @_guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._operations.mknod(_caller(ctx), parent_inode, name, mode, rdev))

    @_guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._operations.mkdir(_caller(ctx), parent_inode, name, mode))

    @_guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._operations.symlink(_caller(ctx), parent_inode, name, target))

    @_guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._operations.link(_caller(ctx), inode, new_parent_inode, new_name))

    @_guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._operations.unlink(_caller(ctx), parent_inode, name)

    @_guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._operations.rmdir(_caller(ctx), parent_inode, name)

    @_guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._operations.rename(
            _caller(ctx), parent_inode_old, name_old, parent_inode_new, name_new, flags
        )

    @_guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        self._walked.pop(ctx.pid, None)
        self._reach(inode)
        fh = self._operations.files.open(_caller(ctx), inode, flags)
        if flags & os.O_TRUNC:
            self._ends.size_reported(inode, 0)
        handle = self._operations.handles.handle(fh)
        bare = not isinstance(handle, Handle) or self._bypass.opened(handle)
        if isinstance(handle, HiddenHandle) and handle.channel is not None:
            self._channels[fh] = ChannelFile(handle.channel)
        return pyfuse3.FileInfo(fh=fh, direct_io=bare, keep_cache=False, nonseekable=False)

    @_guarded
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        self._reach(parent_inode, name)
        entry, fh = self._operations.create(_caller(ctx), parent_inode, name, mode, flags)
        handle = self._operations.handles.handle(fh)
        direct_io = not isinstance(handle, Handle) or self._bypass.opened(handle)
        return pyfuse3.FileInfo(fh=fh, direct_io=direct_io, keep_cache=False), self._entry(entry)

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        channel = self._channels.get(fh)
        if channel is not None:
            return await _read(channel, size)
        handle = self._operations.handles.handle(fh)
        if isinstance(handle, HiddenHandle):
            return handle.text[off : off + size]
        return self._operations.files.read(fh, off, size)

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        channel = self._channels.get(fh)
        if channel is None:
            return self._write(fh, off, buf)
        channel.write(buf)
        if channel.is_full:
            taken = trio.Event()
            channel.when_taken(taken.set)
            await taken.wait()
        return len(buf)

    def _write(self, fh: int, offset: int, data: bytes) -> int:
        handle = self._operations.handles.handle(fh)
        if not isinstance(handle, Handle):
            return self._operations.files.write(fh, offset, data)
        append = bool(handle.flags & os.O_APPEND)
        append = append and self._ends.is_append(handle, offset, len(data))
        kill = self._bypass.bypasses(fh)  # else the kernel has cleared suid bits itself
        size = self._operations.files.write(fh, offset, data, append=append, kill=kill)
        self._ends.written(handle.inode.nodeid, offset, size)
        return size

    @_guarded
    async def poll(
        self,
        inode: int,
        fh: int,
        poll_handle: pyfuse3.PollHandle | None,
        ctx: pyfuse3.RequestContext,
    ) -> int:
        channel = self._channels.get(fh)
        if channel is None:
            return READY
        return channel.poll(None if poll_handle is None else poll_handle.notify)

    @_guarded
    async def release(self, fh: int) -> None:
        self._channels.pop(fh, None)
        self._bypass.closed(fh)
        self._operations.files.release(fh)

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        self._operations.files.fsync(fh, data_only=datasync)

    @_guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        self._walked.pop(ctx.pid, None)
        self._reach(inode)
        return self._operations.files.opendir(_caller(ctx), inode)

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        position = start_id
        while True:  # until the reply is full: an empty one would be the end
            _, entries = self._operations.files.names(fh, position, _LISTING)
            for name, ino, _type, position in entries:
                entry = self._operations.files.entry(fh, name)
                attr = _name_alone(ino) if entry is None else self._entry(entry)
                if not pyfuse3.readdir_reply(token, name, attr, position):
                    return
                if entry is not None and name not in _DOTS:  # no reference for these
                    entry.inode.lookups += 1
            if not entries:
                return

    @_guarded
    async def releasedir(self, fh: int) -> None:
        self._operations.files.release(fh)

    @_guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._operations.files.fsync(fh, data_only=datasync)

    @_guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        # pyfuse3 does not pass on the node: it is what the process looked up just before, if it
        # did.
        host = self._operations.statfs(self._walked.pop(ctx.pid, pyfuse3.ROOT_INODE))
        data = pyfuse3.StatvfsData()
        for field in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(data, field, getattr(host, field))
        return data

    @_guarded
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._operations.setxattr(_caller(ctx), inode, name, value, 0)

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._reach(inode)
        return self._operations.getxattr(_caller(ctx), inode, name)

    @_guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        self._reach(inode)
        return self._operations.listxattr(inode)

    @_guarded
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._operations.removexattr(_caller(ctx), inode, name)

    @_guarded
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        self._reach(inode)
        return self._operations.may_access(inode, mode)
