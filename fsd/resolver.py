"""From the host queue's raw events to Events: names become inodes *as of the event*.

By the time an event is read the name may be gone, or stand for something newer. The watched
directory's listing, moved on by each event, says what the name stood for; where it does not know,
the server looks, and believes what it sees only if no later event of that name is waiting.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

from protocol.frames import FSD_NAME
from protocol.masks import Mask

from .events import RENAME, Event
from .inodes import Inode
from .listings import Known, Listing, of_inode
from .passthrough import PassthroughFS
from .watcher import Arrival, HostWatcher

_CREATE = int(Mask.CREATE)
_DELETE = int(Mask.DELETE)
_MOVED_FROM = int(Mask.MOVED_FROM)
_MOVED_TO = int(Mask.MOVED_TO)
_ISDIR = int(Mask.ISDIR)
_MOVE_SELF = int(Mask.MOVE_SELF)
_ATTRIB = int(Mask.ATTRIB)
_IGNORED = int(Mask.IGNORED)
_OVERFLOW = int(Mask.Q_OVERFLOW)

RENAME_WAIT = 0.005
"""Seconds that a MOVED_FROM waits for its other half: the kernel queues both in one system call,
microseconds apart, unless the renaming process is preempted between them."""
_EXCHANGE_WINDOW = 8
"""Events among which the second pair of a RENAME_EXCHANGE stands (MOVE_SELFs come between)."""
RENAME_WINDOW = 128
"""Events behind a MOVED_FROM after which its other half is no longer expected."""


class Resolver:
    """Turns arrivals into Events. Owns the meaning of listings, not the watches."""

    def __init__(self, fs: PassthroughFS, watcher: HostWatcher) -> None:
        self._fs = fs
        self._table = fs.table
        self._watcher = watcher
        self.waiting_until: float | None = None

    def next(self) -> Iterator[Event]:
        """Events of the next arrival (none, one, or more). ``waiting_until`` is set, and nothing
        returned, while a MOVED_FROM waits for its other half.
        """
        arrival = self._watcher.pop()
        raw = arrival.raw
        if raw.mask & _OVERFLOW:
            yield Event(self._table.root, _OVERFLOW, b"", 0, arrival.origin, arrival.stamp)
            return
        node = self._watcher.inode_of(raw.wd)
        if raw.mask & _IGNORED:
            self._watcher.forget(raw.wd)
        if node is None or (node is self._table.root and raw.name == FSD_NAME):
            return
        if not raw.name:
            if raw.mask & _MOVE_SELF and node.is_dir and not self._is_placed(node):
                self._table.lose(node)
            event = Event(node, raw.mask, b"", 0, arrival.origin, arrival.stamp)
            event.implied = bool(raw.mask & _ATTRIB) and self._is_unlinked_next(node)
            yield event
            return
        if raw.mask & _MOVED_FROM:
            other = self._other_half(arrival)
            if self.waiting_until is not None:
                self._watcher.push_back(arrival)
                return
            if other is not None:
                yield from self._renamed(node, arrival, other)
                return
        yield self._named(node, arrival)

    def _is_unlinked_next(self, node: Inode) -> bool:
        """Whether an ATTRIB is the lost link of a DELETE, queued just before it."""
        self._watcher.drain()
        for raw in (ahead.raw for ahead in self._watcher.peek(3)):
            if raw.name:
                parent = self._watcher.inode_of(raw.wd)
                if not raw.mask & _DELETE or parent is None:
                    return False
                before = listing(parent).names.get(raw.name)
                return self._known_child(parent, raw.name, before) is node
        return False

    def _is_placed(self, node: Inode) -> bool:
        """Whether its directory is watched, so that its removals and renames come with a name."""
        return node.parent is not None and bool(self._watcher.mask_of(node.parent))

    def _other_half(self, arrival: Arrival) -> Arrival | None:
        self.waiting_until = None
        cookie = arrival.raw.cookie
        other = self._watcher.take_moved_to(cookie, RENAME_WINDOW)
        if other is None:
            self._watcher.drain()
            other = self._watcher.take_moved_to(cookie, RENAME_WINDOW)
        deadline = arrival.stamp + RENAME_WAIT
        waiting = self._watcher.backlog < RENAME_WINDOW and time.monotonic() < deadline
        if other is None and waiting:
            self.waiting_until = deadline
        return other

    def _renamed(self, node: Inode, first: Arrival, second: Arrival) -> Iterator[Event]:
        node2 = self._watcher.inode_of(second.raw.wd)
        if node2 is None:
            yield self._named(node, first)
            return
        yield self.renamed(node, node2, first, second)

    def renamed(self, node: Inode, node2: Inode, first: Arrival, second: Arrival) -> Event:
        """A rename between two watched directories; moves the listings on."""
        name, name2 = first.raw.name, second.raw.name
        replaced = self._overwritten(node2, name2)
        before = listing(node).names.pop(name, None)
        child = self._self_moved(first) or self._known_child(node, name, before)
        if child is None or child.is_dir != bool(first.raw.mask & _ISDIR):
            child = self._look(node2, second)
        event = Event(
            node, RENAME | (first.raw.mask & _ISDIR), name, first.raw.cookie, first.origin,
            first.stamp, child, before=before, node2=node2, name2=name2,
        )  # fmt: skip
        self._replace(event, node2, name2, child, replaced)
        self._table.displace(node, name, child)
        self._table.place(child, node2, name2)
        if event.replaced is not None:
            event.exchanged = self._exchanged(event, event.replaced)
            if event.exchanged:
                listing(node).names[name] = of_inode(event.replaced)
                self._table.place(event.replaced, node, name)
        return event

    def _exchanged(self, event: Event, replaced: Inode) -> int:
        """Cookie of the second pair, back, that RENAME_EXCHANGE queues; 0 for a plain rename."""
        self._watcher.drain()
        ahead = [arrival.raw for arrival in self._watcher.peek(_EXCHANGE_WINDOW)]
        pair = [raw for raw in ahead if raw.mask & RENAME][:2]
        if [raw.name for raw in pair] != [event.name2, event.name]:
            return 0
        back, there = pair
        nodes = (self._watcher.inode_of(back.wd), self._watcher.inode_of(there.wd))
        if back.cookie != there.cookie or nodes != (event.node2, event.node):
            return 0
        moved = [
            self._watcher.inode_of(raw.wd)
            for raw in ahead[ahead.index(there) + 1 :]
            if raw.mask & _MOVE_SELF
        ]
        assert event.child is not None
        if not self._is_exchange(event.child, replaced, moved[:1]):
            return 0
        self._watcher.drop_rename(back.cookie, _EXCHANGE_WINDOW)
        return back.cookie

    def _is_exchange(self, child: Inode, replaced: Inode, moved: list[Inode | None]) -> bool:
        """Tell an exchange from a rename over and a rename back, which queue the same names.

        By what moved itself last, where one of the two is watched; else by their kinds, or by
        whether the replaced object lives on.
        """
        if child.is_dir != replaced.is_dir:
            return True
        if self._watcher.mask_of(child):
            return child not in moved
        if self._watcher.mask_of(replaced):
            return replaced in moved
        return bool(self._links(replaced))

    def _swapped(self, event: Event, wd: int, replaced: Inode) -> int:
        """The same for an exchange with a name that is not watched: MOVED_TO, MOVED_FROM."""
        self._watcher.drain()
        ahead = [a.raw for a in self._watcher.peek(_EXCHANGE_WINDOW) if a.raw.mask & RENAME][:1]
        if not ahead or (ahead[0].wd, ahead[0].name) != (wd, event.name):
            return 0
        assert event.child is not None
        if event.child.is_dir == replaced.is_dir and not self._links(replaced):
            return 0
        self._watcher.drop_rename(ahead[0].cookie, _EXCHANGE_WINDOW)
        return ahead[0].cookie

    def _overwritten(self, node: Inode, name: bytes) -> Inode | None:
        """What a MOVED_TO node/name overwrites; asked before a look at the newcomer, which takes
        the place of what was known there.
        """
        before = listing(node).names.get(name)
        if before is None:
            return None
        known = self._known_child(node, name, before)
        return known or self._table.placeholder(before.kind, node, name)

    def _replace(
        self, event: Event, node: Inode, name: bytes, child: Inode, replaced: Inode | None
    ) -> None:
        """MOVED_TO node/name: what it overwrote, and the listing after it."""
        names = listing(node).names
        before = names.get(name)
        if replaced is not None:
            event.replaced = replaced
            event.nlink = self._links_before(replaced)
        if event.node2 is None:
            event.before = before
        names[name] = of_inode(child)

    def _named(self, node: Inode, arrival: Arrival) -> Event:
        raw = arrival.raw
        name, mask = raw.name, raw.mask
        event = Event(node, mask, name, raw.cookie, arrival.origin, arrival.stamp)
        names = listing(node).names
        before = event.before = names.get(name)
        if mask & (_DELETE | _MOVED_FROM):
            names.pop(name, None)
            child = self._self_moved(arrival) or self._known_child(node, name, before)
            if child is None or child.is_dir != bool(mask & _ISDIR):
                child = self._gone(node, raw.name, mask)
            event.child = child
            if mask & _DELETE:
                event.nlink = self._links_before(child)
            self._table.displace(node, name, child)
            if mask & _MOVED_FROM and child.is_dir:
                self._table.lose(child)
            elif (child.parent, child.name) == (node, name):
                child.parent = None  # other links may be left, at names that nobody looked up
        elif mask & _MOVED_TO:
            replaced = self._overwritten(node, name)
            event.child = self._self_moved(arrival) or self._look(node, arrival)
            self._replace(event, node, name, event.child, replaced)
            self._table.place(event.child, node, name)
            if event.replaced is not None:
                event.exchanged = self._swapped(event, raw.wd, event.replaced)
        else:
            if mask & _CREATE:
                child = None
                if name in node.children:
                    self._table.displace(node, name, node.children[name])
            else:
                child = self._known_child(node, name, before)
                if child is not None and child.is_dir != bool(mask & _ISDIR):
                    # A file that is still open under a name that stands for another by now.
                    event.child = self._gone(node, name, mask)
                    return event
            event.child = child or self._look(node, arrival)
            names[name] = of_inode(event.child)
        return event

    def _self_moved(self, arrival: Arrival) -> Inode | None:
        """What was renamed, if it is watched: its own MOVE_SELF is queued by the same call."""
        if not arrival.raw.mask & RENAME:
            return None
        self._watcher.drain()
        for raw in (ahead.raw for ahead in self._watcher.peek(2)):
            if raw.mask & _MOVE_SELF:
                inode = self._watcher.inode_of(raw.wd)
                is_dir = bool(arrival.raw.mask & _ISDIR)
                return inode if inode is not None and inode.is_dir == is_dir else None
            if raw.name:
                return None
        return None

    def _known_child(self, node: Inode, name: bytes, before: Known | None) -> Inode | None:
        """What the name stood for: from the listing, or from what a guest looked up where the
        listing has nothing, or only a placeholder for what was gone when it was made.
        """
        listed = before.inode if before is not None else None
        if listed is not None and not listed.is_placeholder:
            return self._table.current(listed)
        child = node.children.get(name)
        if child is None or child.is_placeholder:
            return listed
        if before is not None and listed is None and child.identity[1] != before.ino:
            return None
        return child

    def _gone(self, node: Inode, name: bytes, mask: int) -> Inode:
        return self._table.placeholder(stat.S_IFDIR if mask & _ISDIR else stat.S_IFREG, node, name)

    def _look(self, node: Inode, arrival: Arrival) -> Inode:
        """The object behind a name now, unless a waiting event says that it is another by now."""
        name, mask, wd = arrival.raw.name, arrival.raw.mask, arrival.raw.wd
        if not self._watcher.is_leaving(wd, name):
            try:
                inode = self._fs.peek(node, name).inode
            except OSError:
                pass
            else:
                self._watcher.drain()
                is_dir = bool(mask & _ISDIR)
                if inode.is_dir == is_dir and not self._watcher.is_leaving(wd, name):
                    return inode
        return self._gone(node, name, mask)

    def _links_before(self, child: Inode) -> int:
        """Link count of a removed object just before the removal."""
        return 1 if child.is_placeholder or child.is_dir else self._links(child) + 1

    def _links(self, inode: Inode) -> int:
        """Link count now; 0 where the object is gone."""
        try:
            with self._table.opened(inode) as fd:
                return os.fstat(fd).st_nlink
        except OSError:
            return 0


def listing(node: Inode) -> Listing:
    """The directory's listing, made when first needed."""
    if node.listing is None:
        node.listing = Listing()
    return node.listing
