"""Turns the host queue's raw events into Events: names become inodes *as of the event*.

By the time an event is read the name may be gone, or stand for something newer. The watched
directory's listing, which each event updates, shows what the name stood for. If the listing does
not know, the server looks at the file, and uses the result only if no later event of that name is
waiting.

A watched object's self events prove or disprove that, because one system call queues them together:

    a touch or an open      NAME, self
    unlink, rmdir           self ATTRIB (files), if it was the end DELETE_SELF and IGNORED, NAME
    rename                  NAME, NAME, ATTRIB of the overwritten object, MOVE_SELF of the moved one

(fs/notify/fsnotify.c, include/linux/fsnotify.h, fs/namei.c, fs/dcache.c.) A self event counts as
part of the named event only if it is where the kernel would have queued it. Otherwise it is
delivered separately, and the name resolves to a placeholder: so guests see each event once, even if
something is not known.

Longer than other modules, because the cases of a name share what is known of the waiting events.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress

from protocol.frames import FSD_NAME
from protocol.masks import EVENTS, SELF, STRUCTURE, Mask

from ..files.inode import Inode
from ..files.listing import Known, listing, of_inode
from ..files.passthrough import PassthroughFS
from ..linux import syscalls
from ..pacing import windows
from .backlog import Arrival
from .calls import AHEAD, Ahead, Back, Calls, Moved, Place, Rename, SelfEvent
from .event import RENAME, Event
from .lostnames import LostNames
from .watcher import HostWatcher

_CREATE = int(Mask.CREATE)
_DELETE = int(Mask.DELETE)
_MOVED_FROM = int(Mask.MOVED_FROM)
_MOVED_TO = int(Mask.MOVED_TO)
_ISDIR = int(Mask.ISDIR)
_MOVE_SELF, _DELETE_SELF = int(Mask.MOVE_SELF), int(Mask.DELETE_SELF)
_ATTRIB, _CLOSE = int(Mask.ATTRIB), int(Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE)
_IGNORED = int(Mask.IGNORED)
_TOUCHES = int(EVENTS & ~STRUCTURE & ~SELF)
_OVERFLOW = int(Mask.Q_OVERFLOW)


class Resolver:
    """Turns arrivals into Events. Updates the listings, but not the watches."""

    def __init__(self, fs: PassthroughFS, watcher: HostWatcher) -> None:
        self._fs = fs
        self._table = fs.table
        self._watcher = watcher
        self._calls = Calls(watcher, fs.table.outside)
        self.waiting_until: float | None = None
        # SelfEvent events that stand further on, by their number: the one with the name.
        self._parts: dict[int, Event] = {}
        self._removals: dict[int, Event] = {}  # of DELETEs that stand further on
        self._lost_link: Inode | None = None  # the last arrival was its ATTRIB
        self._lost_names = LostNames()

    def next(self) -> Iterator[Event]:
        """Events of the next arrival (none, one, or more). While a MOVED_FROM waits for its other
        half, ``waiting_until`` is set, and nothing is returned.
        """
        arrival = self._watcher.queue.pop()
        raw = arrival.raw
        if len(self._parts) + len(self._removals) > self._watcher.backlog + 1:  # some were dropped
            for found in (self._parts, self._removals):
                for number in [number for number in found if number < arrival.number]:
                    del found[number]
        if raw.mask & _OVERFLOW:
            yield Event(self._table.root, _OVERFLOW, b"", 0, arrival.origin, arrival.stamp)
            return
        node = self._watcher.inode_of(raw.wd)
        if node is None or (node is self._table.root and raw.name == FSD_NAME):
            return
        if not raw.name:
            yield from self._own(node, arrival)
            return
        if raw.mask & _MOVED_FROM:
            other = self._other_half(arrival)
            if self.waiting_until is not None:
                self._watcher.queue.push_back(arrival)
                return
            if other is not None:
                yield from self._renamed(node, arrival, other)
                return
        event = self._named(node, arrival)
        event.unlinked = _is_unlinked(event)
        yield event
        self._lost_link = None

    def _own(self, node: Inode, arrival: Arrival) -> Iterator[Event]:
        """A self event."""
        raw = arrival.raw
        event = Event(node, raw.mask, b"", 0, arrival.origin, arrival.stamp)
        if arrival.number in self._parts:
            event.part_of = self._parts.pop(arrival.number)
        elif raw.mask & (_ATTRIB | _DELETE_SELF | _IGNORED):
            event.part_of = self._removal(node, arrival)
        if node.is_dir and event.part_of is None and self._is_elsewhere(node, arrival):
            self._table.lose(node)
        self._lost_link = node if raw.mask & _ATTRIB else None
        if raw.mask & _IGNORED:
            self._watcher.forget(raw.wd)
        yield event

    def _is_elsewhere(self, directory: Inode, arrival: Arrival) -> bool:
        """Whether the directory is not at its known place: its self event came without the
        name's.
        """
        if arrival.raw.mask & _MOVE_SELF:
            return True
        bits = arrival.raw.mask & _TOUCHES
        parent = directory.parent
        if parent is None or parent.identity.mount != directory.identity.mount:
            return False  # at the root of a mount, the directory above gets no event
        return self._watcher.would_queue(parent, bits, arrival.number)

    def _ahead(self, count: int = AHEAD) -> Ahead:
        """The next arrivals so far that are not known to be parts of calls."""
        if self._watcher.backlog < count:
            self._watcher.drain()
        if not self._parts:
            return self._watcher.queue.peek(count)
        ahead = self._watcher.queue.peek(count + len(self._parts))
        return [arrival for arrival in ahead if arrival.number not in self._parts]

    def _look_again(self, arrival: Arrival, wait: float = windows.SELF_WAIT) -> bool:
        """Whether there may be more of the system call that queued ``arrival`` than at the last
        look, for ``wait`` seconds after it; reads what has come.
        """
        before = self._watcher.backlog
        if before >= windows.CALL_WINDOW:
            return False
        os.sched_yield()
        self._watcher.drain()
        return self._watcher.backlog > before or time.monotonic() < arrival.stamp + wait

    def _expected(self, inode: Inode, bits: int, arrival: Arrival) -> bool:
        """Whether the events ``bits`` of an inode are in the queue next to ``arrival``."""
        return self._watcher.would_queue(inode, bits, arrival.number)

    def _removal(self, node: Inode, arrival: Arrival) -> Event | None:
        """The unlink or rmdir to which an ATTRIB or a death belongs, and whose DELETE comes
        next.
        """
        removal = self._calls.removal(node, arrival, self._ahead(), self._child_of)
        if removal is None:
            return None
        raw, origin, stamp, number = removal.delete
        event = Event(removal.parent, raw.mask, raw.name, raw.cookie, origin, stamp, node)
        event.nlink = 1 if removal.died else 2
        self._parts.update(dict.fromkeys(removal.numbers, event))
        self._removals[number] = event
        return event

    def _of_rename(self, rename: Rename) -> Moved:
        """The self events of a rename."""
        while True:
            own = self._calls.renamed(rename, self._ahead())
            if own.is_all or not self._look_again(rename.arrival):
                return own

    def _other_half(self, arrival: Arrival) -> Arrival | None:
        self.waiting_until = None
        cookie = arrival.raw.cookie
        other = self._watcher.queue.take_moved_to(cookie, windows.RENAME_WINDOW)
        if other is None:
            self._watcher.drain()
            other = self._watcher.queue.take_moved_to(cookie, windows.RENAME_WINDOW)
        deadline = arrival.stamp + windows.RENAME_WAIT
        waiting = self._watcher.backlog < windows.RENAME_WINDOW and time.monotonic() < deadline
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
        """A rename between two watched directories; updates the listings."""
        name, name2 = first.raw.name, second.raw.name
        replaced = self._overwritten(node2, name2)
        before = listing(node).names.pop(name, None)
        child = self._known_child(node, name, before)
        is_sure = listing(node2).complete
        own = self._of_rename(Rename(first, node, node2, child, replaced, is_sure))
        child = self._proved(first, node, child, own)
        if child is None or child.is_dir != bool(first.raw.mask & _ISDIR):
            looked = self._look(node2, second)
            child = self._proved(first, node, looked, own) or looked
        event = Event(
            node, RENAME | (first.raw.mask & _ISDIR), name, first.raw.cookie, first.origin,
            first.stamp, child, before=before, node2=node2, name2=name2,
        )  # fmt: skip
        exchanged = 0
        if own.lost is None:
            exchanged, replaced = self._exchanged(event, first, replaced, own.end)
        if not exchanged:
            replaced = self._lost(first, replaced, own)
        event.exchanged = exchanged
        self._replace(event, node2, name2, replaced, own)
        self._table.displace(node, name, child)
        self._table.place(child, node2, name2)
        if child.is_placeholder and not self._table.reach.by_handle:
            self._look(node2, second)  # what a guest looked up by the old name, perhaps
        if exchanged and replaced is not None:
            listing(node).names[name] = of_inode(replaced)
            self._table.place(replaced, node, name)
        return event

    def _proved(
        self, arrival: Arrival, node: Inode, child: Inode | None, own: Moved
    ) -> Inode | None:
        """The renamed object, if its MOVE_SELF proves it or would have to."""
        if own.moved is not None:
            return own.moved.inode
        if child is not None and self._expected(child, _MOVE_SELF, arrival):
            return self._gone(node, arrival.raw.name, arrival.raw.mask)
        return child

    def _lost(self, arrival: Arrival, replaced: Inode | None, own: Moved) -> Inode | None:
        """The overwritten object, if its ATTRIB proves it or would have to."""
        if own.lost is not None:
            return own.lost.inode
        if replaced is not None and self._expected(replaced, _ATTRIB, arrival):
            return None
        return replaced

    def _imply(self, event: Event, own: Moved) -> None:
        """The replay of a rename causes its self events, and the end of the object it replaced."""
        if own.moved is not None:
            self._parts[own.moved.number] = event
        if own.lost is None:
            return
        self._parts[own.lost.number] = event
        self._parts.update(dict.fromkeys(own.ended, event))
        event.nlink = 1 if own.ended else 2

    def _exchanged(
        self, event: Event, first: Arrival, replaced: Inode | None, start: int
    ) -> tuple[int, Inode | None]:
        """Cookie of the second pair that RENAME_EXCHANGE queues, back (0 for a plain rename), and
        the object that came back.
        """
        child, node, node2 = event.child, event.node, event.node2
        assert child is not None
        assert node2 is not None
        if replaced is None and listing(node2).complete:
            return 0, None
        # A plain rename puts no file in a directory's place, and replaces no watched object without
        # an ATTRIB.
        must = replaced is not None and (
            child.is_dir != replaced.is_dir or self._expected(replaced, _ATTRIB, first)
        )
        old, new = (node, event.name), (node2, event.name2)
        back = self._calls.way_back(ahead := self._ahead(), start, old, new)
        wait = windows.SELF_WAIT
        if back is None and replaced is not None and self._is_at(old, replaced, new):
            must, wait = True, windows.WAY_BACK_WAIT  # it was renamed: the kernel is just saying so
        while back is None and must and self._look_again(first, wait):
            back = self._calls.way_back(ahead := self._ahead(), start, old, new)
            if back is None and not self._calls.may_come_back(ahead, start, old, new):
                break
        if back is None:
            return 0, replaced
        if replaced is None or replaced.is_placeholder:
            replaced = self._came_back(event) or replaced
        if replaced is None:
            return 0, None
        own = self._calls.first_move(ahead, back.end + 1, back.stop, child, replaced)
        moved = own and own.inode
        if not self._is_exchange(first, child, replaced, moved, beside=back.is_beside):
            return 0, replaced
        if own is not None and own.inode is replaced:
            self._parts[own.number] = event
        self._watcher.queue.drop_rename(back.cookie, windows.RENAME_WINDOW)
        return back.cookie, replaced

    def _is_at(self, place: Place, replaced: Inode, former: Place) -> bool:
        """Whether an object, known to have been at another place, has that name now. Only looks: in
        a long queue that is not the place that the next events are about.
        """
        known = listing(former[0]).names.get(former[1])
        ino = known.ino if replaced.is_placeholder and known else replaced.identity.ino
        try:
            with self._table.reach.directory(place[0]) as fd:
                status = os.stat(place[1], dir_fd=fd, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_ino, stat.S_IFMT(status.st_mode)) == (ino, replaced.kind)

    def _came_back(self, event: Event) -> Inode | None:
        """What is at a rename's old place now, if the listing had it at the new one; if that was
        not read, if it is not the renamed object, and came with the next pair.
        """
        assert event.node2 is not None
        known = listing(event.node2).names.get(event.name2)
        wd = self._watcher.wd_of(event.node)
        if known is None and self._watcher.queue.leaving(wd, event.name) > 1:
            return None
        try:
            inode = self._fs.peek(event.node, event.name).inode
        except OSError:
            return None
        if known is None:
            is_last = self._leaving(wd, event.name, 1) == 1
            return inode if is_last and inode is not event.child else None
        return inode if (inode.identity.ino, inode.kind) == (known.ino, known.kind) else None

    def _is_exchange(
        self,
        arrival: Arrival,
        child: Inode,
        replaced: Inode,
        moved: Inode | None,
        *,
        beside: bool,
    ) -> bool:
        """Distinguish an exchange from a rename over and a rename back, which queue the same names.

        The kinds of the objects, or the last MOVE_SELF, decide if one of the two is watched. Else,
        if the pairs are adjacent, it is an exchange if the replaced object still exists; an object
        that nobody has seen is assumed to exist.
        """
        if child.is_dir != replaced.is_dir:
            return True
        if self._expected(child, _MOVE_SELF, arrival):
            return moved is not child
        if self._expected(replaced, _MOVE_SELF, arrival):
            return moved is replaced
        return beside and (replaced.is_placeholder or bool(self._links(replaced)))

    def _swapped(self, event: Event, arrival: Arrival, replaced: Inode, start: int) -> int:
        """The same for an exchange with an unwatched name: MOVED_TO, MOVED_FROM."""
        assert event.child is not None
        ahead = self._ahead()
        place = (event.node, event.name)
        back = self._calls.way_out(ahead, start, place)
        if back is None and self._links(replaced):
            while back is None and self._look_again(arrival):
                back = self._calls.way_out(ahead := self._ahead(), start, place)
        if back is None:
            return 0
        if self._watcher.queue.has_moved_to(back.cookie, windows.RENAME_WINDOW):
            return 0  # it moved on at once, to a visible place
        own = self._calls.first_move(ahead, back.end + 1, back.stop, replaced)
        if own is not None:
            self._parts[own.number] = event
        elif not self._lives(event.child, replaced, back):
            return 0
        self._watcher.queue.drop_rename(back.cookie, windows.RENAME_WINDOW)
        return back.cookie

    def _lives(self, child: Inode, replaced: Inode, back: Back) -> bool:
        """Whether an object that was moved away, while another took its place, was not
        overwritten.
        """
        return child.is_dir != replaced.is_dir or (back.is_beside and bool(self._links(replaced)))

    def _overwritten(self, node: Inode, name: bytes) -> Inode | None:
        """The object that MOVED_TO node/name overwrites; call it before looking at the new object,
        which replaces the known one.
        """
        names = listing(node)
        before = names.names.get(name)
        if before is None:  # if the names were not read, a guest may have looked it up
            return None if names.complete else node.children.get(name)
        known = self._known_child(node, name, before)
        return known or self._table.placeholder(before.kind, node, name)

    def _replace(
        self, event: Event, node: Inode, name: bytes, replaced: Inode | None, own: Moved
    ) -> None:
        """MOVED_TO node/name: the overwritten object, what follows for it, and the new listing."""
        assert event.child is not None
        names = listing(node).names
        before = names.get(name)
        if replaced is not None:
            event.replaced = replaced
            if not event.exchanged:
                self._lost_names.lose(node, name, replaced)
            if own.lost is None:  # else its own event shows it, and looking would delay its end
                event.nlink = self._links_before(node, replaced)
        if event.node2 is None:
            event.before = before
        names[name] = of_inode(event.child)
        self._imply(event, own)

    def _named(self, node: Inode, arrival: Arrival) -> Event:
        raw = arrival.raw
        name, mask = raw.name, raw.mask
        event = self._removals.pop(arrival.number, None) or Event(
            node, mask, name, raw.cookie, arrival.origin, arrival.stamp
        )
        names = listing(node).names
        before = event.before = names.get(name)
        if mask & _DELETE:
            names.pop(name, None)
            removed = event.child = event.child or self._deleted(event, arrival, before)
            self._table.displace(node, name, removed)
            if (removed.parent, removed.name) == (node, name):
                removed.parent = None  # other links may exist, at names that were never looked up
            self._lost_names.lose(node, name, removed)
        elif mask & _MOVED_FROM:
            names.pop(name, None)
            child = self._known_child(node, name, before)
            own = self._of_rename(Rename(arrival, node, None, child, None))
            child = self._proved(arrival, node, child, own)
            if child is None or child.is_dir != bool(mask & _ISDIR):
                child = self._gone(node, name, mask)
            event.child = child
            event.replaced = self._lost(arrival, None, own)
            self._imply(event, own)
            self._table.displace(node, name, child)
            if child.is_dir:
                self._table.lose(child)
            elif (child.parent, child.name) == (node, name):
                child.parent = None
        elif mask & _MOVED_TO:
            replaced = self._overwritten(node, name)
            rename = Rename(arrival, None, node, None, replaced, listing(node).complete)
            own = self._of_rename(rename)
            if own.moved is not None:
                event.child = own.moved.inode
            else:
                looked = self._look(node, arrival)
                own = self._of_rename(rename._replace(child=looked))
                event.child = self._proved(arrival, node, looked, own) or looked
            if replaced is not None and own.lost is None:
                event.exchanged = self._swapped(event, arrival, replaced, own.end)
            if not event.exchanged:
                replaced = self._lost(arrival, replaced, own)
            self._replace(event, node, name, replaced, own)
            self._table.place(event.child, node, name)
        elif mask & _CREATE:
            if name in node.children:
                self._table.displace(node, name, node.children[name])
            event.child = self._look(node, arrival)
            names[name] = of_inode(event.child)
        else:
            event.child = self._ghost(event) or self._used(event, arrival, before)
            self._lost_names.count(event.child, event.kind)
        return event

    def _used(self, event: Event, arrival: Arrival, before: Known | None) -> Inode:
        """The object that an event is about which does not change the name."""
        node, name, is_dir = event.node, event.name, bool(event.mask & _ISDIR)
        child = self._known_child(node, name, before)
        if child is None:
            child = self._look(node, arrival)
        lost = None if is_dir else self._lost_names.file(node, name)
        is_lost = lost is not None and before is None and child.is_placeholder
        if is_lost or child.is_dir != is_dir:
            # A file that is still open under a name that it has no more.
            return self._with_self(event, lost) if lost else self._gone(node, name, event.mask)
        used = self._touched(event, arrival, child, lost)
        if used is not lost:
            listing(node).names[name] = of_inode(used)
        return used

    def _deleted(self, event: Event, arrival: Arrival, before: Known | None) -> Inode:
        """The object that a DELETE removed."""
        node, name, mask = event.node, event.name, event.mask
        known = self._known_child(node, name, before)
        if known is None or known.is_dir != bool(mask & _ISDIR):
            return self._gone(node, name, mask)
        if self._expected(known, _DELETE_SELF if known.is_dir else _ATTRIB, arrival):
            if known.is_dir or known is not self._lost_link:
                return self._gone(node, name, mask)
            event.nlink = 2
        else:
            event.nlink = self._links_before(node, known)
        return known

    def _ghost(self, event: Event) -> Inode | None:
        """The watched object of this event, if it is open under a name that it no longer has, or
        has lost since: its self event comes next.
        """
        for ahead in self._ahead(1):
            inode = self._watcher.inode_of(ahead.raw.wd)
            if inode is None or ahead.raw.name or ahead.raw.mask != event.mask:
                return None
            known = listing(event.node).names.get(event.name)
            if known is not None and known.inode is None:
                if known.ino != inode.identity.ino:
                    return None
            else:
                here = inode.name == event.name and inode.parent in (event.node, None)
                if inode.is_dir or not here or (known is not None and known.inode is inode):
                    return None
            self._parts[ahead.number] = event
            event.has_self = True
            return inode
        return None

    def _touched(self, event: Event, arrival: Arrival, child: Inode, lost: Inode | None) -> Inode:
        """The object of an event by name, given what the name is assumed to be and what it was
        last.
        """
        bits = event.kind
        if not int(self._watcher.mask_of(child)) & bits:
            is_open = self._lost_names.is_open
            is_of_lost = lost is not None and is_open(lost) and not is_open(child)
            if lost is None or not is_of_lost or not bits & _CLOSE:
                return child
            return self._with_self(event, lost)
        own: SelfEvent | None = None
        while own is None:
            own = self._calls.touched(child, event.mask, self._ahead())
            if own is None and not self._look_again(arrival):
                break
        if own is not None:
            self._parts[own.number] = event
            event.has_self = True
            return child
        if not self._expected(child, bits, arrival):
            event.has_self = True
            return child
        if lost is not None:
            return self._with_self(event, lost)
        self._table.displace(event.node, event.name, child)
        return self._gone(event.node, event.name, event.mask)

    def _with_self(self, event: Event, lost: Inode) -> Inode:
        """A file that has lost the event's name, with its self event if it is watched."""
        own = self._calls.touched(lost, event.mask, self._ahead())
        if own is not None:
            self._parts[own.number] = event
            event.has_self = True
        return lost

    def _child_of(self, node: Inode, name: bytes) -> Inode | None:
        """The last known object of a name."""
        return self._known_child(node, name, listing(node).names.get(name))

    def _known_child(self, node: Inode, name: bytes, before: Known | None) -> Inode | None:
        """The object of a name: from the listing, or from a guest's look-up if the listing has
        nothing.
        """
        if before is not None and before.inode is not None:
            return self._table.current(before.inode)
        child = node.children.get(name)
        if child is not None and before is not None and child.identity.ino != before.ino:
            return None
        return child

    def _gone(self, node: Inode, name: bytes, mask: int) -> Inode:
        return self._table.placeholder(stat.S_IFDIR if mask & _ISDIR else stat.S_IFREG, node, name)

    def _look(self, node: Inode, arrival: Arrival) -> Inode:
        """The current object of a name, unless a waiting event shows that it is another now."""
        name, mask, wd = arrival.raw.name, arrival.raw.mask, arrival.raw.wd
        if not self._leaving(wd, name):
            try:
                inode = self._fs.peek(node, name).inode
            except OSError:  # gone, or cannot be looked at: the event is about the name
                pass
            else:
                is_dir = bool(mask & _ISDIR)
                if inode.is_dir == is_dir and not self._leaving(wd, name):
                    return inode
        return self._gone(node, name, mask)

    def _leaving(self, wd: int, name: bytes, most: int = 0) -> int:
        """How many waiting events remove or replace the name. Reads the host's queue only if at
        most ``most`` were read already: it may be long.
        """
        found = self._watcher.queue.leaving(wd, name)
        if found > most:
            return found
        self._watcher.drain()
        return self._watcher.queue.leaving(wd, name)

    def _links_before(self, node: Inode, child: Inode) -> int:
        """Link count of an object just before its removal from a directory. An object that is still
        open, and may be marked by the time it is closed, gets one extra: its end comes later.
        """
        may_be_marked = not listing(node).complete  # a guest has just looked there
        if child.is_dir or (child.nlink < 2 and not may_be_marked):
            return 1
        links = self._links(child)
        if not links and may_be_marked:
            with suppress(OSError), self._table.reach.opened(child):
                links = 1
        return links + 1

    def _links(self, inode: Inode) -> int:
        """Current link count: 0 if the object is gone, one less than before if nobody looks."""
        try:
            with self._table.reach.opened(inode) as fd:
                return os.fstat(fd).st_nlink
        except OSError as error:
            return 0 if syscalls.is_gone(error) else max(inode.nlink - 1, 1)


def _is_unlinked(event: Event) -> bool:
    """Whether an event's file is no longer the object of its last name."""
    child = event.child
    if child is None or child.is_dir or child.is_placeholder:
        return False
    return child.parent is None or child.parent.children.get(child.name, child) is not child
