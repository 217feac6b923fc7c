"""A watched object's own events: which of those that stand ahead belong to a call.

Apart from the resolver, which says what follows of that. What is looked for here is in the order
in which one system call queues its events (see there).
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from protocol.masks import Mask

from .inodes import Inode, InodeTable, is_below
from .watcher import Arrival, HostWatcher

_ISDIR, _ATTRIB, _MOVE_SELF = int(Mask.ISDIR), int(Mask.ATTRIB), int(Mask.MOVE_SELF)
OWN_WAIT = 0.0002
"""Seconds that an object's own event, which the kernel queues right after the one with the name, is
waited for: the queue may have been read between the two."""
TWIN_WINDOW = 8
"""Events behind one with a name among which its nameless twin stands: other processes' come
between."""


class Own(NamedTuple):
    """A watched object's own event that stands ahead."""

    inode: Inode
    number: int


class Moved(NamedTuple):
    """What the own events behind a rename's names say."""

    moved: Own | None = None
    lost: Own | None = None  # a link: what was overwritten
    length: int = 0  # how many arrivals they are


class OwnEvents:
    """Looks ahead in the queue; takes nothing out of it."""

    def __init__(self, table: InodeTable, watcher: HostWatcher) -> None:
        self._table = table
        self._watcher = watcher

    def ahead(self, count: int) -> list[Arrival]:
        """The next arrivals."""
        if self._watcher.backlog < count:
            self._watcher.drain()
        return self._watcher.peek(count)

    def look_again(self, arrival: Arrival) -> bool:
        """Whether more may come of the system call that queued ``arrival``; reads what has."""
        if self._watcher.backlog >= TWIN_WINDOW:
            return False
        os.sched_yield()
        self._watcher.drain()
        return time.monotonic() < arrival.stamp + OWN_WAIT

    def expected(self, inode: Inode, bits: int, arrival: Arrival) -> bool:
        """Whether the events ``bits`` of an inode are in the queue beside ``arrival``."""
        return self._watcher.reports(inode, bits, arrival.number)

    def of_rename(
        self,
        arrival: Arrival,
        node: Inode | None,
        node2: Inode | None,
        child: Inode | None,
        replaced: Inode | None,
    ) -> Moved:
        """The own events of a rename of what is taken for ``child``; out of ``node`` and into
        ``node2``, where they are known.
        """
        moves = child is not None and self.expected(child, _MOVE_SELF, arrival)
        loses = replaced is not None and self.expected(replaced, _ATTRIB, arrival)
        while True:
            own = self._own_moves(arrival, node, node2, child, replaced)
            if own.moved is not None or not (moves or (loses and own.lost is None)):
                return own
            if not self.look_again(arrival):
                return own

    def _own_moves(
        self,
        arrival: Arrival,
        node: Inode | None,
        node2: Inode | None,
        child: Inode | None,
        replaced: Inode | None,
    ) -> Moved:
        ahead = self.ahead(2)
        lost = None
        if ahead and not ahead[0].raw.name and ahead[0].raw.mask & _ATTRIB:
            inode = self._watcher.inode_of(ahead[0].raw.wd)
            if inode is not None:
                lost = Own(inode, ahead[0].number)
        if lost is not None:
            ahead = ahead[1:]
        if ahead and not ahead[0].raw.name and ahead[0].raw.mask & _MOVE_SELF:
            inode = self._watcher.inode_of(ahead[0].raw.wd)
            is_dir = bool(arrival.raw.mask & _ISDIR)
            alike = inode is not None and inode.is_dir == is_dir
            if inode is not None and alike and self._may_be(inode, node, node2, child):
                moved = Own(inode, ahead[0].number)
                return Moved(moved, lost, 2 if lost is not None else 1)
        if lost is not None and lost.inode is replaced:
            return Moved(None, lost, 1)
        return Moved()

    def _may_be(
        self, inode: Inode, node: Inode | None, node2: Inode | None, known: Inode | None
    ) -> bool:
        """Whether what moved itself can be what a rename's name is taken for.

        Where it is not, it was renamed right after that, in directories that are not watched.
        """
        if known is not None and not known.is_placeholder:
            return known is inode
        if any(place is not None and is_below(place, inode) for place in (node, node2)):
            return False  # nothing moves out of, or into, itself
        here = (None, self._table.outside) if node is None else (None, self._table.outside, node)
        return not inode.is_dir or inode.parent in here
