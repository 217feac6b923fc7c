"""Restores an export from the state of the previous server: interest, watches, listings, events.

Each guest's marks are set again, each host watch under its old watch descriptor. Then every listed
directory is compared with its saved listing, and the difference is delivered: the changes while no
server ran.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from protocol.images import ImageError
from protocol.masks import EVENTS, Mask

from ..events.event import HOST, Event
from ..events.missed import Missed
from ..files.inode import Inode
from ..files.listing import Known, listing
from ..guests.guest import BY_HAND, MARKS_LIMIT, TOKEN_SIZE, Guest, Observer
from ..guests.mount import MountGuest
from ..linux import syscalls
from .restore_inodes import RestoredTable, check_name
from .rows import GuestKind, SavedEvent, SavedExport, SavedGuest, SavedName
from .take import identity_of

if TYPE_CHECKING:
    from ..export.export import Export

WAIT_FOR = 60.0
"""Seconds that an observer's interest and events wait for the observer to reconnect."""
_WD_LIMIT = 1 << 31


@cache
def _mask(bits: int) -> Mask:
    return EVENTS & bits


class Resumption:
    """Restores a saved state into a new, unused export.

    Raises ImageError if the state belongs to another directory or is inconsistent; the export is
    then unusable. Mounts that continue are passed to ``mount``; ``finish`` completes it.
    """

    def __init__(self, export: Export, saved: SavedExport) -> None:
        self._export = export
        self._saved = saved
        self._check_directory()
        self.table = RestoredTable(export.table, saved.table, saved.saved_ns)
        self._mounts = {g.name: g for g in saved.guests if g.kind == GuestKind.MOUNT}
        self._take_listings()
        self._wds = self._watch_descriptors()
        self._marks: list[tuple[Guest, SavedGuest]] = []
        for guest in saved.guests:
            if guest.kind == GuestKind.OBSERVER:
                self._resume(self._observer(guest), guest)
            elif guest.kind == GuestKind.BY_HAND and guest.name == BY_HAND:
                self._resume(export.hand_marks(), guest)
        by_hand = (g for g in saved.guests if g.kind == GuestKind.BY_HAND)
        self._by_hand = {guest.name: guest for guest in by_hand}

    def _check_directory(self) -> None:
        now = identity_of(self._export)
        then = self._saved
        if (now.root_ino, now.root_handle) != (then.root_ino, then.root_handle):
            raise ImageError(f"it belongs to another directory, {then.source}")
        if now.file_system != then.file_system:
            raise ImageError(f"it belongs to another file system, which {then.source} was on")

    # Guests that continue

    def mount(self, guest: MountGuest) -> dict[int, int]:
        """A continuing mount takes over its part, by its name. Returns what its kernel holds:
        lookup counts by nodeid, which the caller adds to the inodes.
        """
        saved = self._mounts.pop(guest.name, None)
        if saved is None:
            return {}
        self._resume(guest, saved)
        by_hand = self._by_hand.get(guest.name)
        if by_hand is not None:
            self._resume(self._export.hand_marks(guest), by_hand)
        return saved.nodes

    def _observer(self, saved: SavedGuest) -> Observer:
        if len(saved.token) != TOKEN_SIZE or saved.token in self._export.waiting:
            raise ImageError("an impossible guest")
        guest = self._export.add_observer(saved.name)
        guest.token = saved.token
        self._export.waiting[saved.token] = guest
        return guest

    def _resume(self, guest: Guest, saved: SavedGuest) -> None:
        """Everything except the marks, which come last, because they deliver the changes
        meanwhile.
        """
        if len(saved.marks) > MARKS_LIMIT:
            raise ImageError(f"{len(saved.marks)} marks of one guest, limit {MARKS_LIMIT}")
        guest.events = EVENTS & saved.events
        if isinstance(guest, Observer):
            guest.resume(saved.sent, saved.outbox)
        elif isinstance(guest, MountGuest):
            for event in saved.held:
                guest.enqueue(self._event(event), 0)
        for place, name, mask, before in saved.missed:
            check_name(name or b"-")
            known = before and self._known(before)
            guest.miss(self._get(place), name, Missed(known, mask))
        guest.missing = bool(guest.missed)
        self._marks.append((guest, saved))

    # Rows that refer to nodeids

    def _get(self, nodeid: int) -> Inode:
        return self.table.get(nodeid)

    def _optional(self, nodeid: int) -> Inode | None:
        return self._get(nodeid) if nodeid else None

    def _known(self, saved: SavedName) -> Known:
        return Known(saved.ino, saved.kind, saved.seen_ns, self._optional(saved.nodeid))

    def _event(self, saved: SavedEvent) -> Event:
        check_name(saved.name or b"-")
        check_name(saved.name2 or b"-")
        kind = stat.S_IFDIR if saved.mask & Mask.ISDIR else stat.S_IFREG
        node = self._get(saved.node)
        child = self._optional(saved.child)
        if child is None:
            child = self._export.table.placeholder(kind, node, saved.name)
        event = Event(node, saved.mask, saved.name, saved.cookie, HOST, time.monotonic(), child)
        event.nlink, event.has_self = saved.nlink, saved.has_self
        event.node2, event.name2 = self._optional(saved.node2), saved.name2
        event.replaced, event.exchanged = self._optional(saved.replaced), saved.exchanged
        if event.kind == Mask.MOVED_FROM | Mask.MOVED_TO and event.node2 is None:
            raise ImageError("a rename without a target")
        return event

    def _take_listings(self) -> None:
        for nodeid in self._saved.listed:
            if self._get(nodeid).is_dir:
                listing(self._get(nodeid)).complete = True
        for saved in self._saved.names:
            check_name(saved.name)
            node = self._get(saved.directory)
            if node.is_dir:
                listing(node).names[saved.name] = self._known(saved)

    def came_later(self, names: Iterable[SavedName]) -> None:
        """Names that came after the image was made, which guests may or may not know: those that
        are gone are reported as deleted, the others once more.
        """
        for saved in names:
            node = self.table.inodes.get(saved.directory)
            if node is None or node.listing is None or saved.name in node.listing.names:
                continue
            try:
                with self._export.table.reach.directory(node) as dir_fd:
                    os.stat(saved.name, dir_fd=dir_fd, follow_symlinks=False)
            except OSError as error:
                if not syscalls.is_gone(error):
                    continue
                node.listing.names[saved.name] = self._known(saved)

    def _watch_descriptors(self) -> dict[Inode, int]:
        wds = {self._get(nodeid): wd for nodeid, wd in self._saved.watches}
        numbers = set(wds.values())
        if len(numbers) != len(self._saved.watches) or not all(0 < n < _WD_LIMIT for n in numbers):
            raise ImageError("impossible watch descriptors")
        return wds

    # The end

    def finish(self, inotify: int = -1) -> None:
        """Set the marks and the watches, and deliver the changes while no server ran. ``inotify``:
        the previous server's instance, in which these are queued; otherwise they are found by
        comparing. Takes the descriptor.
        """
        export = self._export
        if inotify >= 0:
            export.watcher.adopt(inotify, self._wds)
        else:
            export.watcher.remember(self._wds)
        marks = (
            (guest, self._optional(nodeid), _mask(mask))
            for guest, saved in self._marks
            for nodeid, mask in saved.marks
        )
        export.restore_marks(marks, sorted(self._wds, key=self._wds.__getitem__))
        if inotify >= 0:
            export.watches.drop_unwanted(self._wds)
        else:
            export.watcher.remembered()
        self.table.release()
        export.recovery.after_a_restart(compare=inotify < 0)
        export.wait_for_observers(WAIT_FOR)
