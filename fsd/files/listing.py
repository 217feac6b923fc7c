"""The known names of a watched directory, stored with its inode.

The events keep it up to date; after lost events it is compared with the host, and the difference is
delivered as events (docs/decisions/resync.md).
"""

from __future__ import annotations

import time
from typing import NamedTuple

from .inode import Inode

UNKNOWN = (1 << 64) - 1
"""Inode number of an object that could not be looked at: any number is possible."""


class Known(NamedTuple):
    """One name: its inode if it was ever looked up, and until when its changes were delivered."""

    ino: int
    kind: int  # S_IFMT bits, 0 if it could not be looked at
    seen_ns: int  # time.time_ns()
    inode: Inode | None = None

    def may_be(self, other: Known) -> bool:
        """Whether the two may be one object; the number alone may have been reused."""
        if self.kind != other.kind and self.kind and other.kind:
            return False
        return self.ino == other.ino or UNKNOWN in (self.ino, other.ino)

    def of(self, inode: Inode | None) -> Known:
        """The same with its inode, if that is the object: another object's birth may be too close
        to ``seen_ns`` to tell them apart by it.
        """
        if inode is None or inode.is_placeholder or inode.identity.ino != self.ino:
            return self
        return self._replace(inode=inode)


class Listing:
    """Names of one watched directory."""

    __slots__ = ("complete", "names")

    def __init__(self) -> None:
        self.names: dict[bytes, Known] = {}
        self.complete = False  # False: only names that had events are known


def of_inode(inode: Inode) -> Known:
    """The entry of an object as of now."""
    ino = UNKNOWN if inode.is_placeholder else inode.identity.ino
    return Known(ino, inode.kind, time.time_ns(), inode)


def listing(node: Inode) -> Listing:
    """The directory's listing, made when first needed."""
    if node.listing is None:
        node.listing = Listing()
    return node.listing
