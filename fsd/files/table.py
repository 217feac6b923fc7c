"""The inode table: which host object a (nodeid, generation) stands for, and how to reach it.

Identity is the host's file handle where there is one, so a reused inode number is a new node.
nodeid is the host's st_ino wherever that is free, so that the guest's st_ino is the host's.

Identity includes the mount: what lies on another one is reached by its path, through that mount.

No descriptor is kept for an object: a held one would delay the host's own IN_DELETE_SELF, and keep
the host from unmounting what a guest has looked at. Where handles cannot be opened (an ordinary
user, a file system without export), directories of the share's own mount alone are pinned by an
O_PATH descriptor, and files are reached through their directory, verified.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from protocol.frames import FSD_DIR, FSD_NAME, STAGING
from protocol.handles import NodeKey

from ..linux import syscalls
from ..linux.mounts import Mounts
from ..pacing import windows
from .forgotten import Forgotten, ForgottenObjects
from .inode import ROOT_ID, Identity, Inode, is_below
from .othernames import OtherNames

_MOVES = 3
"""Tries to find an object that the host may move all the while."""
WALKED_LEVELS = 2048
"""The same where each use of a directory must walk its path, as something is mounted below the
share: as many as fit into PATH_MAX. A use costs some 1 ms then; what is deeper is ENAMETOOLONG."""
RECALL_SEARCHES = 16
"""Directories above a forgotten node that are searched for by their handles, as each may
take a walk of PATH_MAX; all others are where they were, or the node counts as gone."""
_SYNTHETIC = 1 << 62
"""First nodeid for what cannot have its st_ino: above the inode numbers of real file systems."""

_CANNOT_OPEN_HANDLES = (
    errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESTALE,
)  # fmt: skip
"""Of open_by_handle_at(2) for the root: this user may not, or this file system or kernel cannot."""

_NO_SUCH_PATH = (errno.ENOTDIR, errno.ELOOP, errno.EXDEV)
"""Of openat2(2), where something else, or a mount, is on a path that was known."""


def _hidden_directory(nodeid: int, name: bytes) -> Inode:
    inode = Inode(nodeid, 1, Identity(-2, nodeid, b"", 0), stat.S_IFDIR)
    inode.name = name
    return inode


def _matches(found: Identity, known: Identity) -> bool:
    """Whether an object is that one, whose mount may have had another number before a restart."""
    return found.is_object_of(known) and known.mount in (0, found.mount)


class LookupCountError(AssertionError):
    """A guest forgot more than it had looked up: a bug of ours, loud in tests."""


class InodeTable:
    """All inodes of one export. Raises OSError(ESTALE) for nodeids that it does not hold."""

    def __init__(self, root: str) -> None:
        self.root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._next_synthetic = _SYNTHETIC
        self.moves = 0  # of directories: paths made before are out of date
        self.on_moved: list[Callable[[Inode], None]] = []
        """Told of each object that has another place than it had."""
        self.overheard: set[Inode] = set()
        """Watched directories of which somebody hears that they are read."""
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
        identity, status = self.identify(self.root_fd)
        self.root = Inode(ROOT_ID, 0, identity, stat.S_IFDIR)
        self.root.fd = self.root_fd
        self.root.number = status.st_ino
        self.root.nlink = status.st_nlink
        self.root.pins = 1
        # Where directories are that went out of sight: moved to where nobody watches.
        self.outside = _hidden_directory(STAGING, b"staging")
        self.outside.parent = _hidden_directory(FSD_DIR, FSD_NAME)
        self.outside.parent.parent = self.root
        self._by_node = {ROOT_ID: self.root}
        self._by_identity = {identity: self.root}
        self.forgotten = ForgottenObjects()
        self._other_names = OtherNames()

    def close(self) -> None:
        """Close every descriptor."""
        self.mounts.close()
        for inode in self._by_node.values():
            if inode.fd >= 0:
                fd, inode.fd = inode.fd, -1
                os.close(fd)

    def __len__(self) -> int:
        return len(self._by_node)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_node.values())

    def get(self, nodeid: int) -> Inode:
        """The inode of a request's nodeid."""
        try:
            return self._by_node[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, f"unknown nodeid {nodeid}") from None

    def known(self, nodeid: int) -> Inode | None:
        """The inode of a nodeid, if there is one."""
        return self._by_node.get(nodeid)

    def recall(self, nodeid: int) -> Inode:
        """The inode of a file handle that a guest took: also one that it has forgotten since, if it
        is found again in the export. Raises OSError ESTALE.

        It may have no reference yet; the caller gives it one.
        """
        missing: dict[int, None] = {}  # the object, the directory that it is in, and so on upwards
        while nodeid not in self._by_node and nodeid not in missing:
            missing[nodeid] = None
            nodeid = self.forgotten.get(nodeid).parent
        found: list[Inode] = []
        is_there, searches = False, RECALL_SEARCHES
        try:
            while missing and searches:
                nodeid, _ = missing.popitem()
                record = self.forgotten.get(nodeid)
                again = self._by_its_name(record)
                if again is None:
                    searches -= 1
                    again = self._by_its_handle(record)
                found += [again] if again is not None else []
            inode = None if missing else self._by_node.get(nodeid)
            is_there = inode is not None and (inode is self.root or self.verify_place(inode))
            if inode is not None and is_there:
                return inode
        finally:
            if not is_there:
                for again in reversed(found):
                    self.release(again)
        raise OSError(errno.ESTALE, f"nodeid {nodeid} is not in the export any more")

    def _by_its_name(self, record: Forgotten) -> Inode | None:
        """The very object, where it was; None where it is not there any more."""
        parent = self._by_node.get(record.parent)
        with syscalls.skipping_gone:
            if parent is not None and parent.is_dir:
                with self.directory(parent) as dir_fd:
                    if _matches(self._identity_of(dir_fd, record.name), record.identity):
                        return self._step(dir_fd, parent, record.name)
        return None

    def _by_its_handle(self, record: Forgotten) -> Inode | None:
        """The very object, wherever it is; None where it is gone."""
        with syscalls.skipping_gone:
            if self.handle_opens(record.identity):
                handle = record.identity.handle
                fd = syscalls.open_by_handle(self.root_fd, handle, os.O_PATH | os.O_NOFOLLOW)
                try:
                    return self._at_path(fd)
                finally:
                    os.close(fd)
        return None

    def _identity_of(self, dir_fd: int, name: bytes) -> Identity:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            return self.identify(fd)[0]
        finally:
            os.close(fd)

    def find(self, key: NodeKey) -> Inode:
        """The inode of (nodeid, generation)."""
        inode = self.get(key.nodeid)
        if inode.generation != key.generation:
            raise OSError(errno.ESTALE, f"nodeid {key.nodeid} is of generation {inode.generation}")
        return inode

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

    def intern(self, fd: int, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """The inode behind an O_PATH descriptor that was opened as parent/name."""
        identity, status = self.identify(fd)
        inode = self._by_identity.get(identity)
        if inode is None:
            inode = self._new(identity, stat.S_IFMT(status.st_mode))
        if inode.fd < 0 and inode.is_dir and self.must_pin(identity):
            try:
                inode.fd = os.open(syscalls.fd_path(fd), os.O_PATH | os.O_DIRECTORY)
            except OSError:
                self.release(inode)
                raise
        inode.nlink = status.st_nlink
        self.place(inode, parent, name)
        return inode, status

    def intern_nameless(self, fd: int, directory: Inode) -> tuple[Inode, os.stat_result]:
        """The inode of a file that was opened in a directory with O_TMPFILE. Its events go by the
        name that the kernel shows for it.
        """
        identity, status = self.identify(fd)
        inode = self._new(identity, stat.S_IFMT(status.st_mode))
        inode.nlink = status.st_nlink
        inode.parent, inode.name = directory, b"#%d" % status.st_ino
        return inode, status

    def place(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Note that the inode is now known as parent/name."""
        if inode is self.root:
            return
        if inode.parent is parent and inode.name == name and parent.children.get(name) is inode:
            return
        if inode.is_dir and is_below(parent, inode):
            self.lose(parent)  # what was known of it is out of date
        old = inode.parent
        moved = old is not None and (old is not parent or inode.name != name)
        # A hard link keeps its other names; a directory or a single link has just this one.
        if old is not None and moved and (inode.nlink < 2 or inode.is_dir):
            self.displace(old, inode.name, inode)
        elif old is not None and moved and old.children.get(inode.name) is inode:
            self._other_names.add(inode, old, inode.name)
        if inode.is_dir and moved:
            self.moves += 1
        other = parent.children.get(name)
        if other is not None and other is not inode and other.is_dir:
            self.lose(other)
        inode.parent, inode.name = parent, name
        parent.children[name] = inode
        if moved:
            for tell in self.on_moved:
                tell(inode)

    def lose(self, directory: Inode) -> None:
        """Note that a directory is no longer where it was, and not known where it is."""
        self.place(directory, self.outside, b"%d" % directory.nodeid)

    @staticmethod
    def displace(parent: Inode, name: bytes, inode: Inode) -> None:
        """Note that parent/name is no longer the inode."""
        if parent.children.get(name) is inode:
            del parent.children[name]

    def placeholder(self, kind: int, parent: Inode | None, name: bytes) -> Inode:
        """An inode for an object that is gone already; it is no one else's identity."""
        nodeid = self._synthetic()
        inode = Inode(nodeid, 1, Identity(-1, nodeid, b"", 0), kind)
        inode.parent, inode.name = parent, name
        return self.revive(inode)

    def revive(self, inode: Inode) -> Inode:
        """The inode, back in the table if it was forgotten; a placeholder if its nodeid is taken.

        The caller gives it a reference (lookups or pins), else it stays until close.
        """
        held = self._by_node.get(inode.nodeid)
        if held is inode:
            return inode
        known = self._by_identity.get(inode.identity)
        if known is not None:
            return known
        if held is not None:
            return self.placeholder(inode.kind, inode.parent, inode.name)
        self._by_node[inode.nodeid] = inode
        self._by_identity[inode.identity] = inode
        return inode

    def holds(self, inode: Inode) -> bool:
        """Whether it is in the table, and not forgotten."""
        return self._by_node.get(inode.nodeid) is inode

    def current(self, inode: Inode) -> Inode:
        """The table's own object for the same host object, if it holds one."""
        return self._by_identity.get(inode.identity, inode)

    def _synthetic(self) -> int:
        self._next_synthetic += 1
        return self._next_synthetic - 1

    def handle_opens(self, identity: Identity) -> bool:
        """Whether an object can be opened by its handle."""
        return self.by_handle and identity.mount == self._own and bool(identity.handle)

    def numbering(self, directory: Inode) -> Callable[[bytes, int], int] | None:
        """What makes unique numbers of those in the host's listing of a directory, each with its
        name; None where they are.
        """
        device, _, _, mount = directory.identity
        if self.mounts.is_own(mount, device) and not self.mounts.below:
            return None
        path = directory.path()

        def number(name: bytes, ino: int) -> int:
            point = self.mounts.point(path + b"/" + name if path else name)
            if point and point not in self.mounts.remote:
                with suppress(OSError), self.directory(directory) as dir_fd:
                    there, ino, _, above = self._identity_of(dir_fd, name)
                    return self.mounts.number(above, there, ino) or ino
            return self.mounts.number(mount, device, ino) or ino

        return number

    def is_own(self, identity: Identity) -> bool:
        """Whether an object is on the share's own mount."""
        return identity.mount == self._own

    def must_pin(self, identity: Identity) -> bool:
        """Whether a directory can be found again by a descriptor only. On another mount none is
        kept: the host may unmount it.
        """
        return not (self.by_handle and identity.handle) and self.is_own(identity)

    def _new(self, identity: Identity, kind: int) -> Inode:
        device, ino, handle, mount = identity
        nodeid = number = self.mounts.number(mount, device, ino)
        if (old := self._by_node.get(nodeid)) is not None:
            self.release(old)
        if not ROOT_ID < nodeid < _SYNTHETIC or nodeid in self._by_node:
            # Also where the host reused the number: a guest's requests name only the nodeid, so the
            # old object keeps it for as long as anybody refers to it.
            had = self.forgotten.nodeid_of(identity)
            nodeid = had if had >= _SYNTHETIC else self._synthetic()
        self.forgotten.drop(nodeid)
        inode = Inode(nodeid, zlib.crc32(handle) or 1, identity, kind)
        inode.number = number or nodeid
        self._by_node[nodeid] = inode
        self._by_identity[identity] = inode
        return inode

    def adopt(self, nodeid: int, generation: int, identity: Identity, kind: int) -> Inode:
        """An inode as another run of the server knew it. It has no place and no reference yet.
        Raises ValueError where its nodeid or its object is another's.
        """
        if nodeid in self._by_node or not ROOT_ID < nodeid < FSD_DIR:
            raise ValueError(f"nodeid {nodeid} is taken")
        if identity in self._by_identity:
            raise ValueError(f"the object of nodeid {nodeid} has another")
        if nodeid >= self._next_synthetic:
            self._next_synthetic = nodeid + 1
        inode = Inode(nodeid, generation, identity, kind)
        if self.is_own(identity):
            inode.number = self.mounts.number(identity.mount, identity.device, identity.ino)
        self._by_node[nodeid] = inode
        self._by_identity[identity] = inode
        return inode

    def identify_as(self, inode: Inode, identity: Identity) -> None:
        """An inode stands for that object. Raises ValueError where it is another's."""
        if self._by_identity.get(identity, inode) is not inode:
            raise ValueError(f"the object of nodeid {inode.nodeid} has another")
        self._by_identity.pop(inode.identity, None)
        inode.identity = identity
        device, ino, _, mount = identity
        inode.number = (self.mounts.number(mount, device, ino) if mount else 0) or inode.nodeid
        self._by_identity[identity] = inode

    def retire(self, inode: Inode) -> None:
        """The inode's object is gone for good: what is found with the same identity is another."""
        if self.holds(inode):
            self.identify_as(inode, Identity(-1, inode.nodeid, b"", 0))

    def forget(self, nodeid: int, count: int) -> None:
        """FUSE FORGET: the guest's kernel drops ``count`` references."""
        inode = self._by_node.get(nodeid)
        if inode is None:
            return
        inode.lookups -= count
        if inode.lookups < 0:
            inode.lookups = 0
            raise LookupCountError(f"{inode!r} forgotten more often than looked up")
        self.release(inode)

    def pin(self, inode: Inode) -> None:
        """Keep the inode for the server's own need."""
        inode.pins += 1

    def unpin(self, inode: Inode) -> None:
        """Undo one pin."""
        inode.pins -= 1
        assert inode.pins >= 0, inode
        self.release(inode)

    def release(self, inode: Inode | None) -> None:
        """Drop the inode from the table if nobody refers to it, nor to anything below it; then the
        directory that it was in, and so on upwards: as deep as guests make their trees.
        """
        while inode is not None and not (inode.pins or inode.lookups or inode.children):
            if self._by_node.get(inode.nodeid) is not inode:
                return
            self._drop(inode)
            for parent, name in self._other_names.drop(inode):
                self.displace(parent, name, inode)
                self.release(parent)
            inode = inode.parent

    def _drop(self, inode: Inode) -> None:
        del self._by_node[inode.nodeid]
        self._by_identity.pop(inode.identity, None)
        if inode.fd >= 0:
            fd, inode.fd = inode.fd, -1
            os.close(fd)
        if not inode.is_placeholder:
            self._remember(inode)
        if inode.parent is not None:
            self.displace(inode.parent, inode.name, inode)

    def _remember(self, inode: Inode) -> None:
        parent = inode.parent
        known = parent is not None and parent.nodeid < FSD_DIR
        place = (parent.nodeid, inode.name) if parent is not None and known else (0, b"")
        self.remember(inode.nodeid, Forgotten(inode.identity, *place))

    def remember(self, nodeid: int, forgotten: Forgotten) -> None:
        """Keep in mind what a nodeid stood for that nobody refers to any more."""
        self.forgotten.add(nodeid, forgotten)
        if nodeid >= self._next_synthetic:
            self._next_synthetic = nodeid + 1

    # How an inode is reached on the host

    @contextmanager
    def directory(self, inode: Inode) -> Iterator[int]:
        """An O_PATH descriptor of a directory, for the time of the with block."""
        fd = self.open_directory(inode)
        try:
            yield fd
        finally:
            if fd != inode.fd:
                os.close(fd)

    def _check_answers(self, inode: Inode) -> None:
        """Raises OSError EIO for what is on a file system below the share that does not answer."""
        if self.mounts.remote and inode.identity.mount in self.mounts.remote:
            self.mounts.check(inode.identity.mount)

    def open_directory(self, inode: Inode) -> int:
        """An O_PATH descriptor of a directory: to be closed, unless it is the inode's own ``fd``.

        Raises OSError: ENOTDIR, ENOENT where it is gone, others where it cannot be opened.
        """
        if inode is self.root:
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
        """A new O_PATH descriptor of any object. Raises OSError: ESTALE where it is not found,
        others where nobody could look.

        A file is opened through the name it was last known by, so that what is done with the
        descriptor is announced under that name on the host.
        """
        if inode.is_dir:
            with self.directory(inode) as fd:
                return os.dup(fd)
        self._check_answers(inode)
        unseen: OSError | None = None
        for parent, name in self._names(inode):
            try:
                with self.directory(parent) as parent_fd:
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent_fd)
            except OSError as error:
                unseen = None if syscalls.is_gone(error) else error
            else:
                if self._is_or_close(fd, inode):
                    self.place(inode, parent, name)
                    return fd
        if inode.open_fds:
            return os.open(syscalls.fd_path(inode.open_fds[-1]), os.O_PATH)
        if unseen is not None and not self.handle_opens(inode.identity):
            raise unseen
        if self.mounts.below:
            return self._open_moved(inode)
        return self._open_by_verified_handle(inode)

    def _open_by_verified_handle(self, inode: Inode) -> int:
        fd = self.open_by_handle(inode)
        try:
            if os.fstat(fd).st_ino != inode.identity.ino:  # restored from an image that lies
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except OSError:
            os.close(fd)
            raise
        return fd

    def stat_by_name(self, inode: Inode) -> os.stat_result | None:
        """Attributes of a file by the name it was last known by; None if that is not it now, or
        nobody could look.
        """
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
        """The name that a file was last known by; where there are no handles, then its others."""
        if inode.is_placeholder:
            return
        if inode.parent is not None:
            yield inode.parent, inode.name
        if not self.handle_opens(inode.identity):
            yield from self._other_names.of(inode)

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
                if error.errno == errno.EOPNOTSUPP:  # another, where there are no handles
                    return False
                raise
            return is_it and os.fstat(fd).st_ino == ino
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (device, ino):
            return False
        return self.identify(fd)[0] == inode.identity

    def open_by_handle(self, inode: Inode) -> int:
        """A new O_PATH descriptor by file handle. Raises OSError, ESTALE where that cannot be.

        Of a directory by its path, where the handle is that of what is there, if it was not used a
        moment ago or somebody would hear of it: the kernel opens and reads the directories above
        one whose dentries it has dropped, to find its names, and all who watch those see it
        (exportfs_get_name in fs/exportfs/expfs.c). Where it has moved there is no other way.
        """
        if not self.handle_opens(inode.identity):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        handle = inode.identity.handle
        if not inode.is_dir:  # of which the kernel looks for no name
            return syscalls.open_by_handle(self.root_fd, handle, os.O_PATH | os.O_NOFOLLOW)
        now = time.monotonic()
        is_warm, inode.warm_until = now < inode.warm_until, now + windows.WARM
        if (self.overheard or not is_warm) and (fd := self._open_by_path(inode)) >= 0:
            return fd
        return syscalls.open_by_handle(self.root_fd, handle, os.O_PATH | os.O_DIRECTORY)

    def _open_by_path(self, directory: Inode) -> int:
        """-1 where it is not there, or nobody could look: its handle tells the two apart."""
        path = directory.short_path()
        if path is None:
            return -1
        with suppress(OSError):
            return self._open_at(path, directory)
        return -1

    def _open_at(self, path: bytes, inode: Inode) -> int:
        """-1 where the object is not there. Raises OSError where nobody could look."""
        try:
            one_mount = self.is_own(inode.identity)
            fd = syscalls.open_below(self.root_fd, path, one_mount=one_mount)
        except OSError as error:
            if syscalls.is_gone(error) or error.errno in _NO_SUCH_PATH:
                return -1
            raise
        return fd if self._is_or_close(fd, inode) else -1

    # Where something is mounted below the share

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
        """Also where it is masked, or not in the share: by what is open of it, or by its handle.

        Not by a handle on another mount: that takes an open file there (open_by_handle_at(2)), and
        all who watch it would see it opened.
        """
        if inode.fd >= 0 or inode.open_fds:
            return os.dup(inode.fd if inode.fd >= 0 else inode.open_fds[-1])
        if not self.handle_opens(inode.identity):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return syscalls.open_by_handle(
            self.root_fd, inode.identity.handle, os.O_PATH | os.O_NOFOLLOW
        )

    def _open_where(self, fd: int, inode: Inode) -> int:
        """The object at the path that the kernel knows for a descriptor; -1 where that is another,
        or not in the share.
        """
        path = self._path_of(fd)
        return -1 if path is None else self._open_at(path, inode)

    def _path_of(self, fd: int) -> bytes | None:
        """The path below the root that the kernel knows for an open object."""
        top = syscalls.shown_path(self.root_fd).rstrip(b"/") + b"/"
        path = syscalls.shown_path(fd)
        return path[len(top) :] if path.startswith(top) else None

    def verify_place(self, inode: Inode) -> bool:
        """Make sure that an object is where it is known to be, or find out where it is; whether it
        is in the export at all. A directory that is not goes out of sight. Raises OSError where
        nobody could look.
        """
        parent = inode.parent
        if parent is not None and parent is not self.outside:
            with syscalls.skipping_gone, self.directory(parent) as dir_fd:
                if self._identity_of(dir_fd, inode.name) == inode.identity:
                    return True
        with syscalls.skipping_gone, self.opened(inode) as fd:
            if self._at_path(fd) is inode:
                return True
        if inode.is_dir:
            self.lose(inode)
        return False

    def _at_path(self, fd: int) -> Inode | None:
        """The inode at the path that the kernel knows for an open object: the object's, unless it
        has just moved. None where that is not in the export.
        """
        path = self._path_of(fd)
        if path is None:
            return None
        return self.walk(path.split(b"/"))

    def walk(self, names: Iterable[bytes]) -> Inode:
        """The inode that names lead to, from the root; what is on the way is known afterwards.
        Raises OSError.
        """
        inode, dir_fd = self.root, os.dup(self.root_fd)
        try:
            for name in names:
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
                os.close(dir_fd)
                dir_fd = fd
                inode, _ = self.intern(fd, inode, name)
        except BaseException:
            self.release(inode)
            raise
        finally:
            os.close(dir_fd)
        return inode

    def _step(self, dir_fd: int, parent: Inode, name: bytes) -> Inode:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            return self.intern(fd, parent, name)[0]
        finally:
            os.close(fd)

    @contextmanager
    def opened(self, inode: Inode) -> Iterator[int]:
        """``open`` for the time of a with block."""
        fd = self.open(inode)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def reached(self, inode: Inode) -> Iterator[int]:
        """The same where it does not matter by what name: to set a watch."""
        by_name = inode.is_dir or inode.open_fds or not self.handle_opens(inode.identity)
        if by_name or self.mounts.below:
            fd = self.open(inode)
        else:
            fd = self._open_by_verified_handle(inode)
        try:
            yield fd
        finally:
            os.close(fd)
