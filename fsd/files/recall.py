"""Finds an object again: one that was forgotten, or that may have moved.

Apart from the table, which knows the objects in use, and from Reach, which opens known ones.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from ..linux import syscalls
from .forgotten import Forgotten
from .inode import Identity, Inode
from .table import InodeTable

RECALL_SEARCHES = 16
"""Directories above a forgotten node that are searched by their handles, because each may take a
walk of PATH_MAX; all others have to be where they were, or the node counts as gone."""


def recall(table: InodeTable, nodeid: int) -> Inode:
    """The inode of a guest's file handle: also one that was forgotten since, if it is found again
    in the export. Raises OSError ESTALE.

    It may have no reference yet; the caller gives it one.
    """
    missing: dict[int, None] = {}  # the object, the directory that it is in, and so on upwards
    while table.known(nodeid) is None and nodeid not in missing:
        missing[nodeid] = None
        nodeid = table.forgotten.get(nodeid).parent
    found: list[Inode] = []
    is_there, searches = False, RECALL_SEARCHES
    try:
        while missing and searches:
            nodeid, _ = missing.popitem()
            record = table.forgotten.get(nodeid)
            again = _by_its_name(table, record)
            if again is None:
                searches -= 1
                again = _by_its_handle(table, record)
            found += [again] if again is not None else []
        inode = None if missing else table.known(nodeid)
        is_there = inode is not None and (inode is table.root or verify_place(table, inode))
        if inode is not None and is_there:
            return inode
    finally:
        if not is_there:
            for again in reversed(found):
                table.release(again)
    raise OSError(errno.ESTALE, f"nodeid {nodeid} is not in the export any more")


def _by_its_name(table: InodeTable, record: Forgotten) -> Inode | None:
    """The very object at its old place; None if it is not there any more."""
    parent = table.known(record.parent)
    with syscalls.skipping_gone:
        if parent is not None and parent.is_dir:
            with table.reach.directory(parent) as dir_fd:
                if _matches(table.reach.identity_of(dir_fd, record.name), record.identity):
                    return _step(table, dir_fd, parent, record.name)
    return None


def _by_its_handle(table: InodeTable, record: Forgotten) -> Inode | None:
    """The very object, wherever it is; None if it is gone."""
    with syscalls.skipping_gone:
        if table.reach.handle_opens(record.identity):
            handle = record.identity.handle
            fd = syscalls.open_by_handle(table.reach.root_fd, handle, os.O_PATH | os.O_NOFOLLOW)
            try:
                return _at_path(table, fd)
            finally:
                os.close(fd)
    return None


def verify_place(table: InodeTable, inode: Inode) -> bool:
    """Make sure that an object is at its known place, or find its place; returns whether it is in
    the export at all. A directory that is not goes out of sight. Raises OSError if it cannot be
    looked at.
    """
    parent = inode.parent
    if parent is not None and parent is not table.outside:
        with syscalls.skipping_gone, table.reach.directory(parent) as dir_fd:
            if table.reach.identity_of(dir_fd, inode.name) == inode.identity:
                return True
    with syscalls.skipping_gone, table.reach.opened(inode) as fd:
        if _at_path(table, fd) is inode:
            return True
    if inode.is_dir:
        table.lose(inode)
    return False


def _at_path(table: InodeTable, fd: int) -> Inode | None:
    """The inode at the path that the kernel has for an open object: the object's, unless it has
    just moved. None if it is not in the export.
    """
    path = table.reach.path_of(fd)
    if path is None:
        return None
    return walk(table, path.split(b"/"))


def walk(table: InodeTable, names: Iterable[bytes]) -> Inode:
    """The inode at the end of a path from the root; the inodes on the way are known afterwards.
    Raises OSError.
    """
    inode, dir_fd = table.root, os.dup(table.reach.root_fd)
    try:
        for name in names:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
            os.close(dir_fd)
            dir_fd = fd
            inode, _ = table.intern(fd, inode, name)
    except BaseException:
        table.release(inode)
        raise
    finally:
        os.close(dir_fd)
    return inode


def _step(table: InodeTable, dir_fd: int, parent: Inode, name: bytes) -> Inode:
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        return table.intern(fd, parent, name)[0]
    finally:
        os.close(fd)


def _matches(found: Identity, known: Identity) -> bool:
    """Whether an object is that one; its mount may have had another number before a restart."""
    return found.is_object_of(known) and known.mount in (0, found.mount)
