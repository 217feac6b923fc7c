"""The passthrough file system: FUSE operations on the host directory. Knows nothing of events.

Synchronous; returns plain values; raises OSError with the errno for the guest. Every path is one
name below a directory descriptor, so no symlink and no race leads out of the export.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

from ..linux import credentials, directories, syscalls
from ..linux.directories import DirEntry
from . import fileflags
from .attributes import StatLike
from .caller import Caller
from .changes import Change, Changes
from .handle import DROPPED_FLAGS, Handle, OpenFile, check_regular
from .inode import Inode
from .recall import verify_place
from .successors import Successors
from .table import InodeTable


class Entry(NamedTuple):
    """The result of a look-up or a creation; the guest's kernel then holds a reference."""

    inode: Inode
    attr: StatLike


Keep = Callable[[int, bytes], None]
"""Called before a name is removed, with a descriptor of its directory."""


class PassthroughFS:
    """Operations on one export's host directory."""

    def __init__(self, table: InodeTable) -> None:
        self.table = table
        self.successors = Successors(table)
        self.on_unlinked: list[Callable[[Inode], None]] = []
        """Called with open files that have lost their last name, as far as is known."""

    # Names

    @staticmethod
    def _check_name(name: bytes) -> None:
        if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def peek(self, parent: Inode, name: bytes, *, is_guest: bool = False) -> Entry:
        """The entry of a name, without a reference for the guest's kernel."""
        if name == b".":
            return Entry(parent, self.getattr(parent))
        if name == b"..":
            above = parent
            if parent is not self.table.root:
                verify_place(self.table, parent)
                above = parent.parent or self.table.root
            if above is self.table.outside:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return Entry(above, self.getattr(above))
        self._check_name(name)
        dir_fd = self.table.reach.open_directory(parent)
        try:
            return self.peek_at(dir_fd, parent, name, is_guest=is_guest)
        finally:
            if dir_fd != parent.fd:
                os.close(dir_fd)

    def peek_at(self, dir_fd: int, parent: Inode, name: bytes, *, is_guest: bool = False) -> Entry:
        """The entry of a name in an open directory."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            entry = Entry(*self.table.intern(fd, parent, name))
            if is_guest and self.successors.wanted:
                self.successors.looked_up(parent, name, entry.inode, fd)
            return entry
        finally:
            os.close(fd)

    def lookup(self, parent: Inode, name: bytes) -> Entry:
        """LOOKUP."""
        return self.referenced(self.peek(parent, name, is_guest=True))

    @staticmethod
    def referenced(entry: Entry) -> Entry:
        """The entry, counted as given to the guest's kernel."""
        entry.inode.lookups += 1
        return entry

    @contextmanager
    def _creating(self, parent: Inode, name: bytes, who: Caller) -> Iterator[int]:
        self._check_name(name)
        with self.table.reach.directory(parent) as dir_fd, self._acting_as(who):
            yield dir_fd

    @staticmethod
    def _acting_as(who: Caller, *, judged: bool = True) -> AbstractContextManager[None]:
        groups: Sequence[int] = who.groups or ()
        if who.groups is None and (who.uid or who.gid):
            groups = credentials.supplementary_groups(who.pid)
        judged = judged and who.groups is not None
        return credentials.acting_as(who.uid, who.gid, groups, umask=who.umask, judged=judged)

    @staticmethod
    def _mode(mode: int, who: Caller) -> int:
        """The mode of a new file: a file made by another user must not run as the server's user."""
        return mode & ~0o6000 if credentials.takes_for_itself(who.uid) else mode

    def mknod(self, parent: Inode, name: bytes, mode: int, rdev: int, who: Caller) -> Entry:
        """MKNOD. Only root may make device nodes, as natively; a guest's kernel opens its own
        devices by them.
        """
        is_device = stat.S_IFMT(mode) in (stat.S_IFCHR, stat.S_IFBLK)
        making = credentials.making_nodes() if is_device and not who.uid else nullcontext()
        with self._creating(parent, name, who) as dir_fd, making:
            os.mknod(name, self._mode(mode, who), rdev, dir_fd=dir_fd)
        return self._made(parent, name, stat.S_IFMT(mode) or stat.S_IFREG)

    def mkdir(self, parent: Inode, name: bytes, mode: int, who: Caller) -> Entry:
        """MKDIR."""
        with self._creating(parent, name, who) as dir_fd:
            os.mkdir(name, mode, dir_fd=dir_fd)
        return self._made(parent, name, stat.S_IFDIR)

    def symlink(self, parent: Inode, name: bytes, target: bytes, who: Caller) -> Entry:
        """SYMLINK."""
        with self._creating(parent, name, who) as dir_fd:
            os.symlink(target, name, dir_fd=dir_fd)
        return self._made(parent, name, stat.S_IFLNK)

    def _made(self, parent: Inode, name: bytes, kind: int) -> Entry:
        """The object just made under the name. Raises FileNotFoundError if it is gone, and also if
        an object of another kind is there: kernels would take that for a broken server (EIO).
        """
        entry = self.peek(parent, name, is_guest=True)
        if entry.inode.kind != kind:
            self.table.release(entry.inode)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self.referenced(entry)

    def create(
        self, parent: Inode, name: bytes, mode: int, flags: int, who: Caller, open_file: OpenFile
    ) -> tuple[Entry, Handle]:
        """CREATE: make (or open) a regular file."""
        exclusive = flags & os.O_EXCL
        flags = flags & ~DROPPED_FLAGS | os.O_CLOEXEC
        try:
            with self._creating(parent, name, who) as dir_fd:
                new = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                fd = os.open(name, new, self._mode(mode, who), dir_fd=dir_fd)
        except FileExistsError:  # another party made it since the guest looked
            if exclusive:
                raise
            fd = self._open_existing(parent, name, flags, who, open_file)
        try:
            entry = self.referenced(Entry(*self.table.intern(fd, parent, name)))
        except BaseException:
            os.close(fd)
            raise
        return entry, self._handle(entry.inode, fd, flags)

    def tmpfile(self, parent: Inode, mode: int, flags: int, who: Caller) -> tuple[Entry, Handle]:
        """TMPFILE: a regular file without a name."""
        flags = flags & ~DROPPED_FLAGS | flags & os.O_EXCL | os.O_TMPFILE | os.O_CLOEXEC
        with self.table.reach.directory(parent) as dir_fd, self._acting_as(who):
            fd = os.open(".", flags, self._mode(mode, who), dir_fd=dir_fd)
        try:
            entry = self.referenced(Entry(*self.table.intern_nameless(fd, parent)))
        except BaseException:
            os.close(fd)
            raise
        return entry, self._handle(entry.inode, fd, flags)

    def _open_existing(
        self, parent: Inode, name: bytes, flags: int, who: Caller, open_file: OpenFile
    ) -> int:
        """Open a file that a CREATE has found. No guest's kernel has checked permissions."""
        with self.table.reach.directory(parent) as dir_fd:
            path_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            check_regular(stat.S_IFMT(os.fstat(path_fd).st_mode))
            return open_file(path_fd, flags, partial(self._acting_as, who, judged=False))
        finally:
            os.close(path_fd)

    def link(self, inode: Inode, parent: Inode, name: bytes) -> Entry:
        """LINK."""
        self._check_name(name)
        with self.successors.used(inode) as fd, self.table.reach.directory(parent) as dir_fd:
            os.link(syscalls.fd_path(fd), name, dst_dir_fd=dir_fd, follow_symlinks=True)
        return self._made(parent, name, inode.kind)

    def unlink(self, parent: Inode, name: bytes, who: Caller, keep: Keep) -> None:
        """UNLINK."""
        self._check_name(name)
        with self.table.reach.directory(parent) as dir_fd, self._removing(who, dir_fd):
            keep(dir_fd, name)
            os.unlink(name, dir_fd=dir_fd)
        self._gone(parent, name)

    def rmdir(self, parent: Inode, name: bytes, who: Caller, _keep: Keep) -> None:
        """RMDIR."""
        self._check_name(name)
        with self.table.reach.directory(parent) as dir_fd, self._removing(who, dir_fd):
            os.rmdir(name, dir_fd=dir_fd)
        self._gone(parent, name)

    def _removing(self, who: Caller, *dir_fds: int) -> AbstractContextManager[None]:
        """As the caller if a directory is sticky: the guest's kernel has checked the owner of the
        file that it knows by the name, and the name may stand for another user's now.
        """
        if who.uid and any(os.fstat(fd).st_mode & stat.S_ISVTX for fd in dir_fds):
            return self._acting_as(who)
        return nullcontext()

    def _gone(self, parent: Inode, name: bytes) -> None:
        inode = parent.children.pop(name, None)
        if inode is not None:
            self._unlinked(inode)

    def _unlinked(self, inode: Inode) -> None:
        """It has one name less."""
        if inode.nlink:
            inode.nlink -= 1
        if not inode.nlink and inode.open_fds:
            for report in self.on_unlinked:
                report(inode)

    def rename(
        self,
        old: Inode,
        name: bytes,
        new: Inode,
        new_name: bytes,
        flags: int,
        who: Caller,
        keep: Keep,
    ) -> None:
        """RENAME, RENAME2."""
        self._check_name(name)
        self._check_name(new_name)
        directory = self.table.reach.directory
        with (
            directory(old) as old_fd,
            directory(new) as new_fd,
            self._removing(who, old_fd, new_fd),
        ):
            if old is not new and who.uid:
                self._check_movable(old_fd, name, who)
                if flags & syscalls.RENAME_EXCHANGE:
                    self._check_movable(new_fd, new_name, who)
            keep(new_fd, new_name)
            syscalls.renameat2(old_fd, name, new_fd, new_name, flags)
        moved = old.children.get(name)
        other = new.children.get(new_name)
        if moved is other and moved is not None:
            return
        if moved is not None:
            self.table.place(moved, new, new_name)
            self.table.displace(old, name, moved)
        else:
            new.children.pop(new_name, None)
        if flags & syscalls.RENAME_EXCHANGE and other is not None:
            self.table.place(other, old, name)
        elif other is not None:
            self._unlinked(other)

    @staticmethod
    def _check_movable(dir_fd: int, name: bytes, who: Caller) -> None:
        """Raises PermissionError for a directory that the caller cannot write, whatever its groups:
        it cannot move elsewhere (vfs_rename in fs/namei.c). The guest's kernel has checked the
        object that it knows by the name.
        """
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        writable = status.st_uid == who.uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(status.st_mode) and not writable:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def readlink(self, inode: Inode) -> bytes:
        """READLINK."""
        with self.successors.used(inode) as fd:
            return os.readlink(b"", dir_fd=fd)

    # Attributes

    def getattr(self, inode: Inode) -> os.stat_result:
        """GETATTR; of an unlinked file through one of its open handles."""
        if inode.open_fds:
            return os.fstat(inode.open_fds[-1])
        if inode.is_dir:
            with self.table.reach.directory(inode) as fd:
                return os.fstat(fd)
        status = self.table.reach.stat_by_name(inode)
        if status is not None:
            return status
        with self.table.reach.opened(inode) as fd:
            return os.fstat(fd)

    def getattr_by_path(self, inode: Inode) -> os.stat_result:
        """GETATTR on the way to open a path. Raises OSError ESTALE like ``Successors.used``."""
        try:
            return self.getattr(inode)
        except OSError as error:
            if inode.is_dir or error.errno != errno.ESTALE:
                raise
            raise self.successors.lost(inode) from None

    def setattr(
        self,
        inode: Inode,
        changes: Changes,
        handle: Handle | None,
        run: Callable[[Change, int, bool], os.stat_result],
    ) -> os.stat_result:
        """SETATTR, in the order chown, mode, size, times: each undoes side effects of the previous
        ones. ``run`` carries it out, given the descriptor, and whether that is the caller's open
        file.
        """
        if handle is not None and handle.fd >= 0 and handle.inode is inode:
            return run(partial(changes.apply, is_open=True), handle.fd, True)
        change = partial(changes.apply, is_open=False)
        if inode.open_fds and not inode.is_dir:
            return run(change, inode.open_fds[-1], False)
        with self.successors.used(inode) as fd:
            return run(change, fd, False)

    def born_ns(self, inode: Inode) -> int:
        """Time of creation; 0 if the file system has none."""
        with self.successors.used(inode) as fd:
            return syscalls.born_ns(fd, b"")

    def getxattr(self, inode: Inode, name: bytes) -> bytes:
        """GETXATTR."""
        with self.successors.used(inode) as fd:
            return os.getxattr(syscalls.fd_path(fd), name)

    def listxattr(self, inode: Inode) -> list[bytes]:
        """LISTXATTR."""
        with self.successors.used(inode) as fd:
            return [os.fsencode(name) for name in os.listxattr(syscalls.fd_path(fd))]

    def setxattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        """SETXATTR."""
        with self.successors.used(inode) as fd:
            os.setxattr(syscalls.fd_path(fd), name, value, flags)

    def removexattr(self, inode: Inode, name: bytes) -> None:
        """REMOVEXATTR."""
        with self.successors.used(inode) as fd:
            os.removexattr(syscalls.fd_path(fd), name)

    def access(self, inode: Inode, mode: int) -> bool:
        """ACCESS, as the server's own user."""
        with self.successors.used(inode) as fd:
            return os.access(syscalls.fd_path(fd), mode)

    def statfs(self, inode: Inode) -> os.statvfs_result:
        """STATFS of the file system that an object is on."""
        if self.table.reach.is_own(inode.identity):
            return os.fstatvfs(self.table.reach.root_fd)
        with self.table.reach.opened(inode) as fd:
            return os.fstatvfs(fd)

    # Files

    def _handle(self, inode: Inode, fd: int, flags: int) -> Handle:
        inode.open_fds.append(fd)
        self.table.pin(inode)
        return Handle(inode, fd, flags, appends=bool(flags & os.O_APPEND))

    def open(self, inode: Inode, flags: int, open_file: OpenFile) -> Handle:
        """OPEN of a regular file."""
        check_regular(inode.kind)
        with self.successors.used(inode, to_open=True) as path_fd:
            check_regular(stat.S_IFMT(os.fstat(path_fd).st_mode))
            fd = open_file(path_fd, flags & ~DROPPED_FLAGS | os.O_CLOEXEC)
        self.successors.opened(inode)
        return self._handle(inode, fd, flags)

    def reopen(self, inode: Inode, flags: int) -> Handle:
        """Open the very object again, for a handle that another process had. Raises OSError."""
        check_regular(inode.kind)
        with self.table.reach.opened(inode) as path_fd:
            fd = os.open(syscalls.fd_path(path_fd), flags | os.O_CLOEXEC)
        return self._handle(inode, fd, flags)

    def resume(self, inode: Inode | None, fd: int, flags: int) -> Handle:
        """A file or directory that is open; None if it is not known which. Takes ``fd``."""
        if inode is None:
            inode, _ = self.table.intern_nameless(fd, self.table.root)
        handle = self._handle(inode, fd, flags)
        handle.position = -1
        handle.appends = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)
        return handle

    def opendir(self, inode: Inode) -> Handle:
        """OPENDIR."""
        with self.table.reach.directory(inode) as path_fd:
            fd = os.open(syscalls.fd_path(path_fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._handle(inode, fd, os.O_RDONLY)

    def ioctl(self, handle: Handle, who: Caller, command: int, data: bytes) -> bytes:
        """IOCTL, one of fsd.linux.ioctls.FILES, with the caller's permission to change flags."""
        fileflags.check(handle.fd, command, data)
        with self._acting_as(who, judged=False):
            return fcntl.ioctl(handle.fd, command, data)

    @staticmethod
    def read_directory(handle: Handle, position: int, size: int) -> list[DirEntry]:
        """READDIR: entries from a position on, about ``size`` bytes of them; [] at the end."""
        if position != handle.position:
            handle.position = -1
            directories.seek(handle.fd, position)
        entries = directories.read(handle.fd, size)
        handle.position = entries[-1].next if entries else position
        return entries

    def release(self, handle: Handle) -> None:
        """RELEASE, RELEASEDIR. Closes the descriptor once."""
        if handle.fd >= 0:
            os.close(self.detach(handle))

    def detach(self, handle: Handle) -> int:
        """The same without closing: returns the descriptor to close, which stays open."""
        fd, handle.fd = handle.fd, -1
        handle.inode.open_fds.remove(fd)
        self.table.unpin(handle.inode)
        return fd
