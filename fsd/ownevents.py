"""A watched object's own events: which of those that stand ahead belong to a call.

Apart from the resolver, which says what follows of that. What is looked for here is in the order
in which one system call queues its events (see there).
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from protocol.inotify import RawEvent
from protocol.masks import STRUCTURE, Mask

from . import windows
from .inodes import Inode, InodeTable, is_below
from .watcher import Arrival, HostWatcher

_ISDIR, _ATTRIB, _MOVE_SELF = int(Mask.ISDIR), int(Mask.ATTRIB), int(Mask.MOVE_SELF)
_MOVED_FROM, _STRUCTURE = int(Mask.MOVED_FROM), int(STRUCTURE)
_NONE = RawEvent(-1, 0, 0, b"")


class Own(NamedTuple):
    """A watched object's own event that stands ahead."""

    inode: Inode
    number: int


class Moved(NamedTuple):
    """What the own events behind a rename's names say."""

    moved: Own | None = None
    lost: Own | None = None  # a link: what was overwritten
    end: int = 0  # index of the first arrival ahead that is behind them


class Rename(NamedTuple):
    """A rename of what is taken for ``child``, over ``replaced``; out of ``node`` and into
    ``node2``, where they are known.
    """

    arrival: Arrival
    node: Inode | None
    node2: Inode | None
    child: Inode | None
    replaced: Inode | None

    def may_be_of(self, inode: Inode, outside: Inode) -> bool:
        """Whether what moved itself can be what was renamed.

        Where it is not, it was renamed right after that, in directories that are not watched.
        """
        if inode.is_dir != bool(self.arrival.raw.mask & _ISDIR):
            return False
        if self.child is not None and not self.child.is_placeholder:
            return self.child is inode
        if any(place is not None and is_below(place, inode) for place in (self.node, self.node2)):
            return False  # nothing moves out of, or into, itself
        here = (None, outside) if self.node is None else (None, outside, self.node)
        return not inode.is_dir or inode.parent in here


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
        """Whether there may be more of the system call that queued ``arrival`` than at the last
        look; reads what has come.
        """
        before = self._watcher.backlog
        if before >= windows.TWIN_WINDOW:
            return False
        os.sched_yield()
        self._watcher.drain()
        return self._watcher.backlog > before or time.monotonic() < arrival.stamp + windows.OWN_WAIT

    def expected(self, inode: Inode, bits: int, arrival: Arrival) -> bool:
        """Whether the events ``bits`` of an inode are in the queue beside ``arrival``."""
        return self._watcher.reports(inode, bits, arrival.number)

    def of_rename(self, rename: Rename) -> Moved:
        """The own events of a rename."""
        child, replaced = rename.child, rename.replaced
        moves = child is not None and self.expected(child, _MOVE_SELF, rename.arrival)
        loses = replaced is not None and self.expected(replaced, _ATTRIB, rename.arrival)
        while True:
            own = self._side_by_side(rename) or self._among_others(rename)
            if own.moved is not None or not (moves or (loses and own.lost is None)):
                return own
            if not self.look_again(rename.arrival):
                return own

    def _side_by_side(self, rename: Rename) -> Moved | None:
        ahead = self.ahead(2)
        lost = None
        if ahead and not ahead[0].raw.name and ahead[0].raw.mask & _ATTRIB:
            inode = self._watcher.inode_of(ahead[0].raw.wd)
            if inode is not None:
                lost = Own(inode, ahead.pop(0).number)
        if ahead and not ahead[0].raw.name and ahead[0].raw.mask & _MOVE_SELF:
            inode = self._watcher.inode_of(ahead[0].raw.wd)
            if inode is not None and rename.may_be_of(inode, self._table.outside):
                return Moved(Own(inode, ahead[0].number), lost, 2 if lost is not None else 1)
        return None

    def _among_others(self, rename: Rename) -> Moved:
        """The same with other processes' events between them: of what is known, or of a directory
        from out of sight that takes the place of what leaves by the same name.
        """
        lost, end = None, 0
        nodes = (node for node in (rename.node, rename.node2) if node is not None)
        ((over, change),) = self.changes(0, 1, *nodes)
        swaps = change.mask & _MOVED_FROM and change.name == rename.arrival.raw.name
        from_outside = swaps and rename.node is None
        for index, ahead in enumerate(self.ahead(over)):
            raw = ahead.raw
            inode = self._watcher.inode_of(raw.wd)
            if inode is None or raw.name:
                continue
            if raw.mask & _MOVE_SELF and (
                inode is rename.child
                or (from_outside and inode.is_dir and rename.may_be_of(inode, self._table.outside))
            ):
                return Moved(Own(inode, ahead.number), lost, index + 1)
            if inode is rename.replaced and raw.mask & _ATTRIB and lost is None:
                lost, end = Own(inode, ahead.number), index + 1
        return Moved(None, lost, end)

    def changes(self, start: int, count: int, *nodes: Inode) -> list[tuple[int, RawEvent]]:
        """The next changes of names in a rename's directories, from index ``start`` ahead on, with
        their indices; _NONE for what is not there.

        A rename holds its directories' locks: the first that it has not made is behind all it has.
        """
        wds = {self._watcher.wd_of(node) for node in nodes}
        found = [
            (start + index, arrival.raw)
            for index, arrival in enumerate(self.ahead(start + windows.TWIN_WINDOW)[start:])
            if arrival.raw.name and arrival.raw.mask & _STRUCTURE and arrival.raw.wd in wds
        ]
        return (found + count * [(start + windows.TWIN_WINDOW, _NONE)])[:count]

    def first_move(self, start: int, stop: int, *inodes: Inode) -> Own | None:
        """The first MOVE_SELF of one of these among the arrivals ahead, ``start`` to ``stop``."""
        for ahead in self.ahead(stop)[start:]:
            inode = self._watcher.inode_of(ahead.raw.wd)
            if inode is not None and inode in inodes and ahead.raw.mask & _MOVE_SELF:
                return Own(inode, ahead.number)
        return None
