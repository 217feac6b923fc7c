"""Open files and their data, as one mount has them: passthrough, own echo, replay.

The half of the operations below its names and attributes: who asks, and what is done with a handle.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog

from protocol.frames import CONTROL, FSD_DIR
from protocol.masks import Mask

from ..events.watcher import Expected
from ..export.export import Export
from ..files import appends, fileflags
from ..files.caller import Caller
from ..files.handle import Handle
from ..files.inode import Inode
from ..files.locks import Lock
from ..files.passthrough import Entry
from ..files.slowcalls import LONG, PATIENCE, Later, Outcomes, SlowCall, Work
from ..guests.ledger import UnexpectedCall
from ..guests.mount import MountGuest
from ..linux import credentials, ioctls, syscalls
from ..linux.directories import DirEntry
from . import record
from .hidden import HiddenFiles, HiddenHandle
from .hostlocks import GuestLocks
from .record import Opened, SessionRecord

log = structlog.get_logger()
_T = TypeVar("_T")
_REOPENING = (
    os.O_ACCMODE | os.O_APPEND | os.O_DSYNC | os.O_SYNC | os.O_NOATIME | os.O_NONBLOCK
)  # fmt: skip
"""Flags with which a file is opened once more."""
_EVENTS = 256
"""Events of the host that are looked at for a file that is not where it was."""
COPY_LIMIT = 1 << 24
"""Bytes of one COPY_FILE_RANGE: callers ask again."""
REPLAYED_LIMIT = 1 << 16
"""Files that the agent may have open for programs of the host, some 200 bytes each. They have no
descriptor here, and what others hold open must not take one from the guest's programs. The agent of
fsd-guest keeps a quarter of them at most."""
Events = tuple[Expected, ...]
Acting = Callable[[], AbstractContextManager[None]]
_OPEN_TRUNC = Mask.OPEN | Mask.MODIFY
_WRITTEN = Mask.MODIFY | Mask.ATTRIB  # ATTRIB where suid bits go


@dataclass(slots=True, eq=False)
class IdleHandle:
    """A handle that does nothing: what the replayer opened, or a directory that is removed."""

    inode: Inode


@dataclass(slots=True, eq=False)
class LostHandle:
    """One that an earlier process of the server had, and this one cannot have: what is asked of it
    fails with ``errno``.
    """

    errno: int
    is_agents: bool = False


AnyHandle = Handle | IdleHandle | HiddenHandle


class FileService:
    """Operations on open files of one mount. ``guest`` is the mount."""

    def __init__(self, export: Export, guest: MountGuest) -> None:
        self.export = export
        self.guest = guest
        self._fs = export.fs
        self._table = export.table
        self.hidden = HiddenFiles(export, guest)
        self.kept: SessionRecord | None = None
        self.acls = False
        """Whether POSIX ACLs may be used (fsd.files.xattrs): the transport knows."""
        self.outcomes: Outcomes = {}
        """Of the request that is being served, what threads have done for it."""
        self.patience = PATIENCE
        """Seconds that a request waits for a file system that does not answer."""
        self.has_threads = False
        """Whether a request that raised Later is served again; else all is done at once."""
        self.close_slowly: Callable[[int, Events], None] = _close
        """Closes a descriptor where that may free a long file, and makes events."""
        self._handles: dict[int, AnyHandle | LostHandle] = {}
        self._replayed: set[int] = set()  # of them, what the agent has open
        self._numbers = itertools.count(1)
        self.locks = GuestLocks(export.watcher, export.lock_waiters, self.has_room)
        self.pinned = 0
        """Directories that a descriptor is kept of, as the guest's kernel holds them."""

    def close(self) -> None:
        """Release every lock and every handle."""
        self.keep_no_longer()
        self.locks.close()
        for fh in list(self._handles):
            self.release(fh)
        self._fs.successors.close()

    # What may take long

    def slowly(
        self, what: str, work: Callable[..., Any], *fds: int, expected: Events = (), **more: Any
    ) -> Any:
        """The result of work with descriptors that a thread has done for this request. Raises
        Later where it is still to be done, and what the work raised. ``more``: fields of SlowCall.
        """
        if not self.has_threads:
            return work(*fds)
        outcome = self.outcomes.get(what)
        if outcome is None:
            raise Later(SlowCall(what, Work(work, *fds), expected, **more))
        return outcome.take()

    def reach(self, nodeid: int, body: bytes, *, is_name: bool) -> None:
        """Before a request, where a file system below the share may not answer: those that the
        request is about do. ``is_name``: its body is a name. Raises Later, OSError ELOOP.
        """
        mounts = self._table.mounts
        if not mounts.remote:
            return
        for mount in self._mounts_of(nodeid, body, is_name=is_name) & mounts.remote.keys():
            mounts.check(mount, self.patience)
            what = f"look at {mounts.remote[mount]}"
            path = mounts.path_of(mount)
            ask = partial(mounts.ask, mount, path)
            self.slowly(what, ask, self._table.reach.root_fd, mount=mount, patience=self.patience)

    def _mounts_of(self, nodeid: int, body: bytes, *, is_name: bool) -> set[int]:
        """On which mounts is what a request is about: also what it might name by number."""
        numbers = [nodeid]
        if not is_name:
            size = min(len(body), 32) & ~7  # all that requests have of handles and nodes
            numbers += [number for (number,) in struct.iter_unpack("<Q", body[:size])]
        inodes = [self._table.known(number) for number in numbers]
        for number in numbers[1:]:
            handle = self._handles.get(number)
            inodes.append(getattr(handle, "inode", None))
        found = {inode.identity.mount for inode in inodes if inode is not None}
        if is_name and inodes[0] is not None:
            found.add(self._point(inodes[0], body.partition(b"\0")[0]))
        return found

    def _point(self, directory: Inode, name: bytes) -> int:
        """The mount that a name leads to, if that is a mount point."""
        path = directory.path()
        return self._table.mounts.point(path + b"/" + name if path else name)

    def _open_file(
        self, events: Events, kill: bool, path_fd: int, flags: int, acting: Acting = nullcontext
    ) -> int:
        """Open a regular file for the request. Somebody on the host may have a lease on it
        (F_SETLEASE of fcntl(2)), and gives it back when it likes. ``kill`` suid and sgid bits.
        """
        suid = credentials.killing_suid if kill else nullcontext
        if "open" not in self.outcomes:
            with suppress(BlockingIOError), acting(), suid():
                return os.open(syscalls.fd_path(path_fd), flags | os.O_NONBLOCK)

        def wait(own: int) -> int:
            with acting(), suid():
                return os.open(syscalls.fd_path(own), flags)

        fd: int = self.slowly("open", wait, path_fd, expected=events, discard=os.close)
        if not os.path.sameopenfile(fd, path_fd):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    # Who asks

    def is_replayer(self, who: Caller) -> bool:
        """Whether the mount's agent asks."""
        return who.pid == self.guest.pid and who.pid != 0

    def _refuse_replayer(self, who: Caller, what: str) -> None:
        """The safety rule: nothing that the replayer asks for changes the backing store."""
        if self.is_replayer(who):
            raise self._refused(UnexpectedCall(what))

    def _refused(self, error: UnexpectedCall) -> UnexpectedCall:
        self.guest.counts["refused"] += 1
        log.debug("replayer refused", reason=error.strerror)
        return error

    def _check_writable(self) -> None:
        """Raises OSError EROFS for users of a share that they may not change. Not for the replayer:
        what it asks for changes nothing.
        """
        if self.export.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _own(self, *expected: Expected) -> AbstractContextManager[None]:
        return self.export.watcher.attributed(self.guest, *expected)

    def _about(self, inode: Inode, mask: Mask) -> tuple[Expected, ...]:
        """An event of an object: by name in its directory, and on itself."""
        if not self.export.watcher.hears(inode):  # as always with most files: it costs little
            return ()
        return (inode.parent, inode.name, mask), (inode, b"", mask)

    def _looked_up(self, who: Caller, inode: Inode, entry: Entry | None = None) -> None:
        if self.guest.pid and who.pid:
            directory = inode if inode.is_dir else inode.parent
            if directory is not None and not directory.is_placeholder:
                file = None if inode.is_dir else entry
                self.export.arming.looked_up(self.guest, directory, who.pid, file)

    def _wherever(self, inode: Inode, do: Callable[[], _T]) -> _T:
        """Do something with an object; with a file that is not where it was, and has no handle that
        can be opened, once more when it is known what the host has done. Raises OSError.
        """
        try:
            return do()
        except OSError as error:
            is_lost = error.errno in (errno.ESTALE, errno.ENOENT) and not inode.is_dir
            if not is_lost or self._table.reach.handle_opens(inode.identity):
                raise
        self.export.watcher.drain()
        self.export.route(_EVENTS)
        return do()

    # Handles

    def has_room(self) -> bool:
        """Whether the guest may have one more descriptor."""
        own = len(self._handles) - len(self._replayed)
        return own + self.locks.opened + self.pinned < self.export.descriptors

    def check_room(self) -> None:
        """Raises OSError ENFILE where it may not: before a file is opened."""
        if not self.has_room():
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def _new(self, handle: AnyHandle, who: Caller) -> int:
        fh = next(self._numbers)
        self._handles[fh] = handle
        if isinstance(handle, Handle):
            handle.fh, handle.opener, handle.uid = fh, who.pid, who.uid
        if self.kept is not None:
            self.kept.opened(fh, _opened(handle))
            if isinstance(handle, Handle) and not handle.inode.nlink:
                self.kept.hold(fh, handle.fd)
        return fh

    def handle(self, fh: int) -> AnyHandle:
        """The open file of a request. Raises OSError EBADF."""
        try:
            handle = self._handles[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
        if isinstance(handle, LostHandle):
            raise OSError(handle.errno, os.strerror(handle.errno))
        return handle

    def file(self, fh: int) -> Handle:
        """The open file or directory of a request that is about its data. Raises OSError EBADF,
        EACCES for the replayer's, which have none.
        """
        return self._with_data(self.handle(fh))

    def _with_data(self, handle: AnyHandle) -> Handle:
        """Also what the replayer's thread opened before it was the replayer has no data for it: on
        the libfuse transport, READ and WRITE do not say who asks.
        """
        if not isinstance(handle, Handle) or 0 != handle.opener == self.guest.pid:
            raise self._refused(UnexpectedCall("data"))
        return handle

    def open(self, who: Caller, nodeid: int, flags: int, *, kill: bool = False) -> int:
        """OPEN; with O_TRUNC, ``kill`` suid and sgid bits."""
        if self.is_replayer(who) and nodeid < FSD_DIR:
            return self._replay_open(who, nodeid)
        if nodeid != CONTROL:  # which is one, and without which there are no events
            self.check_room()
        if nodeid >= FSD_DIR:
            self.hidden.check(who)
            return self._new(self.hidden.open(nodeid, who, flags), who)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._check_writable()
        inode = self._table.get(nodeid)
        again = self.guest.history.opens(who, inode)
        kill = bool(flags & os.O_TRUNC) and (kill or who.uid != 0)

        def opened() -> Handle:
            events = self._about(inode, opening(flags))
            with self._own(*events):
                return self._fs.open(inode, flags, partial(self._open_file, events, kill))

        with self.guest.history.coming(who, again):
            return self._new(self._wherever(inode, opened), who)

    def _replay_open(self, who: Caller, nodeid: int) -> int:
        if len(self._replayed) >= REPLAYED_LIMIT:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        try:
            fh = self._new(IdleHandle(self.guest.ledger.open(nodeid)), who)
        except UnexpectedCall as error:
            raise self._refused(error) from None
        self._replayed.add(fh)
        return fh

    def opendir(self, who: Caller, nodeid: int) -> int:
        """OPENDIR."""
        if self.is_replayer(who) and nodeid < FSD_DIR:
            return self._replay_open(who, nodeid)
        self.check_room()
        if nodeid >= FSD_DIR:
            self.hidden.check(who)
            return self._new(self.hidden.open(nodeid, who, os.O_RDONLY), who)
        inode = self._table.get(nodeid)
        self.guest.history.opens(who, inode)
        self._looked_up(who, inode)
        with self._own(*self._about(inode, Mask.OPEN)):
            return self._new(self._opened_directory(inode), who)

    def _opened_directory(self, inode: Inode) -> Handle | IdleHandle:
        try:
            return self._fs.opendir(inode)
        except FileNotFoundError:  # a removed one that somebody works in: it is empty
            return IdleHandle(inode)

    def names(self, fh: int, position: int, size: int = 1 << 15) -> tuple[Inode, list[DirEntry]]:
        """READDIR: the directory and entries from a position on, some ``size`` bytes as the host
        has them; [] at the end.
        """
        handle = self.handle(fh)
        if not isinstance(handle, Handle):
            return self.hidden.root, []
        self._with_data(handle)
        with self._own(*self._about(handle.inode, Mask.ACCESS)):
            return handle.inode, self._fs.read_directory(handle, position, size)

    def entry(self, fh: int, name: bytes) -> Entry | None:
        """READDIRPLUS: the entry of a name in an open directory, not referenced yet; None if it is
        gone by now, or nobody can look: then the name is all that is given.
        """
        handle = self.file(fh)
        try:
            if name in (b".", b".."):
                return self._fs.peek(handle.inode, name)
            mounts = self._table.mounts
            if mounts.remote and self._point(handle.inode, name) in mounts.remote:
                return None  # a listing waits for no other file system
            entry = self._fs.peek_at(handle.fd, handle.inode, name)
        except OSError:
            return None
        if entry.inode.is_dir:
            self.guest.ledger.found(handle.inode.nodeid, name)
        return entry

    def read(self, fh: int, offset: int, size: int) -> bytes:
        """READ."""
        handle = self.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.ACCESS)
            return b"\0"  # of nothing the kernel would make no event
        handle = self._with_data(handle)
        with self._own(*self._about(handle.inode, Mask.ACCESS)):
            return os.pread(handle.fd, size, offset)

    def write(
        self, fh: int, offset: int, data: bytes, *, append: bool = False, kill: bool = False
    ) -> int:
        """WRITE; to the end of the file, to ``append``. Nobody says who writes: the user who
        opened the file is taken for it, also to ``kill`` suid and sgid bits.
        """
        handle = self.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.MODIFY)
            return len(data)
        handle = self._with_data(handle)
        appends.follow(handle, append)
        kill = kill and handle.uid != 0
        with self._own(*self._about(handle.inode, _WRITTEN)), writing(handle.uid, kill=kill):
            return os.pwrite(handle.fd, data, offset)

    def _replay_data(self, handle: IdleHandle, event: Mask) -> None:
        try:
            self.guest.ledger.touch(handle.inode, event)
        except UnexpectedCall as error:
            raise self._refused(error) from None

    def read_into(self, fh: int, views: list[memoryview], offset: int) -> int:
        """READ into buffers; returns the number of bytes."""
        handle = self.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.ACCESS)
            views[0][:1] = b"\0"  # of nothing the kernel would make no event
            return 1
        handle = self._with_data(handle)
        events = self._about(handle.inode, Mask.ACCESS)
        if self._is_elsewhere(handle):
            work: Callable[[int], int] = lambda fd: _moved(os.preadv, fd, views, offset)  # noqa: E731
            return int(self._there("read", work, handle, events))
        with self._own(*events):
            return _moved(os.preadv, handle.fd, views, offset)

    def _there(self, what: str, work: Callable[[int], Any], handle: Handle, events: Events) -> Any:
        """Work on a file of another file system."""
        mount = handle.inode.identity.mount if self._is_elsewhere(handle) else 0
        return self.slowly(what, work, handle.fd, expected=events, mount=mount)

    def _is_elsewhere(self, handle: Handle) -> bool:
        """Whether it is on a file system that may not answer."""
        mounts = self._table.mounts
        return bool(mounts.remote) and handle.inode.identity.mount in mounts.remote

    def write_from(
        self,
        who: Caller,
        fh: int,
        views: list[memoryview],
        offset: int,
        *,
        kill: bool,
        append: bool = False,
    ) -> int:
        """WRITE from buffers, to the end of the file to ``append``; ``kill`` suid and sgid bits.
        Returns the number of bytes.
        """
        handle = self.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.MODIFY)
            return sum(map(len, views))
        self._refuse_replayer(who, "write")
        handle = self._with_data(handle)
        appends.follow(handle, append)
        events = self._about(handle.inode, _WRITTEN)

        def write(fd: int) -> int:
            with writing(payer, kill=kill or who.uid != 0):
                return _moved(os.pwritev, fd, views, offset)

        payer = _payer(who, handle)
        if self._is_elsewhere(handle):
            return int(self._there("write", write, handle, events))
        with self._own(*events):
            return write(handle.fd)

    def fallocate(self, who: Caller, fh: int, mode: int, offset: int, length: int) -> None:
        """FALLOCATE."""
        handle = self._changing(who, fh, "fallocate")
        events = self._about(handle.inode, _WRITTEN)

        def allocate(fd: int) -> None:
            with writing(who.uid, kill=who.uid != 0):
                syscalls.fallocate(fd, mode, offset, length)

        if length > LONG:
            self.slowly("fallocate", allocate, handle.fd, expected=events)
            return
        with self._own(*events):
            allocate(handle.fd)

    def lseek(self, fh: int, offset: int, whence: int) -> int:
        """LSEEK: the next data or hole."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE, os.SEEK_END, os.SEEK_SET):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.lseek(self.file(fh).fd, offset, whence)

    def copy_file_range(
        self, who: Caller, fh: int, offset: int, fh_out: int, offset_out: int, size: int
    ) -> int:
        """COPY_FILE_RANGE, COPY_LIMIT bytes at most; returns how many."""
        source, target = self.file(fh), self._changing(who, fh_out, "copy_file_range")
        appends.follow(target, False)  # the guest's does not, else its kernel had refused
        events = (*self._about(source.inode, Mask.ACCESS), *self._about(target.inode, _WRITTEN))
        size = min(size, COPY_LIMIT)

        def copy(source_fd: int, target_fd: int) -> int:
            with writing(who.uid, kill=who.uid != 0):
                return os.copy_file_range(source_fd, target_fd, size, offset, offset_out)

        if size > LONG or self._is_elsewhere(source) or self._is_elsewhere(target):
            return int(self.slowly("copy", copy, source.fd, target.fd, expected=events))
        with self._own(*events):
            return copy(source.fd, target.fd)

    def _changing(self, who: Caller, fh: int, what: str) -> Handle:
        self._refuse_replayer(who, what)
        return self.file(fh)

    def ioctl(self, who: Caller, fh: int, command: int, data: bytes) -> bytes:
        """IOCTL. Raises OSError ENOTTY for all but those of fsd.linux.ioctls.FILES."""
        size = ioctls.FILES.get(command)
        handle = self.handle(fh)
        if size is None or isinstance(handle, HiddenHandle):
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        handle = self._changing(who, fh, "ioctl")
        if command in fileflags.CHANGING:
            self._check_writable()
        with self._own(*self._about(handle.inode, Mask.ATTRIB)):
            return self._fs.ioctl(handle, who, command, data[:size].ljust(size, b"\0"))

    def fsync(self, fh: int, *, data_only: bool) -> None:
        """FSYNC, FSYNCDIR."""
        if "fsync" in self.outcomes:  # the file may be closed by now
            self.outcomes["fsync"].take()
            return
        handle = self.handle(fh)
        if isinstance(handle, Handle):
            sync = os.fdatasync if data_only else os.fsync
            self._there("fsync", sync, handle, ())

    def syncfs(self) -> None:
        """SYNCFS: of the share's own file system."""
        self.slowly("syncfs", syscalls.syncfs, self._table.reach.root_fd)

    def file_fd(self, fh: int) -> int:
        """The descriptor to fsync; -1 where there is nothing to sync."""
        handle = self.handle(fh)
        return handle.fd if isinstance(handle, Handle) else -1

    # Locks

    def getlk(self, who: Caller, fh: int, owner: int, lock: Lock) -> Lock:
        """GETLK."""
        self._refuse_replayer(who, "getlk")
        return self.locks.get(self.file(fh), owner, lock)

    def setlk(self, who: Caller, fh: int, owner: int, lock: Lock) -> None:
        """SETLK. Raises BlockingIOError where a lock is in the way."""
        self._refuse_replayer(who, "setlk")
        handle = self.file(fh)
        if lock.kind == fcntl.F_WRLCK and handle.flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.locks.set(handle, owner, lock)

    def flock(self, who: Caller, fh: int, kind: int) -> None:
        """SETLK with LK_FLOCK. Raises BlockingIOError where a lock is in the way, EROFS for an
        exclusive one in a share that the guest may not change: it would keep the host's own
        programs out.
        """
        self._refuse_replayer(who, "flock")
        if kind == fcntl.F_WRLCK:
            self._check_writable()
        handle = self.file(fh)
        self.locks.flock(handle, kind)
        if self.kept is not None:
            self.kept.hold(fh, handle.fd)

    def unlock(self, fh: int) -> None:
        """RELEASE of a file that flock(2) was used on."""
        handle = self._handles.get(fh)
        if isinstance(handle, Handle):
            self.locks.flock(handle, fcntl.F_UNLCK)

    def flush(self, fh: int, owner: int) -> None:
        """FLUSH: a process closes the file, which takes the locks that it has on it."""
        if isinstance(self._handles.get(fh), LostHandle):
            return
        handle = self.handle(fh)
        if isinstance(handle, Handle):
            self.locks.drop(handle.inode, owner)

    def release(self, fh: int) -> None:
        """RELEASE, RELEASEDIR."""
        handle = self._handles.pop(fh, None)
        self._replayed.discard(fh)
        if self.kept is not None:
            self.kept.released(fh)
        if isinstance(handle, LostHandle) and handle.is_agents and self.hidden.control is None:
            self.guest.agent_gone()
        if isinstance(handle, Handle):
            reading = handle.flags & os.O_ACCMODE == os.O_RDONLY
            closing = Mask.CLOSE_NOWRITE if reading else Mask.CLOSE_WRITE
            events = self._about(handle.inode, closing)
            try:
                self.locks.released(handle)
                if self._is_elsewhere(handle) or self._is_last_of_long(handle):
                    gone = (handle.inode, b"", closing | Mask.DELETE_SELF)
                    self.close_slowly(self._fs.detach(handle), (*events, gone))
                else:
                    with self._own(*events):
                        self._fs.release(handle)
            finally:
                self._fs.release(handle)  # it closes once, whatever else fails
        elif isinstance(handle, HiddenHandle):
            self.hidden.release(handle)

    @staticmethod
    def _is_last_of_long(handle: Handle) -> bool:
        """Whether to close it may free a long file."""
        if handle.inode.nlink:
            return False
        status = os.fstat(handle.fd)
        return not status.st_nlink and status.st_size > LONG

    # The server before, and the one after this

    def keep_no_longer(self) -> None:
        """Nothing more is noted: what is still open is another session's no more."""
        if self.kept is not None:
            self._fs.on_unlinked.remove(self._hold)
            self.kept = self.locks.kept = None

    def keep(self, kept: SessionRecord | None) -> None:
        """Have noted there what is open and locked."""
        self.kept = self.locks.kept = kept
        if kept is not None:
            self._fs.on_unlinked.append(self._hold)

    def resume(self, kept: SessionRecord, inodes: Mapping[int, Inode]) -> Iterator[int]:
        """Take over what was open, by descriptor where there is one; else it is opened again."""
        for fh, opened in sorted(kept.handles.items()):
            fd = kept.fds.pop(fh, -1)
            self._handles[fh] = self._resumed(opened, fd, inodes)
            handle = self._handles[fh]
            if isinstance(handle, Handle):
                handle.fh = fh
            self._numbers = itertools.count(fh + 1)
            yield fh
        for number, owner in kept.owners.items():
            holder = self._handles.get(owner.fh)
            holder = holder if isinstance(holder, Handle) else None
            fd = holder.fd if holder is not None else kept.owned_fd(number)
            if fd >= 0 and owner.nodeid in inodes:
                self.locks.resume(number, inodes[owner.nodeid], owner, fd, holder)
            else:
                kept.disowned(number)

    def _resumed(
        self, opened: Opened, fd: int, inodes: Mapping[int, Inode]
    ) -> AnyHandle | LostHandle:
        kind, flags, nodeid = opened
        if kind == record.HIDDEN:
            return LostHandle(errno.ECONNRESET, is_agents=nodeid == CONTROL)
        inode = inodes.get(nodeid)
        if kind == record.IDLE and inode is not None:
            return IdleHandle(inode)
        try:
            if fd >= 0:
                return self._fs.resume(inode, fd, flags)
            if inode is None or inode.is_placeholder:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            if kind == record.DIRECTORY:
                return self._opened_directory(inode)
            handle = self._fs.reopen(inode, flags & _REOPENING)
            handle.flags = flags
            return handle
        except OSError as error:
            log.warning("an open file was lost", nodeid=nodeid, error=str(error))
            return LostHandle(errno.ESTALE)

    def _hold(self, inode: Inode) -> None:
        """An open file has lost its last name: by that it cannot be opened again."""
        if self.kept is not None:
            for fh, handle in self._handles.items():
                if isinstance(handle, Handle) and handle.inode is inode:
                    self.kept.hold(fh, handle.fd)

    def descriptors(self) -> dict[int, int]:
        """Of all open files, by handle."""
        return {handle.fh: handle.fd for handle in self.files()}

    def files(self) -> Iterator[Handle]:
        """All open files and directories."""
        return (handle for handle in self._handles.values() if isinstance(handle, Handle))


