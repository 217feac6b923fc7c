"""Remembers the objects of unused nodeids: a guest may still hold file handles of them.

Apart from the inode table, which finds the objects again (recall): this only remembers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView
from typing import NamedTuple

from .inode import Identity

FORGOTTEN_LIMIT = 16_384
"""Objects that are remembered; at most about 6 MB. Tens of thousands of small objects leave the
allocator's arenas partly used for good: with eight times as many, a server kept 50 MB after guests
had worked hard (docs/decisions/fuzzing.md)."""


class Forgotten(NamedTuple):
    """One object: its identity and its last place."""

    identity: Identity
    parent: int  # nodeid; 0 = not known
    name: bytes


_UNKNOWN = Forgotten(Identity(0, 0, b"", 0), 0, b"")


class ForgottenObjects:
    """The last ones, by nodeid and by object."""

    def __init__(self) -> None:
        # The oldest first. No plain dict: the first item of one is found by going over the places
        # of all that were dropped before it.
        self._by_node: OrderedDict[int, Forgotten] = OrderedDict()
        self._nodeids: dict[Identity, int] = {}

    def items(self) -> ItemsView[int, Forgotten]:
        """All, with their nodeids."""
        return self._by_node.items()

    def get(self, nodeid: int) -> Forgotten:
        """The object of the nodeid; one that does not exist if it is not known."""
        return self._by_node.get(nodeid, _UNKNOWN)

    def add(self, nodeid: int, forgotten: Forgotten) -> None:
        """Remember one more, and drop the oldest."""
        self.drop(nodeid)
        self._by_node[nodeid] = forgotten
        self._nodeids[forgotten.identity] = nodeid
        if len(self._by_node) > FORGOTTEN_LIMIT:
            self.drop(next(iter(self._by_node)))

    def drop(self, nodeid: int) -> None:
        """The nodeid is in use again."""
        old = self._by_node.pop(nodeid, None)
        if old is not None and self._nodeids.get(old.identity) == nodeid:
            del self._nodeids[old.identity]

    def clear(self) -> None:
        """Forget all, and free the memory."""
        self._by_node = OrderedDict()
        self._nodeids = {}

    def nodeid_of(self, identity: Identity) -> int:
        """The nodeid that an object had; 0 if it is not known."""
        return self._nodeids.get(identity, 0)
