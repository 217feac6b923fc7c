"""How an object of the export is opened on the host, and proven to be the right one.

Identity includes the mount: an object on another mount is reached by its path, through that mount.

No descriptor is kept for an object: it would delay the host's own IN_DELETE_SELF, and keep the host
from unmounting what a guest has looked at. If handles cannot be opened (an ordinary user, a file
system without export), directories of the share's own mount only are pinned by an O_PATH
descriptor, and files are reached through their directory, verified.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..linux import syscalls
from ..linux.mounts import Mounts
from ..pacing import windows
from .inode import ROOT_ID, Identity, Inode
from .othernames import OtherNames

_MOVES = 3
"""Attempts to find an object that the host keeps moving."""
WALKED_LEVELS = 2048
"""Names of a path that are walked at each use of a directory if something is mounted below the
share: as many as fit into PATH_MAX. A use costs about 1 ms then; deeper ones get ENAMETOOLONG."""
_CANNOT_OPEN_HANDLES = (
    errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESTALE,
)  # fmt: skip
"""Errors of open_by_handle_at(2) for the root: this user may not, or this file system or kernel
cannot."""

_NO_SUCH_PATH = (errno.ENOTDIR, errno.ELOOP, errno.EXDEV)
"""Errors of openat2(2) if something else, or a mount, is on a known path."""


class _Opened:
    """A descriptor within a with block; closed at its end, unless it is the one ``kept``. No
    generator: each request uses several.
    """

    __slots__ = ("_fd", "_kept")

    def __init__(self, fd: int, kept: int = -1) -> None:
        self._fd = fd
        self._kept = kept

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_error: object) -> None:
        if self._fd != self._kept:
            os.close(self._fd)


class Reach:
    """Opens the objects of one directory tree. Owns the root's descriptor and the mount table.
    Raises OSError.
    """

    def __init__(
        self,
        root: str,
        other_names: OtherNames,
        on_found: Callable[[Inode, Inode, bytes], None],
    ) -> None:
        """``on_found`` is called with an object, and the directory and name where it is."""
        self._other_names = other_names
        self._on_found = on_found
        self.visibly_read: set[Inode] = set()
        """Watched directories whose reading would be reported to a guest."""
        self.root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.by_handle = True
        try:
            handle = syscalls.file_handle(self.root_fd)
            os.close(syscalls.open_by_handle(self.root_fd, handle, os.O_PATH))
        except OSError as error:
            if error.errno not in _CANNOT_OPEN_HANDLES:
                os.close(self.root_fd)
                raise
            self.by_handle = False
        self.mounts = Mounts(self.root_fd)
        self._mounts_changed, self._own = self.mounts.poll, self.mounts.own  # used all the time

    def close(self) -> None:
        """Close the descriptors."""
        self.mounts.close()
        if self.root_fd >= 0:
            fd, self.root_fd = self.root_fd, -1
            os.close(fd)

    # Which object it is

    def identify(self, fd: int) -> tuple[Identity, os.stat_result]:
        """Identity and attributes of the object behind a descriptor."""
        status = os.fstat(fd)
        try:
            handle, mount = syscalls.handle_and_mount(fd)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # without its handle it would be another object
                raise
            handle, mount = b"", self._mount_of(fd)
        return Identity(status.st_dev, status.st_ino, handle, mount), status

    def _mount_of(self, fd: int) -> int:
        return syscalls.mount_id(fd) if self.mounts.below else self.mounts.own

    def identity_of(self, dir_fd: int, name: bytes) -> Identity:
        """Identity of the object of that name. Raises OSError."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            return self.identify(fd)[0]
        finally:
            os.close(fd)

    def handle_opens(self, identity: Identity) -> bool:
        """Whether an object can be opened by its handle."""
        return self.by_handle and identity.mount == self._own and bool(identity.handle)

    def is_own(self, identity: Identity) -> bool:
        """Whether an object is on the share's own mount."""
        return identity.mount == self._own

    def must_pin(self, identity: Identity) -> bool:
        """Whether a directory can be found again only through a descriptor. On another mount none
        is kept: the host may unmount it.
        """
        return not (self.by_handle and identity.handle) and self.is_own(identity)

    # By its handle, its path or its directory

    def directory(self, inode: Inode) -> _Opened:
        """An O_PATH descriptor of a directory, within the with block."""
        return _Opened(self.open_directory(inode), inode.fd)

    def _check_answers(self, inode: Inode) -> None:
        """Raises OSError EIO for an object on a file system below the share that does not
        answer.
        """
        if self.mounts.remote and inode.identity.mount in self.mounts.remote:
            self.mounts.check(inode.identity.mount)

    def open_directory(self, inode: Inode) -> int:
        """An O_PATH descriptor of a directory: to be closed, unless it is the inode's own ``fd``.

        Raises OSError: ENOTDIR, ENOENT if it is gone, others if it cannot be opened.
        """
        if inode.nodeid == ROOT_ID:
            return inode.fd
        self._check_answers(inode)
        if not inode.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        try:
            if self._mounts_changed(0):
                self.mounts.read()
            if self.mounts.points:
                return self._open_visible(inode)
            return inode.fd if inode.fd >= 0 else self.open_by_handle(inode)
        except OSError as error:
            if not syscalls.is_gone(error):
                raise
            # As in any removed directory: nothing is in it.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    def open(self, inode: Inode) -> int:
        """A new O_PATH descriptor of any object. Raises OSError: ESTALE if it is not found, others
        if it cannot be looked at.

        A file is opened through its last known name, so that later calls on the descriptor are
        reported under that name on the host.
        """
        if inode.is_dir:
            with self.directory(inode) as fd:
                return os.dup(fd)
        self._check_answers(inode)
        if self._is_by_path(inode) and (fd := self._open_by_path(inode)) >= 0:
            return fd
        unseen: OSError | None = None
        for parent, name in self._names(inode):
            try:
                with self.directory(parent) as parent_fd:
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent_fd)
            except OSError as error:
                unseen = None if syscalls.is_gone(error) else error
            else:
                if self._is_or_close(fd, inode):
                    self._on_found(inode, parent, name)
                    return fd
        if inode.open_fds:
            return os.open(syscalls.fd_path(inode.open_fds[-1]), os.O_PATH)
        if unseen is not None and not self.handle_opens(inode.identity):
            raise unseen
        if self.mounts.below:
            return self._open_moved(inode)
        return self._open_by_verified_handle(inode)

    def opened(self, inode: Inode) -> _Opened:
        """``open`` within a with block."""
        return _Opened(self.open(inode))

    @contextmanager
    def opened_by_any_name(self, inode: Inode) -> Iterator[int]:
        """The same if the name does not matter: to set a watch."""
        by_name = inode.is_dir or inode.open_fds or not self.handle_opens(inode.identity)
        if by_name or self.mounts.below:
            fd = self.open(inode)
        else:
            fd = self._open_by_verified_handle(inode)
        try:
            yield fd
        finally:
            os.close(fd)

    def stat_by_name(self, inode: Inode) -> os.stat_result | None:
        """Attributes of a file by its last known name; None if that is another object now, or
        cannot be looked at.
        """
        if self._is_by_path(inode) and (fd := self._open_by_path(inode)) >= 0:
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        device, ino, handle, mount = inode.identity
        if not handle and self.mounts.below:
            return None  # of the same number, on which mount?
        for parent, name in self._names(inode):
            with suppress(OSError), self.directory(parent) as parent_fd:
                if handle and syscalls.handle_and_mount(parent_fd, name) != (handle, mount):
                    continue
                status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
                if (status.st_dev, status.st_ino) == (device, ino):
                    return status
        return None

    def _names(self, inode: Inode) -> Iterator[tuple[Inode, bytes]]:
        """A file's last known name; if there are no handles, then its others."""
        if inode.is_placeholder:
            return
        if inode.parent is not None:
            yield inode.parent, inode.name
        if not self.handle_opens(inode.identity):
            yield from self._other_names.of(inode)

    def open_by_handle(self, inode: Inode) -> int:
        """A new O_PATH descriptor by file handle. Raises OSError ESTALE if that is impossible.

        A directory is opened by its path, if the handle there is the same, unless it was used a
        moment ago and no guest would see the reading: the kernel opens and reads the directories
        above one whose dentries it has dropped, to find its names, and their watchers see it
        (exportfs_get_name in fs/exportfs/expfs.c). If it has moved, the handle is the only way.
        """
        if not self.handle_opens(inode.identity):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        handle = inode.identity.handle
        if not inode.is_dir:  # for which the kernel searches no name
            return syscalls.open_by_handle(self.root_fd, handle, os.O_PATH | os.O_NOFOLLOW)
        now = time.monotonic()
        is_warm, inode.warm_until = now < inode.warm_until, now + windows.WARM
        if (self.visibly_read or not is_warm) and (fd := self._open_by_path(inode)) >= 0:
            return fd
        return syscalls.open_by_handle(self.root_fd, handle, os.O_PATH | os.O_DIRECTORY)

    def _open_by_verified_handle(self, inode: Inode) -> int:
        fd = self.open_by_handle(inode)
        try:
            if os.fstat(fd).st_ino != inode.identity.ino:  # restored from an image that lies
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except OSError:
            os.close(fd)
            raise
        return fd

    def _is_by_path(self, file: Inode) -> bool:
        """Whether a file is best reached by its whole path: one call, as it is verified itself. If
        that fails, its directory may have moved, and leads there.
        """
        return self.handle_opens(file.identity) and not self.mounts.below

    def _open_by_path(self, inode: Inode) -> int:
        """-1 if it is not there, or cannot be looked at: its handle shows which."""
        path = inode.short_path()
        if path is None:
            return -1
        with suppress(OSError):
            return self._open_at(path, inode)
        return -1

    def _open_at(self, path: bytes, inode: Inode) -> int:
        """-1 if the object is not there. Raises OSError if it cannot be looked at."""
        try:
            one_mount = self.is_own(inode.identity)
            fd = syscalls.open_below(self.root_fd, path, one_mount=one_mount)
        except OSError as error:
            if syscalls.is_gone(error) or error.errno in _NO_SUCH_PATH:
                return -1
            raise
        return fd if self._is_or_close(fd, inode) else -1

    def _is_or_close(self, fd: int, inode: Inode) -> bool:
        """Whether a descriptor is the object's; else it is closed. Raises OSError."""
        is_it = False
        try:
            is_it = self._is(fd, inode)
        finally:
            if not is_it:
                os.close(fd)
        return is_it

    def _is(self, fd: int, inode: Inode) -> bool:
        """Whether a descriptor is of the inode's object, on its mount."""
        device, ino, handle, mount = inode.identity
        if handle:
            try:
                is_it = syscalls.handle_and_mount(fd) == (handle, mount)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:  # another object, if there are no handles
                    return False
                raise
            return is_it and os.fstat(fd).st_ino == ino
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (device, ino):
            return False
        return self.identify(fd)[0] == inode.identity

    # If something is mounted below the share

    def _open_visible(self, directory: Inode) -> int:
        """A new O_PATH descriptor of a directory that no other mount masks. Raises OSError."""
        since = directory.warm_until - windows.WARM  # its last use: no mount has masked it since
        if self.handle_opens(directory.identity) and since > self.mounts.changed_at:
            return self.open_by_handle(directory)
        path = directory.short_path(WALKED_LEVELS)
        if path is None:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        fd = self._open_at(path, directory)
        if fd < 0:
            fd = self._open_moved(directory)
        directory.warm_until = time.monotonic() + windows.WARM
        return fd

    def _open_moved(self, inode: Inode) -> int:
        """The same for any object, wherever the host has moved it. Raises OSError ESTALE."""
        for _ in range(_MOVES):  # it may be moved between the two steps
            fd = self._open_wherever(inode)
            try:
                if (found := self._open_where(fd, inode)) >= 0:
                    return found
            finally:
                os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _open_wherever(self, inode: Inode) -> int:
        """Also if it is masked, or not in the share: through an open file of it, or by its handle.

        Not by a handle on another mount: that takes an open file there (open_by_handle_at(2)),
        whose opening its watchers would see.
        """
        if inode.fd >= 0 or inode.open_fds:
            return os.dup(inode.fd if inode.fd >= 0 else inode.open_fds[-1])
        if not self.handle_opens(inode.identity):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return syscalls.open_by_handle(
            self.root_fd, inode.identity.handle, os.O_PATH | os.O_NOFOLLOW
        )

    def _open_where(self, fd: int, inode: Inode) -> int:
        """The object at the path that the kernel has for a descriptor; -1 if that is another, or
        not in the share.
        """
        path = self.path_of(fd)
        return -1 if path is None else self._open_at(path, inode)

    def path_of(self, fd: int) -> bytes | None:
        """The path below the root that the kernel has for an open object."""
        top = syscalls.shown_path(self.root_fd).rstrip(b"/") + b"/"
        path = syscalls.shown_path(fd)
        return path[len(top) :] if path.startswith(top) else None
