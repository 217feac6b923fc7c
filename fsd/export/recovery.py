"""Recovery from lost events: compares directories with what was delivered of them, and delivers the
difference.

The queue has overflowed, a directory had no watch, a guest's outbox was full, no server ran: there
is one way for all of them (docs/decisions/resync.md). events/compare.py does the comparison.
"""

from __future__ import annotations

import time
from collections import Counter

from protocol.masks import STRUCTURE, Mask

from ..events.compare import Changes, Comparer
from ..events.event import HOST, RENAME, Event
from ..events.watcher import HostWatcher
from ..files.inode import Inode
from ..files.table import InodeTable
from ..guests.guest import Guest, missed_by
from ..pacing.chores import Job, finish
from .interest import Interest
from .routing import Router
from .steps import Steps
from .watches import Watches
from .wholetree import WholeTree

_MOVED_FROM = int(Mask.MOVED_FROM)
_OWN = int(Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE)
COMPARE_SHARE = 9
"""Comparing them all is followed by a rest of at least this many times its own duration."""
CHANGES_LIMIT = 4096
"""Changed names that such comparisons collect before delivery, to find moves among them."""


class Recovery:
    """That of one export."""

    def __init__(
        self,
        table: InodeTable,
        watcher: HostWatcher,
        comparer: Comparer,
        interest: Interest,
        watches: Watches,
        tree: WholeTree,
        router: Router,
        steps: Steps,
        counts: Counter[str],
    ) -> None:
        self._table = table
        self._watcher = watcher
        self._comparer = comparer
        self._interest = interest
        self._watches = watches
        self._tree = tree
        self._router = router
        self._steps = steps
        self._counts = counts
        self._unchecked = False  # whether the kernel has ended watches, and the news was lost

    def resync(self, directories: list[Inode]) -> None:
        """``resyncing``, completed at once."""
        finish(self.resyncing(directories))

    def resyncing(self, directories: list[Inode]) -> Job[None]:
        """Compare directories with what was delivered of them, and deliver the difference to
        all.
        """
        self._counts["resyncs"] += 1
        self._check_watches()
        yield from self._comparing_all(directories)

    def _comparing_all(self, directories: list[Inode]) -> Job[None]:
        changes: Changes = {}
        for node in directories:
            yield from self._comparing(node, changes)
            yield None
        yield from self._delivering(changes)

    def _comparing(self, node: Inode, changes: Changes, *, at_once: bool = False) -> Job[None]:
        if node.is_dir and node.listing is not None and node.listing.complete:
            compare = self._comparer.comparing_at_once if at_once else self._comparer.comparing
            changes.update((yield from compare(node, node.listing)))

    def _delivering(self, changes: Changes) -> Job[None]:
        for event in self._comparer.events_for(changes):
            yield None
            self._router.route(event)
            if event.child is not None and event.name:
                yield from self._tree.cover_arrival(event, event.child)
                mask = int(Mask.MOVE_SELF) if event.kind == RENAME else event.mask
                if event.kind & (_OWN | _MOVED_FROM) and self._interest.aggregate(event.child):
                    own = Event(event.child, mask, b"", 0, HOST, event.stamp, event.child)
                    own.part_of = event
                    self._router.route(own)

    def _check_watches(self) -> None:
        """Notice watches that ended while events were lost, their IN_IGNORED among them."""
        self._unchecked = False
        try:
            ended = self._watcher.ended()
        except OSError:
            self._counts["looks_failed"] += 1
            self._unchecked = True
            self._watches.look_again()
            return
        for inode, wd in ended:
            self.died(inode)
            self._watcher.forget(wd)
            self._watches.ended(inode)

    def died(self, inode: Inode) -> None:
        """Deliver the end of an object to all guests."""
        mask = int(Mask.DELETE_SELF)  # never with ISDIR
        self._router.route(Event(inode, mask, b"", 0, HOST, time.monotonic(), inode))

    def looking_again(self) -> Job[None]:
        """Try again what the host has refused, and deliver changes there since. The longer it
        takes, the later the next attempt comes.
        """
        begun = time.monotonic()
        refused, uncovered = list(self._watches.unwatched), self._tree.uncovered
        self._tree.uncovered = {}
        if self._unchecked:
            self._check_watches()
        changes: Changes = {}
        for node in refused:
            self._watches.set_watch(node)  # a watch may have become free
            yield from self._steps.between(self._comparing(node, changes, at_once=True))
            if len(changes) >= CHANGES_LIMIT:
                yield from self._steps.between(self._delivering(changes))
                changes = {}
        for node, announce in uncovered.items():
            yield from self._steps.between(self._tree.covering(node, announce=announce))
        self._counts["resyncs"] += 1
        yield from self._steps.between(self._delivering(changes))
        if self._watches.unwatched:
            self._watches.look_again(COMPARE_SHARE * (time.monotonic() - begun))

    def _compare(self, nodes: list[Inode]) -> None:
        changes: Changes = {}
        for node in nodes:
            if node.is_dir and node.listing is not None and node.listing.complete:
                changes.update(finish(self._comparer.comparing_at_once(node, node.listing)))
        finish(self._delivering(changes))

    def catch_up(self, guest: Guest) -> None:
        """Deliver what a guest missed, now that its outbox is empty, before any other event."""
        changes, since_ns = guest.caught_up()
        guest.counts["resyncs"] += 1
        self._steps.do(self._catching_up(guest, changes, since_ns))

    def repeat(self, guest: Guest, event: Event) -> None:
        """Deliver what an event has changed that could not be replayed, as it is now: once, as what
        was in the way may still be there.
        """
        if not event.name or not event.kind & STRUCTURE or event.is_repeat:
            return
        guest.counts["repeated"] += 1
        if _holds(event):
            halves = self._interest.wanted_halves(guest, event)
            if halves:
                guest.offer(event.repeated(), halves)
            return
        changes = dict(missed_by(event))
        self._steps.do(self._catching_up(guest, changes, 0, is_repeat=True))

    def _catching_up(
        self, guest: Guest, changes: Changes, since_ns: int, *, is_repeat: bool = False
    ) -> Job[None]:
        if since_ns:
            whole = self._interest.of(guest, None)
            nodes = self._watcher.inodes() if whole else list(self._interest.marks(guest))
            for node in nodes:
                if node is not None and node.is_dir:
                    changes.update((yield from self._comparer.changed_lately(node, since_ns)))
        for event in self._comparer.events_for(changes):
            event.is_repeat = is_repeat
            halves = self._interest.wanted_halves(guest, event)
            if halves:
                guest.offer(event, halves)
            yield None

    def after_a_restart(self, *, compare: bool) -> None:
        """Deliver the changes since the listings were saved."""
        watched, refused = self._watcher.mask_of, self._watches.unwatched
        missing = [i for i in self._interest.inodes() if not watched(i) and i not in refused]
        # An object that is reached only by its path may have moved: the comparison finds it again.
        dead = [inode for inode in missing if self._table.reach.handle_opens(inode.identity)]
        if compare:
            self._compare([*self._watcher.inodes(), *dead])
        for inode in missing:
            self._watches.set_watch(inode)
            if inode not in dead:
                self._compare([inode])
            if not self._watcher.mask_of(inode) and inode not in self._watches.unwatched:
                self.died(inode)


def _holds(event: Event) -> bool:
    """Whether the objects of a rename are where it has left them."""
    if event.node2 is None:
        return False
    replaced = event.replaced if event.exchanged else None
    return _has(event.node2, event.name2, event.child) and _has(event.node, event.name, replaced)


def _has(node: Inode, name: bytes, inode: Inode | None) -> bool:
    known = node.listing.names.get(name) if node.listing is not None else None
    if known is None or inode is None:
        return known is None and inode is None
    return known.ino == inode.identity.ino or (inode.is_placeholder and known.kind == inode.kind)