def _close(fd: int, expected: Events) -> None:
    os.close(fd)


def _opened(handle: AnyHandle) -> Opened:
    if isinstance(handle, HiddenHandle):
        return Opened(record.HIDDEN, 0, handle.nodeid)
    inode = handle.inode
    if isinstance(handle, IdleHandle):
        return Opened(record.IDLE, 0, inode.nodeid)
    kind = record.DIRECTORY if inode.is_dir else record.FILE
    return Opened(kind, handle.flags & 0xFFFF_FFFF, inode.nodeid)


def opening(flags: int) -> Mask:
    """The events of an open."""
    return _OPEN_TRUNC if flags & os.O_TRUNC else Mask.OPEN


def _payer(who: Caller, handle: Handle) -> int:
    """Whose the blocks are that a WRITE takes: the caller's. What a guest's kernel writes back of
    a mapped file comes from no process, and is the user's who opened the file.
    """
    return who.uid if who.uid or who.pid else handle.uid


def writing(uid: int, *, kill: bool) -> AbstractContextManager[None]:
    """Take blocks of the disk for a user: the host's limits for him hold. ``kill`` suid and sgid
    bits, as a change of a file's data by anybody without CAP_FSETID does.
    """
    return credentials.on_behalf_of(uid, kill_suid=kill) if uid or kill else nullcontext()


_IOV_MAX = 1024


def _moved(
    move: Callable[[int, list[memoryview], int], int], fd: int, views: list[memoryview], offset: int
) -> int:
    """preadv(2) or pwritev(2), as often as their limit of buffers asks; how many bytes."""
    moved = move(fd, views[:_IOV_MAX], offset)
    if len(views) > _IOV_MAX and moved == sum(map(len, views[:_IOV_MAX])):
        moved += _moved(move, fd, views[_IOV_MAX:], offset + moved)
    return moved
