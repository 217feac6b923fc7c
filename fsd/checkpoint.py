"""What is kept of an export for the server that comes after this one: taken here, as plain rows.

Apart from fsd.restoring, which trusts none of it, and from fsd.image, which writes it down.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from protocol.frames import FSD_DIR

from .inodes import Inode, InodeTable

GONE = -1
"""Device of what is no object of the host any more."""


class SavedInode(NamedTuple):
    """One inode: what a guest calls it, which object it was, where that was."""

    nodeid: int
    generation: int
    device: int  # 0 = the root's; GONE
    ino: int
    handle: bytes
    kind: int  # S_IFMT bits
    nlink: int
    parent: int  # nodeid; 0 = not known
    name: bytes


class SavedLink(NamedTuple):
    """Another name of an inode: a hard link that was looked up."""

    directory: int  # nodeid
    name: bytes
    nodeid: int


class SavedTable(NamedTuple):
    """The inode table. The root has no row."""

    inodes: list[SavedInode]
    links: list[SavedLink]


def inode_table(table: InodeTable) -> SavedTable:
    """Every inode that is known, with its place; the references of guests are saved with them."""
    inodes: list[SavedInode] = []
    links: list[SavedLink] = []
    for inode in table:
        if inode is not table.root:
            inodes.append(_inode(table, inode))
        for name, child in inode.children.items():
            if child.name != name or child.parent is not inode:
                links.append(SavedLink(inode.nodeid, name, child.nodeid))
    return SavedTable(inodes, links)


def _inode(table: InodeTable, inode: Inode) -> SavedInode:
    device, ino, handle = inode.identity
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
        GONE if device < 0 else 0 if device == table.device else device,
        ino,
        handle,
        stat.S_IFMT(inode.kind),
        inode.nlink,
        parent.nodeid if parent is not None and known else 0,
        inode.name if known else b"",
    )
