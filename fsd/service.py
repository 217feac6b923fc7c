"""The operations that a door offers to one mount: passthrough, own echo, replay, hidden files.

Each call comes from the mount's users, from its replayer, or concerns the hidden directory; this
is where the three part. Synchronous, plain values; an OSError carries the errno for the guest.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import structlog

from protocol.frames import FSD_DIR, FSD_NAME
from protocol.masks import Mask

from . import host
from .attributes import StatLike, placeholder_attr
from .export import Export
from .hidden import HiddenFiles, HiddenHandle
from .inodes import ROOT_ID, Inode
from .ledger import UnexpectedCall
from .locks import GuestLocks, Lock
from .passthrough import Changes, DirEntry, Entry, Handle, Identity
from .replayer import ReplayGuest
from .watcher import Expected

log = structlog.get_logger()
Caller = Identity
COPY_LIMIT = 1 << 24
"""Bytes of one COPY_FILE_RANGE: some 10 ms, for which other guests wait. Callers ask again."""
_DOT, _DOTDOT = (DirEntry(name, 0, stat.S_IFDIR >> 12) for name in (b".", b".."))


@dataclass(slots=True, eq=False)
class IdleHandle:
    """A handle that does nothing: what the replayer opened, or a directory that is removed."""

    inode: Inode


AnyHandle = Handle | IdleHandle | HiddenHandle


class Service:
    """Operations of one mount on an export. ``guest`` is the mount."""

    def __init__(self, export: Export, guest: ReplayGuest) -> None:
        self.export = export
        self.guest = guest
        self._fs = export.fs
        self._table = export.table
        self.hidden = HiddenFiles(export, guest)
        self._handles: dict[int, AnyHandle] = {}
        self._numbers = itertools.count(1)
        self.locks = GuestLocks(export.watcher, export.lock_waiters)

    def close(self) -> None:
        """Release every lock and every handle."""
        self.locks.close()
        for fh in list(self._handles):
            self.release(fh)

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

    def _own(self, *expected: Expected) -> AbstractContextManager[None]:
        return self.export.watcher.attributed(self.guest, *expected)

    @staticmethod
    def _about(inode: Inode, mask: Mask) -> tuple[Expected, Expected]:
        """An event of an object: by name in its directory, and on itself."""
        return (inode.parent, inode.name, mask), (inode, b"", mask)

    def _looked_up(self, who: Caller, inode: Inode) -> None:
        if self.guest.pid and who.pid:
            directory = inode if inode.is_dir else inode.parent
            if directory is not None and not directory.is_placeholder:
                self.export.arming.looked_up(self.guest, directory, who.pid)

    # Names

    def lookup(self, who: Caller, nodeid: int, name: bytes) -> Entry:
        """LOOKUP."""
        if nodeid >= FSD_DIR or (nodeid == ROOT_ID and name == FSD_NAME):
            return self._hidden_lookup(who, nodeid, name)
        if self.is_replayer(who):
            entry = self.guest.ledger.lookup(nodeid, name)
            if entry is not None:
                return entry
            return self._fs.lookup(self._table.get(nodeid), name)
        entry = self._fs.lookup(self._table.get(nodeid), name)
        self._looked_up(who, entry.inode)
        return entry

    def _hidden_lookup(self, who: Caller, nodeid: int, name: bytes) -> Entry:
        self.hidden.check(who)
        if self.is_replayer(who):
            entry = self.guest.ledger.lookup(nodeid, name)
            if entry is not None:
                return entry
        return self.hidden.lookup(nodeid, name)

    def forget(self, nodeid: int, count: int) -> None:
        """FORGET."""
        if nodeid < FSD_DIR:
            self._table.forget(nodeid, count)

    def mknod(self, who: Caller, nodeid: int, name: bytes, mode: int, rdev: int) -> Entry:
        """MKNOD."""
        if self.is_replayer(who):
            return self._replay_create(nodeid, name, stat.S_IFMT(mode))
        node = self._names(nodeid, name)
        with self._own((node, name, Mask.CREATE)):
            return self._fs.mknod(node, name, mode, rdev, who)

    def mkdir(self, who: Caller, nodeid: int, name: bytes, mode: int) -> Entry:
        """MKDIR."""
        if self.is_replayer(who):
            return self._replay_create(nodeid, name, stat.S_IFDIR)
        node = self._names(nodeid, name)
        with self._own((node, name, Mask.CREATE)):
            return self._fs.mkdir(node, name, mode, who)

    def symlink(self, who: Caller, nodeid: int, name: bytes, target: bytes) -> Entry:
        """SYMLINK."""
        if self.is_replayer(who):
            return self._replay_create(nodeid, name, stat.S_IFLNK)
        node = self._names(nodeid, name)
        with self._own((node, name, Mask.CREATE)):
            return self._fs.symlink(node, name, target, who)

    def _replay_create(self, nodeid: int, name: bytes, kind: int) -> Entry:
        try:
            return self.guest.ledger.create(nodeid, name, kind)
        except UnexpectedCall as error:
            raise self._refused(error) from None

    def link(self, who: Caller, nodeid: int, new_parent: int, name: bytes) -> Entry:
        """LINK."""
        self._refuse_replayer(who, "link")
        inode, node = self._table.get(nodeid), self._names(new_parent, name)
        with self._own((node, name, Mask.CREATE), (inode, b"", Mask.ATTRIB)):
            return self._fs.link(inode, node, name)

    def unlink(self, who: Caller, nodeid: int, name: bytes) -> None:
        """UNLINK."""
        self._remove(who, nodeid, name, is_dir=False)

    def rmdir(self, who: Caller, nodeid: int, name: bytes) -> None:
        """RMDIR."""
        self._remove(who, nodeid, name, is_dir=True)

    def _remove(self, who: Caller, nodeid: int, name: bytes, *, is_dir: bool) -> None:
        if self.is_replayer(who):
            try:
                self.guest.ledger.remove(nodeid, name)
            except UnexpectedCall as error:
                raise self._refused(error) from None
            return
        node = self._names(nodeid, name)
        child = node.children.get(name)
        remove = self._fs.rmdir if is_dir else self._fs.unlink
        with self._own((node, name, Mask.DELETE), (child, b"", Mask.ATTRIB | Mask.DELETE_SELF)):
            remove(node, name)

    def rename(
        self, who: Caller, nodeid: int, name: bytes, nodeid2: int, name2: bytes, flags: int
    ) -> None:
        """RENAME, RENAME2."""
        if self.is_replayer(who):
            try:
                self.guest.ledger.rename(nodeid, name, nodeid2, name2, flags)
            except UnexpectedCall as error:
                raise self._refused(error) from None
            return
        old, new = self._names(nodeid, name), self._names(nodeid2, name2)
        moved = Mask.MOVED_FROM | (Mask.MOVED_TO if flags & host.RENAME_EXCHANGE else Mask(0))
        arrived = Mask.MOVED_TO | (Mask.MOVED_FROM if flags & host.RENAME_EXCHANGE else Mask(0))
        lost = Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF
        with self._own(
            (old, name, moved),
            (new, name2, arrived),
            (old.children.get(name), b"", Mask.MOVE_SELF),
            (new.children.get(name2), b"", lost),
        ):
            self._fs.rename(old, name, new, name2, flags)

    def _names(self, nodeid: int, name: bytes) -> Inode:
        """A directory in which names may change: not the hidden one, nor its name."""
        if nodeid >= FSD_DIR or (nodeid == ROOT_ID and name == FSD_NAME):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return self._table.get(nodeid)

    def readlink(self, nodeid: int) -> bytes:
        """READLINK."""
        return self._fs.readlink(self._node(nodeid))

    def _node(self, nodeid: int) -> Inode:
        if nodeid >= FSD_DIR:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return self._table.get(nodeid)

    # Attributes

    def getattr(self, who: Caller, nodeid: int) -> tuple[Inode, StatLike]:
        """GETATTR."""
        if nodeid >= FSD_DIR:
            return self.hidden.getattr(nodeid)
        inode = self._table.get(nodeid)
        if inode.is_placeholder or self.is_replayer(who):
            return inode, self.guest.ledger.attributes(inode)
        if inode.is_dir:
            self._looked_up(who, inode)
        try:
            return inode, self._fs.getattr_by_path(inode)
        except FileNotFoundError:  # a removed directory that somebody works in
            return inode, placeholder_attr(inode, nlink=0)

    def born_ns(self, who: Caller, nodeid: int) -> int:
        """STATX: time of creation; 0 where that is not known."""
        if nodeid >= FSD_DIR or self.is_replayer(who):
            return 0
        try:
            return self._fs.born_ns(self._table.get(nodeid))
        except OSError:  # gone by now
            return 0

    def setattr(
        self, who: Caller, nodeid: int, changes: Changes, fh: int | None
    ) -> tuple[Inode, StatLike]:
        """SETATTR."""
        if nodeid >= FSD_DIR:
            return self.hidden.getattr(nodeid)
        inode = self._table.get(nodeid)
        if self.is_replayer(who):
            try:
                return inode, self.guest.ledger.setattr(nodeid)
            except UnexpectedCall as error:
                raise self._refused(error) from None
        handle = self._handles.get(fh) if fh is not None else None
        with self._own(*self._about(inode, changes.events)):
            return inode, self._fs.setattr(
                inode, changes, handle if isinstance(handle, Handle) else None
            )

    def getxattr(self, who: Caller, nodeid: int, name: bytes) -> bytes:
        """GETXATTR; the replayer's calls have no privileges to kill."""
        if nodeid >= FSD_DIR or (self.is_replayer(who) and name == b"security.capability"):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        try:
            return self._fs.getxattr(self._table.get(nodeid), name)
        except FileNotFoundError:  # a removed directory: the kernel asks for its ACL at each use
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None

    def listxattr(self, nodeid: int) -> list[bytes]:
        """LISTXATTR."""
        return [] if nodeid >= FSD_DIR else self._fs.listxattr(self._table.get(nodeid))

    def setxattr(self, who: Caller, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        """SETXATTR."""
        self._refuse_replayer(who, "setxattr")
        inode = self._node(nodeid)
        with self._own(*self._about(inode, Mask.ATTRIB)):
            self._fs.setxattr(inode, name, value, flags)

    def removexattr(self, who: Caller, nodeid: int, name: bytes) -> None:
        """REMOVEXATTR."""
        self._refuse_replayer(who, "removexattr")
        inode = self._node(nodeid)
        with self._own(*self._about(inode, Mask.ATTRIB)):
            self._fs.removexattr(inode, name)

    def access(self, nodeid: int, mode: int) -> bool:
        """ACCESS; asked only where the kernel does not check permissions itself."""
        return True if nodeid >= FSD_DIR else self._fs.access(self._table.get(nodeid), mode)

    def statfs(self) -> os.statvfs_result:
        """STATFS."""
        return self._fs.statfs()

    # Handles

    def _new(self, handle: AnyHandle) -> int:
        fh = next(self._numbers)
        self._handles[fh] = handle
        return fh

    def handle(self, fh: int) -> AnyHandle:
        """The open file of a request. Raises OSError EBADF."""
        try:
            return self._handles[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def file(self, fh: int) -> Handle:
        """The open file or directory of a request that is about its data. Raises OSError EBADF,
        EACCES for the replayer's, which have none.
        """
        handle = self.handle(fh)
        if not isinstance(handle, Handle):
            raise self._refused(UnexpectedCall("data"))
        return handle

    def create(
        self, who: Caller, nodeid: int, name: bytes, mode: int, flags: int
    ) -> tuple[Entry, int]:
        """CREATE."""
        self._refuse_replayer(who, "create")
        node = self._names(nodeid, name)
        opened = _opening(flags)
        child = node.children.get(name)
        with self._own((node, name, Mask.CREATE | opened), (child, b"", opened)):
            entry, handle = self._fs.create(node, name, mode, flags, who)
        return entry, self._new(handle)

    def tmpfile(self, who: Caller, nodeid: int, mode: int, flags: int) -> tuple[Entry, int]:
        """TMPFILE."""
        self._refuse_replayer(who, "tmpfile")
        node = self._node(nodeid)
        with self._own((node, None, Mask.OPEN)):
            entry, handle = self._fs.tmpfile(node, mode, flags, who)
        return entry, self._new(handle)

    def open(self, who: Caller, nodeid: int, flags: int) -> int:
        """OPEN."""
        if nodeid >= FSD_DIR:
            self.hidden.check(who)
            return self._new(self.hidden.open(nodeid, who, flags))
        if self.is_replayer(who):
            return self._replay_open(nodeid)
        inode = self._table.get(nodeid)
        with self._own(*self._about(inode, _opening(flags))):
            return self._new(self._fs.open(inode, flags))

    def _replay_open(self, nodeid: int) -> int:
        try:
            return self._new(IdleHandle(self.guest.ledger.open(nodeid)))
        except UnexpectedCall as error:
            raise self._refused(error) from None

    def opendir(self, who: Caller, nodeid: int) -> int:
        """OPENDIR."""
        if nodeid >= FSD_DIR:
            self.hidden.check(who)
            return self._new(self.hidden.open(nodeid, who, os.O_RDONLY))
        if self.is_replayer(who):
            return self._replay_open(nodeid)
        inode = self._table.get(nodeid)
        self._looked_up(who, inode)
        with self._own(*self._about(inode, Mask.OPEN)):
            try:
                return self._new(self._fs.opendir(inode))
            except FileNotFoundError:  # a removed one that somebody works in: it is empty
                return self._new(IdleHandle(inode))

    def names(self, fh: int, position: int) -> tuple[Inode, list[DirEntry]]:
        """READDIR: the directory and its names; read afresh at position 0."""
        handle = self.handle(fh)
        if not isinstance(handle, Handle):
            return self.hidden.root, []
        if position == 0:
            with self._own(*self._about(handle.inode, Mask.ACCESS)):
                handle.names = [_DOT, _DOTDOT, *self._fs.list_names(handle)]
        return handle.inode, handle.names

    def entry(self, node: Inode, name: bytes) -> Entry | None:
        """READDIRPLUS: the entry of a name, not referenced yet; None if it is gone by now."""
        try:
            return self._fs.peek(node, name)
        except OSError:
            return None

    def read(self, fh: int, offset: int, size: int) -> bytes:
        """READ."""
        handle = self.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.ACCESS)
            return b"\0"  # of nothing the kernel would make no event
        handle = self.file(fh)
        with self._own(*self._about(handle.inode, Mask.ACCESS)):
            return os.pread(handle.fd, size, offset)

    def write(self, fh: int, offset: int, data: bytes) -> int:
        """WRITE."""
        handle = self.handle(fh)
        if isinstance(handle, IdleHandle):
            self._replay_data(handle, Mask.MODIFY)
            return len(data)
        handle = self.file(fh)
        with self._own(*self._about(handle.inode, Mask.MODIFY | Mask.ATTRIB)):
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
        handle = self.file(fh)
        with self._own(*self._about(handle.inode, Mask.ACCESS)):
            return sum(_by_parts(os.preadv, handle.fd, views, offset))

    def write_from(
        self, who: Caller, fh: int, views: list[memoryview], offset: int, *, kill: bool
    ) -> int:
        """WRITE from buffers; ``kill`` suid and sgid bits. Returns the number of bytes."""
        idle = self.handle(fh)
        if isinstance(idle, IdleHandle):
            self._replay_data(idle, Mask.MODIFY)
            return sum(map(len, views))
        self._refuse_replayer(who, "write")
        handle = self.file(fh)
        with (
            self._own(*self._about(handle.inode, Mask.MODIFY | Mask.ATTRIB)),
            host.killing_suid() if kill else nullcontext(),
        ):
            return sum(_by_parts(os.pwritev, handle.fd, views, offset))

    def fallocate(self, who: Caller, fh: int, mode: int, offset: int, length: int) -> None:
        """FALLOCATE."""
        handle = self._changing(who, fh, "fallocate")
        with self._own(*self._about(handle.inode, Mask.MODIFY | Mask.ATTRIB)), _as_user(who):
            host.fallocate(handle.fd, mode, offset, length)

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
        read, written = self._about(source.inode, Mask.ACCESS), Mask.MODIFY | Mask.ATTRIB
        with self._own(*read, *self._about(target.inode, written)), _as_user(who):
            size = min(size, COPY_LIMIT)
            return os.copy_file_range(source.fd, target.fd, size, offset, offset_out)

    def _changing(self, who: Caller, fh: int, what: str) -> Handle:
        self._refuse_replayer(who, what)
        return self.file(fh)

    def ioctl(self, who: Caller, fh: int, command: int, data: bytes) -> bytes:
        """IOCTL. Raises OSError ENOTTY for all but host.IOCTLS."""
        size = host.IOCTLS.get(command)
        handle = self.handle(fh)
        if size is None or isinstance(handle, HiddenHandle):
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        handle = self._changing(who, fh, "ioctl")
        with self._own(*self._about(handle.inode, Mask.ATTRIB)):
            return self._fs.ioctl(handle, who, command, data[:size].ljust(size, b"\0"))

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
        self.locks.set(self.file(fh), owner, lock)

    def flock(self, who: Caller, fh: int, kind: int) -> None:
        """SETLK with LK_FLOCK. Raises BlockingIOError where a lock is in the way."""
        self._refuse_replayer(who, "flock")
        self.locks.flock(self.file(fh), kind)

    def unlock(self, fh: int) -> None:
        """RELEASE of a file that flock(2) was used on."""
        handle = self._handles.get(fh)
        if isinstance(handle, Handle):
            self.locks.flock(handle, fcntl.F_UNLCK)

    def flush(self, fh: int, owner: int) -> None:
        """FLUSH: a process closes the file, which takes the locks that it has on it."""
        handle = self.handle(fh)
        if isinstance(handle, Handle):
            self.locks.drop(handle.inode, owner)

    def release(self, fh: int) -> None:
        """RELEASE, RELEASEDIR."""
        handle = self._handles.pop(fh, None)
        if isinstance(handle, Handle):
            self.locks.released(handle)
            reading = handle.flags & os.O_ACCMODE == os.O_RDONLY
            closing = Mask.CLOSE_NOWRITE if reading else Mask.CLOSE_WRITE
            with self._own(*self._about(handle.inode, closing)):
                self._fs.release(handle)
        elif isinstance(handle, HiddenHandle):
            self.hidden.release(handle)


def _opening(flags: int) -> Mask:
    """The events of an open."""
    return Mask.OPEN | (Mask.MODIFY if flags & os.O_TRUNC else Mask(0))


def _as_user(who: Caller) -> AbstractContextManager[None]:
    """Changing a file's data clears its suid and sgid bits unless the caller is root."""
    return host.killing_suid() if who.uid else nullcontext()


_IOV_MAX = 1024


def _by_parts(
    move: Callable[[int, list[memoryview], int], int], fd: int, views: list[memoryview], offset: int
) -> Iterator[int]:
    """preadv(2) or pwritev(2), as often as their limit of buffers asks."""
    for start in range(0, len(views), _IOV_MAX):
        some = views[start : start + _IOV_MAX]
        moved = move(fd, some, offset)
        yield moved
        offset += moved
        if moved < sum(map(len, some)):
            return
