"""Interest: which guest wants which events of each inode; the host is watched for their OR.

The RFC's fsnotify_update. Pure bookkeeping: returns what changed, sets no watch.
"""

from __future__ import annotations

from collections import Counter
from functools import reduce
from operator import or_

from protocol.masks import Mask

from ..events.event import RENAME, Event
from ..files.inode import Inode
from ..guests.guest import FIRST, SECOND, Guest
from ..guests.mount import MountGuest

_MOVED_FROM, _MOVED_TO = int(Mask.MOVED_FROM), int(Mask.MOVED_TO)
_LEAVES = int(Mask.DELETE | Mask.DELETE_SELF | Mask.MOVED_FROM | Mask.MOVED_TO)
_NOTHING = Mask(0)  # made once: an enum's call costs more than the look-up


class Interest:
    """Aggregated masks of all guests. The key None stands for the whole file system (nodeid 0)."""

    def __init__(self) -> None:
        self._marks: dict[Inode | None, dict[Guest, Mask]] = {}
        self._aggregates: dict[Inode | None, Mask] = {}
        self._counts: Counter[Guest] = Counter()

    def update(self, guest: Guest, inode: Inode | None, mask: Mask) -> tuple[Mask, Mask]:
        """Set a guest's mask of an inode; returns the aggregate before and after."""
        before = self.aggregate(inode)
        guests = self._marks.setdefault(inode, {})
        count = self._counts[guest] + bool(mask) - (guest in guests)
        if count:
            self._counts[guest] = count
        else:  # so that this keeps no disconnected guest alive
            self._counts.pop(guest, None)
        had = int(guests.get(guest, _NOTHING))
        if mask:
            guests[guest] = mask
        else:
            guests.pop(guest, None)
        if not guests:
            del self._marks[inode]
        bits = int(before) | int(mask)
        if had & ~int(mask):  # perhaps nobody wants these any more
            bits = reduce(or_, map(int, guests.values()), 0)
        if not bits:
            self._aggregates.pop(inode, None)
        elif bits != before:
            self._aggregates[inode] = Mask(bits)
        return before, self.aggregate(inode)

    def count(self, guest: Guest) -> int:
        """How many marks a guest has."""
        return self._counts[guest]

    def aggregate(self, inode: Inode | None) -> Mask:
        """The OR of all guests' masks of an inode."""
        return self._aggregates.get(inode, _NOTHING)

    def of(self, guest: Guest, inode: Inode | None) -> Mask:
        """One guest's mask of an inode, 0 if it has none."""
        return self._marks.get(inode, {}).get(guest, _NOTHING)

    def guests(self, inode: Inode | None) -> dict[Guest, Mask]:
        """The guests interested in an inode."""
        return self._marks.get(inode, {})

    def marks(self, guest: Guest) -> dict[Inode | None, Mask]:
        """All marks of a guest."""
        return {inode: g[guest] for inode, g in self._marks.items() if guest in g}

    def inodes(self) -> list[Inode]:
        """The inodes that any guest is interested in."""
        return [inode for inode in self._marks if inode is not None]

    # Events

    def follows(self, guest: Guest, event: Event) -> bool:
        """Whether a guest's kernel makes the event itself, from the replay of the one with the
        name.
        """
        named = event.part_of
        if named is None or not isinstance(guest, MountGuest):
            return False
        return bool(self.wanted_halves(guest, named))

    def wanted_halves(self, guest: Guest, event: Event) -> int:
        """Which halves of an event the guest asked for; 0 = none.

        A mount guest also gets events that remove, move or replace an object that it watches: its
        kernel makes the object's self events of them.
        """
        of = self.of
        whole = int(of(guest, None))
        kind = event.kind
        if kind == RENAME:
            assert event.node2 is not None
            halves = FIRST if (int(of(guest, event.node)) | whole) & _MOVED_FROM else 0
            if (int(of(guest, event.node2)) | whole) & _MOVED_TO:
                halves |= SECOND
        else:
            halves = FIRST if (int(of(guest, event.node)) | whole) & kind else 0
        if halves or not isinstance(guest, MountGuest) or not kind & _LEAVES:
            return halves
        ends = (event.child, event.replaced) if event.name else (event.node,)
        return FIRST if any(i is not None and of(guest, i) for i in ends) else 0
