"""Operations on one mount's open files: open, read, write, lock, close.

Users work on the host, the replayer is answered from the ledger, hidden files answer themselves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from functools import partial

from protocol.frames import CONTROL, FSD_DIR
from protocol.masks import Mask

from ..export.export import Export
from ..files import appends, fileflags
from ..files.caller import Caller
from ..files.handle import Handle
from ..files.inode import Inode
from ..files.locks import Lock
from ..files.passthrough import Entry
from ..files.slowcalls import LONG
from ..guests.ledger import UnexpectedCall
from ..guests.mount import MountGuest
from ..linux import ioctls, syscalls
from ..linux.directories import DirEntry
from .access import Access, opening, writing
from .handles import Handles, IdleHandle, LostHandle
from .hidden import HiddenFiles, HiddenHandle
from .slowwork import SlowWork

COPY_LIMIT = 1 << 24
"""Bytes of one COPY_FILE_RANGE: callers ask again."""
REPLAYED_LIMIT = 1 << 16
"""Files that the agent may have open for programs of the host, about 200 bytes each. They have no
descriptor here, so they take none from the guest's programs. The agent of fsd-guest keeps a quarter
of them at most."""
_WRITTEN = Mask.MODIFY | Mask.ATTRIB  # ATTRIB if suid bits are cleared


class OpenFileData:
    """Operations on open files of one mount."""

    def __init__(
        self,
        export: Export,
        guest: MountGuest,
        access: Access,
        slow: SlowWork,
        handles: Handles,
        hidden: HiddenFiles,
    ) -> None:
        self._export = export
        self._guest = guest
        self._fs = export.fs
        self._table = export.table
        self._access = access
        self._slow = slow
        self._handles = handles
        self._hidden = hidden

    def reach(self, nodeid: int, body: bytes, *, is_name: bool) -> None:
        """Before a request: check file systems below the share that the request is about, as they
        may not answer. ``is_name``: its body is a name. Raises Later, OSError ELOOP.
        """
        mounts = self._table.mounts
        if not mounts.remote:
            return
        for mount in self._mounts_of(nodeid, body, is_name=is_name) & mounts.remote.keys():
            mounts.check(mount, self._slow.patience)
            what = f"look at {mounts.remote[mount]}"
            path = mounts.path_of(mount)
            ask = partial(mounts.ask, mount, path)
            self._slow.slowly(
                what, ask, self._table.reach.root_fd, mount=mount, patience=self._slow.patience
            )

    def _mounts_of(self, nodeid: int, body: bytes, *, is_name: bool) -> set[int]:
        """The mounts that a request is about, including those of a node that it may name by
        number.
        """
        numbers = [nodeid]
        if not is_name:
            size = min(len(body), 32) & ~7  # all that requests have of handles and nodes
            numbers += [number for (number,) in struct.iter_unpack("<Q", body[:size])]
        inodes = [self._table.known(number) for number in numbers]
        for number in numbers[1:]:
            handle = self._handles.known(number)
            inodes.append(getattr(handle, "inode", None))
        found = {inode.identity.mount for inode in inodes if inode is not None}
        if is_name and inodes[0] is not None:
            found.add(self._point(inodes[0], body.partition(b"\0")[0]))
        return found

    def _point(self, directory: Inode, name: bytes) -> int:
        """The mount that a name leads to, if it is a mount point."""
        path = directory.path()
        return self._table.mounts.point(path + b"/" + name if path else name)

    def open(self, who: Caller, nodeid: int, flags: int, *, kill: bool = False) -> int:
        """OPEN; with O_TRUNC, ``kill`` suid and sgid bits."""
        if self._access.is_replayer(who) and nodeid < FSD_DIR:
            return self._replay_open(who, nodeid)
        if nodeid != CONTROL:  # which is one, and without which there are no events
            self._handles.check_room()
        if nodeid >= FSD_DIR:
            self._hidden.check(who)
            return self._handles.add(self._hidden.open(nodeid, who, flags), who)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._access.check_writable()
        inode = self._table.get(nodeid)
        try:
            again = self._guest.history.opens(who, inode)
        except OSError:
            self._fs.successors.replaced(inode)  # or will be, before it comes again
            raise
        kill = bool(flags & os.O_TRUNC) and (kill or who.uid != 0)

        def opened() -> Handle:
            events = self._access.about(inode, opening(flags))
            with self._access.own(*events):
                return self._fs.open(inode, flags, partial(self._slow.open_file, events, kill))

        with self._guest.history.coming(who, again):
            return self._handles.add(self._access.wherever(inode, opened), who)

    def _replay_open(self, who: Caller, nodeid: int) -> int:
        self.check_replayed()
        try:
            inode = self._guest.ledger.open(nodeid)
        except UnexpectedCall as error:
            raise self._access.refused(error) from None
        return self.replayed_open(who, inode)

    def check_replayed(self) -> None:
        """Raises OSError ENFILE if the replayer may open no more."""
        if len(self._handles.replayed) >= REPLAYED_LIMIT:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def replayed_open(self, who: Caller, inode: Inode) -> int:
        """The replayer's handle of a file."""
        fh = self._handles.add(IdleHandle(inode), who)
        self._handles.replayed.add(fh)
        return fh

    def opendir(self, who: Caller, nodeid: int) -> int:
        """OPENDIR."""
        if self._access.is_replayer(who) and nodeid < FSD_DIR:
            return self._replay_open(who, nodeid)
        self._handles.check_room()
        if nodeid >= FSD_DIR:
            self._hidden.check(who)
            return self._handles.add(self._hidden.open(nodeid, who, os.O_RDONLY), who)
        inode = self._table.get(nodeid)
        self._guest.history.opens(who, inode)
        self._access.looked_up(who, inode)
        with self._access.own(*self._access.about(inode, Mask.OPEN)):
            return self._handles.add(self._handles.open_directory(inode), who)

    def names(self, fh: int, position: int, size: int = 1 << 15) -> tuple[Inode, list[DirEntry]]:
        """READDIR: the directory and entries from a position on, about ``size`` bytes as the host
        has them; [] at the end.
        """
        handle = self._handles.handle(fh)
        if not isinstance(handle, Handle):
            return self._hidden.root, []
        self._handles.with_data(handle)
        with self._access.own(*self._access.about(handle.inode, Mask.ACCESS)):
            return handle.inode, self._fs.read_directory(handle, position, size)

    def entry(self, fh: int, name: bytes) -> Entry | None:
        """READDIRPLUS: the entry of a name in an open directory, not referenced yet; None if it is
        gone, or cannot be looked at: then only the name is returned.
        """
        handle = self._handles.file(fh)
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
            self._guest.ledger.found(handle.inode.nodeid, name)
        return entry

    def read(self, fh: int, offset: int, size: int) -> bytes:
        """READ."""
        handle = self._handles.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.ACCESS)
            return b"\0"  # of nothing the kernel would make no event
        handle = self._handles.with_data(handle)
        with self._access.own(*self._access.about(handle.inode, Mask.ACCESS)):
            return os.pread(handle.fd, size, offset)

    def write(
        self, fh: int, offset: int, data: bytes, *, append: bool = False, kill: bool = False
    ) -> int:
        """WRITE; to the end of the file, to ``append``. The request does not show which user
        writes: the one who opened the file is assumed, also to ``kill`` suid and sgid bits.
        """
        handle = self._handles.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.MODIFY)
            return len(data)
        handle = self._handles.with_data(handle)
        appends.follow(handle, append)
        kill = kill and handle.uid != 0
        with (
            self._access.own(*self._access.about(handle.inode, _WRITTEN)),
            writing(handle.uid, kill=kill),
        ):
            return os.pwrite(handle.fd, data, offset)

    def _replay_data(self, handle: IdleHandle, event: Mask) -> None:
        try:
            self._guest.ledger.touch(handle.inode, event)
        except UnexpectedCall as error:
            raise self._access.refused(error) from None

    def read_into(self, fh: int, views: list[memoryview], offset: int) -> int:
        """READ into buffers; returns the number of bytes."""
        handle = self._handles.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.ACCESS)
            views[0][:1] = b"\0"  # of nothing the kernel would make no event
            return 1
        handle = self._handles.with_data(handle)
        events = self._access.about(handle.inode, Mask.ACCESS)
        if self._slow.is_elsewhere(handle):
            work: Callable[[int], int] = lambda fd: _moved(os.preadv, fd, views, offset)  # noqa: E731
            return int(self._slow.there("read", work, handle, events))
        with self._access.own(*events):
            return _moved(os.preadv, handle.fd, views, offset)

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
        handle = self._handles.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.MODIFY)
            return sum(map(len, views))
        self._access.refuse_replayer(who, "write")
        handle = self._handles.with_data(handle)
        appends.follow(handle, append)
        events = self._access.about(handle.inode, _WRITTEN)

        def write(fd: int) -> int:
            with writing(payer, kill=kill or who.uid != 0):
                return _moved(os.pwritev, fd, views, offset)

        payer = _payer(who, handle)
        if self._slow.is_elsewhere(handle):
            return int(self._slow.there("write", write, handle, events))
        with self._access.own(*events):
            return write(handle.fd)

    def fallocate(self, who: Caller, fh: int, mode: int, offset: int, length: int) -> None:
        """FALLOCATE."""
        handle = self._changing(who, fh, "fallocate")
        events = self._access.about(handle.inode, _WRITTEN)

        def allocate(fd: int) -> None:
            with writing(who.uid, kill=who.uid != 0):
                syscalls.fallocate(fd, mode, offset, length)

        if length > LONG:
            self._slow.slowly("fallocate", allocate, handle.fd, expected=events)
            return
        with self._access.own(*events):
            allocate(handle.fd)

    def lseek(self, fh: int, offset: int, whence: int) -> int:
        """LSEEK: the next data or hole."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE, os.SEEK_END, os.SEEK_SET):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.lseek(self._handles.file(fh).fd, offset, whence)

    def copy_file_range(
        self, who: Caller, fh: int, offset: int, fh_out: int, offset_out: int, size: int
    ) -> int:
        """COPY_FILE_RANGE, COPY_LIMIT bytes at most; returns how many."""
        source, target = self._handles.file(fh), self._changing(who, fh_out, "copy_file_range")
        appends.follow(target, False)  # the guest's does not, else its kernel would have refused
        events = (
            *self._access.about(source.inode, Mask.ACCESS),
            *self._access.about(target.inode, _WRITTEN),
        )
        size = min(size, COPY_LIMIT)

        def copy(source_fd: int, target_fd: int) -> int:
            with writing(who.uid, kill=who.uid != 0):
                return os.copy_file_range(source_fd, target_fd, size, offset, offset_out)

        if size > LONG or self._slow.is_elsewhere(source) or self._slow.is_elsewhere(target):
            return int(self._slow.slowly("copy", copy, source.fd, target.fd, expected=events))
        with self._access.own(*events):
            return copy(source.fd, target.fd)

    def _changing(self, who: Caller, fh: int, what: str) -> Handle:
        self._access.refuse_replayer(who, what)
        return self._handles.file(fh)

    def ioctl(self, who: Caller, fh: int, command: int, data: bytes) -> bytes:
        """IOCTL. Raises OSError ENOTTY for all but those of fsd.linux.ioctls.FILES."""
        size = ioctls.FILES.get(command)
        handle = self._handles.handle(fh)
        if size is None or isinstance(handle, HiddenHandle):
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        handle = self._changing(who, fh, "ioctl")
        if command in fileflags.CHANGING:
            self._access.check_writable()
        with self._access.own(*self._access.about(handle.inode, Mask.ATTRIB)):
            return self._fs.ioctl(handle, who, command, data[:size].ljust(size, b"\0"))

    def fsync(self, fh: int, *, data_only: bool) -> None:
        """FSYNC, FSYNCDIR."""
        if "fsync" in self._slow.outcomes:  # the file may be closed by now
            self._slow.outcomes["fsync"].take()
            return
        handle = self._handles.handle(fh)
        if isinstance(handle, Handle):
            sync = os.fdatasync if data_only else os.fsync
            self._slow.there("fsync", sync, handle, ())

    def syncfs(self) -> None:
        """SYNCFS of the share's own file system."""
        self._slow.slowly("syncfs", syscalls.syncfs, self._table.reach.root_fd)

    # Locks

    def getlk(self, who: Caller, fh: int, owner: int, lock: Lock) -> Lock:
        """GETLK."""
        self._access.refuse_replayer(who, "getlk")
        return self._handles.locks.get(self._handles.file(fh), owner, lock)

    def setlk(self, who: Caller, fh: int, owner: int, lock: Lock) -> None:
        """SETLK. Raises BlockingIOError if a lock conflicts."""
        self._access.refuse_replayer(who, "setlk")
        handle = self._handles.file(fh)
        if lock.kind == fcntl.F_WRLCK and handle.flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._handles.locks.set(handle, owner, lock)

    def flock(self, who: Caller, fh: int, kind: int) -> None:
        """SETLK with LK_FLOCK. Raises BlockingIOError if a lock conflicts, EROFS for an exclusive
        one in a read-only share: it would block the host's own programs.
        """
        self._access.refuse_replayer(who, "flock")
        if kind == fcntl.F_WRLCK:
            self._access.check_writable()
        handle = self._handles.file(fh)
        self._handles.locks.flock(handle, kind)
        if self._handles.kept is not None:
            self._handles.kept.hold(fh, handle.fd)

    def unlock(self, fh: int) -> None:
        """RELEASE of a file that flock(2) was used on."""
        handle = self._handles.known(fh)
        if isinstance(handle, Handle):
            self._handles.locks.flock(handle, fcntl.F_UNLCK)

    def flush(self, fh: int, owner: int) -> None:
        """FLUSH: a process closes the file, which releases its locks on it."""
        if isinstance(self._handles.known(fh), LostHandle):
            return
        handle = self._handles.handle(fh)
        if isinstance(handle, Handle):
            self._handles.locks.drop(handle.inode, owner)

    # The end

    def release(self, fh: int) -> None:
        """RELEASE, RELEASEDIR."""
        handle = self._handles.remove(fh)
        if isinstance(handle, LostHandle) and handle.is_agents and self._hidden.control is None:
            self._guest.agent_gone()
        if isinstance(handle, Handle):
            reading = handle.flags & os.O_ACCMODE == os.O_RDONLY
            closing = Mask.CLOSE_NOWRITE if reading else Mask.CLOSE_WRITE
            events = self._access.about(handle.inode, closing)
            try:
                self._handles.locks.released(handle)
                if self._slow.is_elsewhere(handle) or self._is_last_of_long(handle):
                    gone = (handle.inode, b"", closing | Mask.DELETE_SELF)
                    self._slow.close(self._fs.detach(handle), (*events, gone))
                else:
                    with self._access.own(*events):
                        self._fs.release(handle)
            finally:
                self._fs.release(handle)  # it closes once, whatever else fails
        elif isinstance(handle, HiddenHandle):
            self._hidden.release(handle)

    @staticmethod
    def _is_last_of_long(handle: Handle) -> bool:
        """Whether closing it may free a long file."""
        if handle.inode.nlink:
            return False
        status = os.fstat(handle.fd)
        return not status.st_nlink and status.st_size > LONG


def _payer(who: Caller, handle: Handle) -> int:
    """The user who is charged for the blocks of a WRITE: the caller. A write-back of a mapped file
    comes from no process, and is charged to the user who opened the file.
    """
    return who.uid if who.uid or who.pid else handle.uid


_IOV_MAX = 1024


def _moved(
    move: Callable[[int, list[memoryview], int], int], fd: int, views: list[memoryview], offset: int
) -> int:
    """preadv(2) or pwritev(2), as often as their limit of buffers requires; returns the number of
    bytes.
    """
    moved = move(fd, views[:_IOV_MAX], offset)
    if len(views) > _IOV_MAX and moved == sum(map(len, views[:_IOV_MAX])):
        moved += _moved(move, fd, views[_IOV_MAX:], offset + moved)
    return moved
