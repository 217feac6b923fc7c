"""The inode table: which host object a (nodeid, generation) stands for, and its known place.

Identity is the host's file handle if there is one, so a reused inode number is a new node. nodeid
is the host's st_ino if that is free, so that the guest's st_ino is the host's.

reach.py opens objects; recall.py finds forgotten ones again.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

from protocol.frames import FSD_DIR, FSD_NAME, STAGING
from protocol.handles import NodeKey

from ..linux import syscalls
from .forgotten import Forgotten, ForgottenObjects
from .inode import ROOT_ID, Identity, Inode, is_below
from .othernames import OtherNames
from .reach import Reach

_SYNTHETIC = 1 << 62
"""First nodeid for objects that cannot have their st_ino: above the inode numbers of real file
systems."""


def _hidden_directory(nodeid: int, name: bytes) -> Inode:
    inode = Inode(nodeid, 1, Identity(-2, nodeid, b"", 0), stat.S_IFDIR)
    inode.name = name
    return inode


class LookupCountError(AssertionError):
    """A guest forgot more than it had looked up: a bug in the server, which tests make visible."""


class InodeTable:
    """All inodes of one export. Raises OSError(ESTALE) for nodeids that it does not hold."""

    def __init__(self, root: str) -> None:
        self._next_synthetic = _SYNTHETIC
        self.moves = 0  # of directories: paths made before are out of date
        self.on_moved: list[Callable[[Inode], None]] = []
        """Called with each object whose place has changed."""
        self._other_names = OtherNames()
        self.reach = Reach(root, self._other_names, self.place)
        self.mounts = self.reach.mounts
        identity, status = self.reach.identify(self.reach.root_fd)
        self.root = Inode(ROOT_ID, 0, identity, stat.S_IFDIR)
        self.root.fd = self.reach.root_fd
        self.root.number = status.st_ino
        self.root.nlink = status.st_nlink
        self.root.pins = 1
        # The parent of directories that went out of sight: moved to an unwatched place.
        self.outside = _hidden_directory(STAGING, b"staging")
        self.outside.parent = _hidden_directory(FSD_DIR, FSD_NAME)
        self.outside.parent.parent = self.root
        self._by_node = {ROOT_ID: self.root}
        self._by_identity = {identity: self.root}
        self.forgotten = ForgottenObjects()

    def close(self) -> None:
        """Close every descriptor."""
        self.reach.close()
        self.root.fd = -1
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

    def find(self, key: NodeKey) -> Inode:
        """The inode of (nodeid, generation)."""
        inode = self.get(key.nodeid)
        if inode.generation != key.generation:
            raise OSError(errno.ESTALE, f"nodeid {key.nodeid} is of generation {inode.generation}")
        return inode

    def intern(self, fd: int, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """The inode behind an O_PATH descriptor that was opened as parent/name."""
        identity, status = self.reach.identify(fd)
        inode = self._by_identity.get(identity)
        if inode is None:
            inode = self._new(identity, stat.S_IFMT(status.st_mode))
        if inode.fd < 0 and inode.is_dir and self.reach.must_pin(identity):
            try:
                inode.fd = os.open(syscalls.fd_path(fd), os.O_PATH | os.O_DIRECTORY)
            except OSError:
                self.release(inode)
                raise
        inode.nlink = status.st_nlink
        self.place(inode, parent, name)
        return inode, status

    def intern_nameless(self, fd: int, directory: Inode) -> tuple[Inode, os.stat_result]:
        """The inode of a file that was opened in a directory with O_TMPFILE. Its events have the
        name that the kernel shows for it.
        """
        identity, status = self.reach.identify(fd)
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
            self.lose(parent)  # its known place is out of date
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
            for report in self.on_moved:
                report(inode)

    def lose(self, directory: Inode) -> None:
        """Note that a directory is no longer where it was, and its place is unknown."""
        self.place(directory, self.outside, b"%d" % directory.nodeid)

    @staticmethod
    def displace(parent: Inode, name: bytes, inode: Inode) -> None:
        """Note that parent/name is no longer the inode."""
        if parent.children.get(name) is inode:
            del parent.children[name]

    def placeholder(self, kind: int, parent: Inode | None, name: bytes) -> Inode:
        """An inode for an object that is already gone; it has an identity of its own."""
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
        """The table's own object for the same host object, if it has one."""
        return self._by_identity.get(inode.identity, inode)

    def _synthetic(self) -> int:
        self._next_synthetic += 1
        return self._next_synthetic - 1

    def numbering(self, directory: Inode) -> Callable[[bytes, int], int] | None:
        """A function that makes unique numbers from those in the host's listing of a directory,
        each with its name; None if they are unique.
        """
        device, _, _, mount = directory.identity
        if self.mounts.is_own(mount, device) and not self.mounts.below:
            return None
        path = directory.path()

        def number(name: bytes, ino: int) -> int:
            point = self.mounts.point(path + b"/" + name if path else name)
            if point and point not in self.mounts.remote:
                with suppress(OSError), self.reach.directory(directory) as dir_fd:
                    there, ino, _, above = self.reach.identity_of(dir_fd, name)
                    return self.mounts.number(above, there, ino) or ino
            return self.mounts.number(mount, device, ino) or ino

        return number

    def _new(self, identity: Identity, kind: int) -> Inode:
        device, ino, handle, mount = identity
        nodeid = number = self.mounts.number(mount, device, ino)
        if (old := self._by_node.get(nodeid)) is not None:
            self.release(old)
        if not ROOT_ID < nodeid < _SYNTHETIC or nodeid in self._by_node:
            # Also if the host reused the number: a guest's requests name only the nodeid, so the
            # old object keeps it as long as it is in use.
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
        Raises ValueError if its nodeid or its object belongs to another.
        """
        if nodeid in self._by_node or not ROOT_ID < nodeid < FSD_DIR:
            raise ValueError(f"nodeid {nodeid} is taken")
        if identity in self._by_identity:
            raise ValueError(f"the object of nodeid {nodeid} has another")
        if nodeid >= self._next_synthetic:
            self._next_synthetic = nodeid + 1
        inode = Inode(nodeid, generation, identity, kind)
        if self.reach.is_own(identity):
            inode.number = self.mounts.number(identity.mount, identity.device, identity.ino)
        self._by_node[nodeid] = inode
        self._by_identity[identity] = inode
        return inode

    def identify_as(self, inode: Inode, identity: Identity) -> None:
        """An inode stands for that object. Raises ValueError if another does."""
        if self._by_identity.get(identity, inode) is not inode:
            raise ValueError(f"the object of nodeid {inode.nodeid} has another")
        self._by_identity.pop(inode.identity, None)
        inode.identity = identity
        device, ino, _, mount = identity
        inode.number = (self.mounts.number(mount, device, ino) if mount else 0) or inode.nodeid
        self._by_identity[identity] = inode

    def retire(self, inode: Inode) -> None:
        """The inode's object is gone for good: an object with the same identity is another."""
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
        """Keep the inode for the server's own use."""
        inode.pins += 1

    def unpin(self, inode: Inode) -> None:
        """Undo one pin."""
        inode.pins -= 1
        assert inode.pins >= 0, inode
        self.release(inode)

    def release(self, inode: Inode | None) -> None:
        """Drop the inode from the table if neither it nor anything below it is in use; then its
        directory, and so on upwards: as deep as guests make their trees.
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
        """Remember the object of a nodeid that is no longer in use."""
        self.forgotten.add(nodeid, forgotten)
        if nodeid >= self._next_synthetic:
            self._next_synthetic = nodeid + 1
