"""Finds which queued events one system call has made. Pure: the resolver reads the queue, waits,
and draws the conclusions.

Events are matched in the order in which one system call queues them (see ``resolver``), among
events of others that may stand between (windows.CALL_WINDOW).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from protocol.inotify import RawEvent
from protocol.masks import STRUCTURE, Mask

from ..files.inode import Inode, is_below
from ..pacing import windows
from .backlog import Arrival

_ISDIR, _ATTRIB, _MOVE_SELF = int(Mask.ISDIR), int(Mask.ATTRIB), int(Mask.MOVE_SELF)
_MOVED_FROM, _STRUCTURE, _DELETE = int(Mask.MOVED_FROM), int(STRUCTURE), int(Mask.DELETE)
_ENDS = int(Mask.DELETE_SELF | Mask.IGNORED)
_NONE = RawEvent(-1, 0, 0, b"")
AHEAD = 4 * windows.CALL_WINDOW
"""Arrivals that are examined at most: an exchange is four names, each within a window."""

Place = tuple[Inode, bytes]
Ahead = Sequence[Arrival]
"""The arrivals behind the current one, up to AHEAD."""


class Watches(Protocol):
    """What is watched, and for which events."""

    def inode_of(self, wd: int) -> Inode | None:
        """The inode of a watch."""

    def wd_of(self, inode: Inode) -> int:
        """The watch of an inode, -1 if it has none."""

    def mask_of(self, inode: Inode) -> Mask:
        """The mask of its watch."""

    def would_queue(self, inode: Inode, bits: int, number: int) -> bool:
        """Whether these events of an inode would be queued next to the arrival of that number."""


class SelfEvent(NamedTuple):
    """A watched object's self event, further on in the queue."""

    inode: Inode
    number: int


class Moved(NamedTuple):
    """What the self events behind a rename's names show."""

    moved: SelfEvent | None = None
    lost: SelfEvent | None = None  # a link: of the overwritten object
    end: int = 0  # index of the first arrival behind them
    ended: tuple[int, ...] = ()  # numbers of the overwritten object's end
    is_all: bool = True  # all required ones are present


class Rename(NamedTuple):
    """A rename of ``child`` (assumed) over ``replaced``, out of ``node`` and into ``node2``, if
    those are known. ``is_sure``: all names of ``node2`` are known.
    """

    arrival: Arrival
    node: Inode | None
    node2: Inode | None
    child: Inode | None
    replaced: Inode | None
    is_sure: bool = False

    def may_lose(self, inode: Inode) -> bool:
        """Whether an object that has lost a link can be the overwritten one."""
        replaced = self.replaced
        return not self.is_sure or replaced is inode or bool(replaced and replaced.is_placeholder)

    def may_be_of(self, inode: Inode, outside: Inode) -> bool:
        """Whether an object that moved can be the renamed one.

        If not, it was renamed right after that, in directories that are not watched.
        """
        if inode.is_dir != bool(self.arrival.raw.mask & _ISDIR):
            return False
        if self.child is not None and not self.child.is_placeholder:
            return self.child is inode
        if any(place is not None and is_below(place, inode) for place in (self.node, self.node2)):
            return False  # nothing moves out of, or into, itself
        here = (None, outside) if self.node is None else (None, outside, self.node)
        return not inode.is_dir or inode.parent in here


class Removal(NamedTuple):
    """An unlink or rmdir, whose self events stand before its DELETE."""

    delete: Arrival
    parent: Inode
    died: bool
    numbers: list[int]  # of its own events that stand ahead


class Back(NamedTuple):
    """A second rename, from the new place of a first one to its old place: RENAME_EXCHANGE queues
    such a pair, and so does a program that moves the object back.
    """

    cookie: int
    end: int  # index of its last name among the arrivals ahead
    stop: int  # of the next name that another call has changed
    is_beside: bool  # no event stands between its names


