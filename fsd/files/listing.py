"""What the server last knew of a watched directory's names: kept with its inode.

Kept current by the events themselves; after lost events it is compared with the host, and the
difference is told as events (docs/decisions/resync.md).
"""

from __future__ import annotations

import time
from typing import NamedTuple

from .inode import Inode

UNKNOWN = (1 << 64) - 1
"""Inode number of an object that nobody could look at: it may be any."""


class Known(NamedTuple):
    """One name: its inode if that was ever looked at, and until when its changes were told."""

    ino: int
    kind: int  # S_IFMT bits, 0 where nobody could look
    seen_ns: int  # time.time_ns()
    inode: Inode | None = None

    def may_be(self, other: Known) -> bool:
        """Whether the two may be one object; its number alone may have been reused."""
        if self.kind != other.kind and self.kind and other.kind:
            return False
        return self.ino == other.ino or UNKNOWN in (self.ino, other.ino)

    def of(self, inode: Inode | None) -> Known:
        """The same with its inode, if that is it: another object's birth may be too close to
        ``seen_ns`` to be told apart by that.
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
