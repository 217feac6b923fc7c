"""The inodes saved by a previous server, verified against the host and put in place.

A saved nodeid goes only to the very object that had it. The object is found by its file handle if
the file system opens those, else by its path, if handle and inode number are still the same. If it
is not found, its nodeid gets ESTALE. If a descriptor or memory is missing, nothing is known, and
the restore fails with OSError. Saved values are not trusted.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial

from protocol.frames import FSD_DIR
from protocol.images import ImageError

from ..files.forgotten import Forgotten
from ..files.inode import ROOT_ID, Identity, Inode
from ..files.recall import verify_place
from ..files.saved import GONE, SavedInode, SavedTable
from ..files.table import InodeTable
from ..linux import syscalls

_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
"""Temporary errors, which say nothing about the object."""
_PAUSES = (0.01, 0.1, 0.5)
"""Seconds between attempts then. After the last one the server does not start: the state is kept
for the next start."""
_HANDLE_SIZES = range(4, 4 + 128 + 1)  # the type, MAX_HANDLE_SZ
_KINDS = {
    stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
    stat.S_IFBLK,
}  # fmt: skip


class RestoredTable:
    """The inodes of a saved table, in the table of a new export. Raises ImageError, and OSError if
    the host cannot be looked at.

    They have no references yet: the code that holds some counts them, then calls ``release``.
    """

    def __init__(self, table: InodeTable, saved: SavedTable, saved_ns: int) -> None:
        self._table = table
        self._saved_ns = saved_ns
        self.inodes: dict[int, Inode] = {ROOT_ID: table.root}  # by nodeid, directories first
        self.gone: set[Inode] = set()
        rows = {row.nodeid: row for row in saved.inodes}
        if len(rows) != len(saved.inodes) or ROOT_ID in rows:
            raise ImageError("a nodeid is saved twice")
        places = _places(rows)
        order = _downwards(places)
        for row in [*(rows[nodeid] for nodeid in order), *saved.inodes]:
            if row.nodeid not in self.inodes:
                self._adopt(row)
        for nodeid in order:
            row = rows[nodeid]
            self._put(self.inodes[nodeid], self.inodes[row.parent], row.name)
        for directory, name, nodeid in saved.links:
            node, inode = self._get(directory), self._get(nodeid)
            check_name(name)
            if node.is_dir and not inode.is_dir:
                node.children.setdefault(name, inode)
        for inode in self.inodes.values():
            if inode is table.root or inode.is_placeholder:
                continue
            if not inode.is_dir and table.reach.handle_opens(inode.identity):
                continue  # verified at each use: its handle leads to it, or to nothing
            if not self._find(inode):
                self.gone.add(inode)
        for nodeid, device, ino, handle, parent, name in saved.forgotten:
            check_name(name or b"-")
            _check_handle(handle)
            if nodeid not in self.inodes and ROOT_ID < nodeid < FSD_DIR:
                mounts = table.mounts
                identity = Identity(
                    device or mounts.device, ino, handle, 0 if device else mounts.own
                )
                table.remember(nodeid, Forgotten(identity, parent, name))
        for inode in self.inodes.values():
            if inode.is_dir and inode.parent is None and inode is not table.root:
                table.lose(inode)

    def _get(self, nodeid: int) -> Inode:
        try:
            return self.inodes[nodeid]
        except KeyError:
            raise ImageError(f"nodeid {nodeid} is used but not saved") from None

    def get(self, nodeid: int) -> Inode:
        """A saved inode. Raises ImageError if no saved inode has the nodeid."""
        return self._get(nodeid)

    def release(self) -> None:
        """Drop inodes without references, now that all are counted."""
        for inode in reversed(self.inodes.values()):
            self._table.release(inode)

    # Rows

    def _adopt(self, row: SavedInode) -> None:
        nodeid, generation, device, ino, handle, kind, nlink, _parent, _name = row
        if not 0 <= generation < 1 << 32 or kind not in _KINDS:
            raise ImageError(f"nodeid {nodeid} has generation {generation}, type {kind:o}")
        _check_handle(handle)
        mounts = self._table.mounts
        identity = Identity(mounts.device, ino, handle, mounts.own)
        if device < 0:
            identity = Identity(GONE, nodeid, b"", 0)
        elif device:  # on another mount, whose device number may have changed
            identity = Identity(device, ino, handle, -nodeid)
        try:
            inode = self._table.adopt(nodeid, generation, identity, kind)
        except ValueError as error:
            raise ImageError(str(error)) from None
        inode.nlink = nlink
        self.inodes[nodeid] = inode

    @staticmethod
    def _put(inode: Inode, parent: Inode, name: bytes) -> None:
        if parent.is_dir:
            inode.parent, inode.name = parent, name
            parent.children.setdefault(name, inode)

    # The host

    def _find(self, inode: Inode) -> bool:
        """Whether the object still exists; from then on it is reached like any other."""
        if self._table.reach.handle_opens(inode.identity):
            return _patiently(partial(self._find_directory, inode))
        if _patiently(partial(self._find_by_path, inode)):
            return True
        # A handle proves the object wherever it is met again; without one, or on another mount,
        # nothing does.
        if not self._table.reach.is_own(inode.identity) or not inode.identity.handle:
            self._table.identify_as(inode, Identity(GONE, inode.nodeid, b"", 0))
        return False

    def _find_directory(self, inode: Inode) -> bool:
        fd = self._table.reach.open_by_handle(inode)
        try:
            status = os.fstat(fd)
            if (status.st_ino, stat.S_IFMT(status.st_mode)) != (inode.identity.ino, inode.kind):
                self._table.identify_as(inode, Identity(GONE, inode.nodeid, b"", 0))
                return False
            verify_place(self._table, inode)
        except OSError:  # its place could not be looked at
            self._table.lose(inode)
        finally:
            os.close(fd)
        return True

    def _find_by_path(self, inode: Inode) -> bool:
        parent = inode.parent
        if parent is None or (parent.fd < 0 and parent in self.gone):
            return False
        with self._table.reach.directory(parent) as parent_fd:
            fd = os.open(inode.name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent_fd)
        try:
            identity, status = self._table.reach.identify(fd)
            known = inode.identity
            if (identity.ino, identity.handle) != (known.ino, known.handle):
                return False
            if stat.S_IFMT(status.st_mode) != inode.kind:
                return False
            if not identity.handle and not self._is_older(fd, status):
                return False
            self._table.identify_as(inode, identity)
            if inode.is_dir and self._table.reach.must_pin(identity):
                inode.fd = os.dup(fd)
        except ValueError:
            return False
        finally:
            os.close(fd)
        return True

    def _is_older(self, fd: int, status: os.stat_result) -> bool:
        """Whether an object without a handle existed when the image was saved: it was born before,
        or, if that is unknown, has not changed since.
        """
        return (syscalls.born_ns(fd, b"") or status.st_ctime_ns) < self._saved_ns


def _patiently(find: Callable[[], bool]) -> bool:
    """Whether an object is found. Tries again for a while if a resource is missing, and raises
    OSError if it stays missing. Any other error means that the object is not found.
    """
    for pause in (*_PAUSES, None):
        try:
            return find()
        except OSError as error:
            if error.errno not in _PASSING:
                return False
            if pause is None:
                raise
        time.sleep(pause)
    return False


def _places(rows: dict[int, SavedInode]) -> dict[int, list[int]]:
    """Nodeids by that of their directory."""
    places: dict[int, list[int]] = defaultdict(list)
    for row in rows.values():
        if row.parent:
            check_name(row.name)
            places[row.parent].append(row.nodeid)
    return places


def _downwards(places: dict[int, list[int]]) -> list[int]:
    """Nodeids below the root, each directory before its entries. Cycles are left out."""
    order: list[int] = []
    todo = deque([ROOT_ID])
    while todo:
        below = places.pop(todo.popleft(), [])
        order += below
        todo += below
    return order


def _check_handle(handle: bytes) -> None:
    if handle and len(handle) not in _HANDLE_SIZES:
        raise ImageError(f"a file handle of {len(handle)} bytes")


def check_name(name: bytes) -> None:
    """Raises ImageError if this is not the name of a directory entry."""
    if not name or len(name) > 255 or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise ImageError(f"{name[:40]!r} is not a file name")