class Calls:
    """Separates system calls, given what is watched. ``outside``: the directory of directories
    whose place is unknown.
    """

    def __init__(self, watches: Watches, outside: Inode) -> None:
        self._watches = watches
        self._outside = outside

    def removal(
        self,
        node: Inode,
        arrival: Arrival,
        ahead: Ahead,
        child_of: Callable[[Inode, bytes], Inode | None],
    ) -> Removal | None:
        """The unlink or rmdir to which an ATTRIB or a death of ``node`` belongs, and whose DELETE
        comes next. ``child_of``: the last known object of a name.
        """
        died = not arrival.raw.mask & _ATTRIB
        if died != node.is_dir and int(self._watches.mask_of(node)) & _ATTRIB:
            return None  # a chmod; or the last link of a file went before, while it was open
        numbers = []
        for later in ahead[:3]:
            raw = later.raw
            if raw.wd == arrival.raw.wd and raw.mask & _ENDS:
                died = True
                numbers.append(later.number)
                continue
            parent = self._watches.inode_of(raw.wd)
            is_dir = bool(raw.mask & _ISDIR)
            if not raw.name or not raw.mask & _DELETE or parent is None or is_dir != node.is_dir:
                return None
            known = child_of(parent, raw.name)
            if known is not node and not (died and (known is None or known.is_placeholder)):
                return None
            return Removal(later, parent, died, numbers)
        return None

    def renamed(self, rename: Rename, ahead: Ahead) -> Moved:
        """The self events of a rename."""
        child, replaced, number = rename.child, rename.replaced, rename.arrival.number
        moves = child is not None and self._watches.would_queue(child, _MOVE_SELF, number)
        loses = replaced is not None and self._watches.would_queue(replaced, _ATTRIB, number)
        own = self._side_by_side(rename, ahead) or self._among_others(rename, ahead)
        is_all = own.moved is not None or not (moves or (loses and own.lost is None))
        ended = self._end_of(own.lost.inode, ahead, own.end) if own.lost is not None else ()
        return own._replace(ended=ended, is_all=is_all)

    def _own(self, ahead: Ahead, index: int, bits: int) -> SelfEvent | None:
        if index >= len(ahead) or ahead[index].raw.name or not ahead[index].raw.mask & bits:
            return None
        inode = self._watches.inode_of(ahead[index].raw.wd)
        return None if inode is None else SelfEvent(inode, ahead[index].number)

    def _side_by_side(self, rename: Rename, ahead: Ahead) -> Moved | None:
        lost = self._own(ahead, 0, _ATTRIB)
        index = 0 if lost is None else 1
        if lost is not None and not rename.may_lose(lost.inode):
            lost = None  # another call's
        moved = self._own(ahead, index, _MOVE_SELF)
        if moved is None or not rename.may_be_of(moved.inode, self._outside):
            return None
        return Moved(moved, lost, index + 1)

    def _among_others(self, rename: Rename, ahead: Ahead) -> Moved:
        """The same with other processes' events between them: those of known objects, or of a
        directory from out of sight that takes the place of the leaving one under the same name.
        """
        lost, end = None, 0
        nodes = (node for node in (rename.node, rename.node2) if node is not None)
        ((over, change),) = self.changes(ahead, 0, 1, *nodes)
        swaps = change.mask & _MOVED_FROM and change.name == rename.arrival.raw.name
        from_outside = swaps and rename.node is None
        for index in range(min(over, len(ahead))):
            own = self._own(ahead, index, _MOVE_SELF | _ATTRIB)
            if own is None:
                continue
            mask = ahead[index].raw.mask
            if mask & _MOVE_SELF and (
                own.inode is rename.child
                or (
                    from_outside and own.inode.is_dir and rename.may_be_of(own.inode, self._outside)
                )
            ):
                return Moved(own, lost, index + 1)
            if own.inode is rename.replaced and mask & _ATTRIB and lost is None:
                lost, end = own, index + 1
        return Moved(None, lost, end)

    def _end_of(self, inode: Inode, ahead: Ahead, start: int) -> tuple[int, ...]:
        """Numbers of the death of the object that a rename overwrote, which comes after its self
        events.
        """
        wd = self._watches.wd_of(inode)
        numbers = []
        for later in ahead[start : start + 2]:
            if later.raw.wd != wd or not later.raw.mask & _ENDS:
                break
            numbers.append(later.number)
        return tuple(numbers)

    def changes(
        self, ahead: Ahead, start: int, count: int, *nodes: Inode
    ) -> list[tuple[int, RawEvent]]:
        """The next changes of names in a rename's directories, from index ``start`` on, with their
        indices; _NONE if there is none.

        A rename holds its directories' locks: the first change by another call comes after all of
        its own.
        """
        wds = {self._watches.wd_of(node) for node in nodes}
        stop = start + windows.CALL_WINDOW
        found = [
            (start + index, arrival.raw)
            for index, arrival in enumerate(ahead[start:stop])
            if arrival.raw.name and arrival.raw.mask & _STRUCTURE and arrival.raw.wd in wds
        ]
        return (found + count * [(stop, _NONE)])[:count]

    def may_come_back(self, ahead: Ahead, start: int, old: Place, new: Place) -> bool:
        """Whether a rename from ``new`` to ``old`` that is not there yet may be the next change of
        names: at most its first half is.
        """
        (_, out), (_, second) = self.changes(ahead, start, 2, old[0], new[0])
        if out is _NONE:
            return True
        is_half = out.mask & _MOVED_FROM and (self._watches.inode_of(out.wd), out.name) == new
        return bool(is_half) and second is _NONE

    def way_back(self, ahead: Ahead, start: int, old: Place, new: Place) -> Back | None:
        """The rename from ``new`` to ``old``, if it is the next change of names there."""
        (_, out), (end, there), (stop, _) = self.changes(ahead, start, 3, old[0], new[0])
        places = [(self._watches.inode_of(raw.wd), raw.name) for raw in (out, there)]
        if places != [new, old] or not out.mask & _MOVED_FROM or out.cookie != there.cookie:
            return None
        return Back(out.cookie, end, stop, is_beside=end == start + 1)

    def way_out(self, ahead: Ahead, start: int, place: Place) -> Back | None:
        """The MOVED_FROM of that name, if it is the next change of names there: half of an exchange
        with an unwatched name.
        """
        (end, out), (stop, _) = self.changes(ahead, start, 2, place[0])
        if not out.mask & _MOVED_FROM or out.name != place[1]:
            return None
        return Back(out.cookie, end, stop, is_beside=end == start)

    def first_move(self, ahead: Ahead, start: int, stop: int, *inodes: Inode) -> SelfEvent | None:
        """The first MOVE_SELF of one of these inodes among the arrivals from ``start`` to
        ``stop``.
        """
        for index in range(start, min(stop, len(ahead))):
            own = self._own(ahead, index, _MOVE_SELF)
            if own is not None and own.inode in inodes:
                return own
        return None

    def touched(self, child: Inode, mask: int, ahead: Ahead) -> SelfEvent | None:
        """The self event that belongs to the event of an object's name."""
        wd = self._watches.wd_of(child)
        for later in ahead[: windows.CALL_WINDOW]:
            if later.raw.wd == wd and later.raw.mask == mask:
                return SelfEvent(child, later.number)
        return None
