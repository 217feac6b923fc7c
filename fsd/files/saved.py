"""The rows of the inode table that outlive a server, in a checkpoint or a session's record.

Plain values, apart from the table: their readers do not trust them (fsd.checkpoint.restore_inodes).
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from protocol.frames import FSD_DIR

from .inode import Identity, Inode
from .table import InodeTable

GONE = -1
"""Device of an object that no longer exists on the host."""


class SavedInode(NamedTuple):
    """One inode: its nodeid, its identity, its place."""

    nodeid: int
    generation: int
    device: int  # 0 = the root's, on its mount; GONE
    ino: int
    handle: bytes
    kind: int  # S_IFMT bits
    nlink: int
    parent: int  # 0 = not known
    name: bytes


class SavedLink(NamedTuple):
    """Another name of an inode: a hard link that was looked up."""

    directory: int
    name: bytes
    nodeid: int


class SavedForgotten(NamedTuple):
    """An unused object that a file handle may still refer to (fsd.files.forgotten)."""

    nodeid: int
    device: int  # 0 = the root's
    ino: int
    handle: bytes
    parent: int
    name: bytes


class SavedTable(NamedTuple):
    """The inode table. The root has no row."""

    inodes: list[SavedInode]
    links: list[SavedLink]
    forgotten: list[SavedForgotten]


def inode_table(table: InodeTable) -> SavedTable:
    """Every known inode with its place; the references of guests are saved with them."""
    inodes: list[SavedInode] = []
    links: list[SavedLink] = []
    for inode in table:
        if inode is not table.root:
            inodes.append(saved_inode(table, inode))
        for name, child in inode.children.items():
            if child.name != name or child.parent is not inode:
                links.append(SavedLink(inode.nodeid, name, child.nodeid))
    forgotten = [
        SavedForgotten(
            nodeid, _saved_device(table, identity), identity.ino, identity.handle, parent, name
        )
        for nodeid, (identity, parent, name) in table.forgotten.items()
    ]
    return SavedTable(inodes, links, forgotten)


def _saved_device(table: InodeTable, identity: Identity) -> int:
    device, _, _, mount = identity
    return GONE if device < 0 else 0 if table.mounts.is_own(mount, device) else device


def saved_inode(table: InodeTable, inode: Inode) -> SavedInode:
    """One inode, as it is known now."""
    _, ino, handle, _ = inode.identity
    parent = inode.parent
    known = (
        parent is not None
        and parent.nodeid < FSD_DIR
        and table.holds(parent)
        and parent.children.get(inode.name) is inode
    )
    return SavedInode(
        inode.nodeid,
        inode.generation,
        _saved_device(table, inode.identity),
        ino,
        handle,
        stat.S_IFMT(inode.kind),
        inode.nlink,
        parent.nodeid if parent is not None and known else 0,
        inode.name if known else b"",
    )
