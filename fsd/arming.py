"""Closing the arming gap: from inotify_add_watch(2) in the guest to the host watch.

Before the guest's kernel can hold a mark, its path was looked up through us. So the server watches
a directory that was just looked up, keeps what happens there for a moment, and has the agent read
the marks of the process that asked. When the mark arrives, what happened since the first look-up
that no scan has disproved is told: the one by which the mark was set is not older (DESIGN 4.6).
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from protocol.frames import ProtocolError
from protocol.handles import NodeKey
from protocol.masks import EVENTS, Mask

from . import windows
from .chores import Job, Pause, finish
from .events import Event
from .guests import FIRST, MARKS_LIMIT, Guest
from .inodes import Inode
from .passthrough import Entry
from .replayer import ReplayGuest
from .seen import Seen, look, missing, own_events
from .watcher import HOST

if TYPE_CHECKING:
    from .export import Export

_MODIFY, _ATTRIB, _DELETE_SELF = int(Mask.MODIFY), int(Mask.ATTRIB), int(Mask.DELETE_SELF)
_NOTHING = Mask(0)
HISTORY_LIMIT = 4096
"""Events kept for one directory. A storm beyond it, where nobody has a mark yet, is not followed
for the rest of ``windows.KEEP``: it would take the time of those who do watch."""


HISTORIES_LIMIT = 65_536
"""Events kept for all of them together, some 60 MB. What happens beyond it is not
followed either."""
DIRECTORIES_LIMIT = 16_384
"""Looked-up directories that are watched for one guest's sake: as many as a program goes through in
KEEP. Beyond it, what happens before the mark arrives is not told."""
SEEN_LIMIT = 16_384
"""Files that one guest has looked up in KEEP whose attributes are remembered, some 10 MB. Of others
it is not told what is done by a name elsewhere before the mark arrives."""
OWN_LIMIT = 64
"""A file's own events that are kept until its mark applies, some milliseconds."""
GROUP = 512
"""Marks of a scan that are applied as one."""
GROUP_TIME = 0.05
"""Seconds after which a group ends all the same: requests wait meanwhile."""


@dataclass(slots=True)
class _LookUp:
    """One guest's look-ups of a directory."""

    hint: int = 0  # of the latest
    since: float | None = None  # time.monotonic() of the first that no scan has disproved
    seen: dict[Inode, Seen] = field(default_factory=dict)  # its files


@dataclass(slots=True)
class _Provisional:
    expires: float = field(default_factory=lambda: time.monotonic() + windows.KEEP)
    by: dict[Guest, _LookUp] = field(default_factory=dict)
    history: deque[Event] = field(default_factory=lambda: deque(maxlen=HISTORY_LIMIT))
    muted: bool = False


@dataclass(slots=True)
class _Marked:
    """A file whose mark is about to apply."""

    by: dict[Guest, Mask] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=OWN_LIMIT))


class Arming:
    """Provisional watches and scans of one export."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._nodes: dict[Inode, _Provisional] = {}
        self._kept = 0  # events in all histories
        self._counts: dict[Guest, int] = {}  # directories that each guest has looked up
        self._seen: Counter[Guest] = Counter()  # files
        self._marked: dict[Inode, _Marked] = {}
        self._updates: dict[Guest, list[tuple[NodeKey, int]]] = {}
        self.deadline = math.inf

    def __contains__(self, inode: Inode) -> bool:
        node = self._nodes.get(inode)
        return node is not None and not node.muted

    def coming(self, inode: Inode) -> Mask:
        """What marks that are about to apply ask for."""
        marked = self._marked.get(inode) if self._marked else None
        return reduce(or_, marked.by.values(), _NOTHING) if marked is not None else _NOTHING

    def looked_up(
        self, guest: ReplayGuest, directory: Inode, pid: int, file: Entry | None = None
    ) -> None:
        """Process ``pid`` of the guest may be about to watch a directory, or a file in it."""
        hint = guest.hint(pid)
        node = self._nodes.get(directory)
        known = node is not None and guest in node.by
        if not known and self._counts.get(guest, 0) >= DIRECTORIES_LIMIT:
            return
        if node is None:
            node = self._nodes[directory] = _Provisional()
            self._export.set_watch(directory)
            self.deadline = min(self.deadline, node.expires)
            self._export.watcher.on_arrival()
        if not known:
            self._counts[guest] = self._counts.get(guest, 0) + 1
        look_up = node.by.setdefault(guest, _LookUp())
        look_up.hint = hint
        if node.muted:
            return
        node.expires = time.monotonic() + windows.KEEP
        if look_up.since is None:
            self._export.watcher.drain()  # what is queued happened before
            look_up.since = time.monotonic()
        if file is not None and file.inode not in look_up.seen and self._seen[guest] < SEEN_LIMIT:
            look_up.seen[file.inode] = Seen.of(file.attr)
            self._seen[guest] += 1

    def expire(self, now: float) -> None:
        """Drop watches that nobody came for."""
        if now < self.deadline:
            return
        old = [inode for inode, node in self._nodes.items() if node.expires <= now]
        for inode in old:
            node = self._nodes.pop(inode)
            self._kept -= len(node.history)
            for guest, look_up in node.by.items():
                self._count_down(guest)
                self._seen[guest] -= len(look_up.seen)
            self._export.set_watch(inode)
        self.deadline = min((node.expires for node in self._nodes.values()), default=math.inf)

    def remember(self, event: Event) -> None:
        """Keep an event of a looked-up directory, or of a file whose mark is about to apply."""
        if not event.name and event.part_of is None and event.node in self._marked:
            self._marked[event.node].events.append(event)
        for inode in {event.node, event.node2}:
            node = self._nodes.get(inode) if inode is not None else None
            if node is None or inode is None:
                continue
            is_longer = len(node.history) < HISTORY_LIMIT
            node.history.append(event)
            self._kept += is_longer
            is_full = len(node.history) == HISTORY_LIMIT or self._kept >= HISTORIES_LIMIT
            if is_full and not node.muted:
                node.muted = True
                self._export.counts["muted"] += 1
                self._export.set_watch(inode)

    # Scans

    def scan_update(self, guest: Guest, key: NodeKey, bits: int) -> None:
        """A mark that the agent found changed; applied at the end of its scan."""
        updates = self._updates.setdefault(guest, [])
        if len(updates) >= MARKS_LIMIT:
            raise ProtocolError(f"more than {MARKS_LIMIT} marks changed in a scan")
        updates.append((key, bits))

    def scan_abort(self, guest: Guest) -> None:
        """The agent is gone in the middle of a scan."""
        self._updates.pop(guest, None)

    def forget(self, guest: Guest) -> None:
        """The guest has gone."""
        self.scan_abort(guest)
        for node in self._nodes.values():
            if guest in node.by:
                self._disprove(node, guest)
                del node.by[guest]
        self._counts.pop(guest, None)
        del self._seen[guest]

    def _disprove(self, node: _Provisional, guest: Guest) -> None:
        """The guest has no mark there that was set by the look-ups so far."""
        look_up = node.by[guest]
        look_up.since = None
        self._seen[guest] -= len(look_up.seen)
        look_up.seen.clear()
        if all(look_up.since is None for look_up in node.by.values()):
            self._kept -= len(node.history)
            node.history.clear()

    def _count_down(self, guest: Guest) -> None:
        count = self._counts[guest] - 1
        if count:
            self._counts[guest] = count
        else:
            del self._counts[guest]

    def scan_end(
        self, guest: ReplayGuest, hint: int, *, full: bool
    ) -> list[tuple[NodeKey, Exception]]:
        """``scan_ending`` in one go."""
        self._export.process(self._export.watcher.backlog)
        return finish(self.scan_ending(guest, hint, full=full))

    def scan_ending(
        self, guest: ReplayGuest, hint: int, *, full: bool
    ) -> Job[list[tuple[NodeKey, Exception]]]:
        """Apply the marks, tell what happened since they were set; returns those that failed. A
        GROUP at a time, so that a scan of very many is not one.
        """
        guest.scanned(hint)
        export = self._export
        updates = self._updates.pop(guest, [])
        failed: list[tuple[NodeKey, Exception]] = []
        if full:
            published = {key for key, bits in updates if bits}
            for inode in list(export.interest.marks(guest)):
                key = inode.key if inode is not None else NodeKey(0, 0)
                if key not in published:
                    updates.append((key, 0))
        done = 0
        while done < len(updates):
            group = updates[done : done + GROUP]
            files = self._watch_files(guest, group)
            try:
                yield from self._routing()
                done += self._apply(guest, group, files, failed)
            finally:
                for inode in files:
                    self._let_go(guest, inode)
            yield None
        for node in self._nodes.values():
            look_up = node.by.get(guest)
            if look_up is not None and look_up.hint <= hint:
                self._disprove(node, guest)
        return failed

    def _routing(self) -> Job[None]:
        """All that has happened so far."""
        self._export.watcher.drain()
        while self._export.is_behind:
            self._export.route(GROUP)
            if self._export.is_behind:
                yield Pause.LATER

    def _watch_files(
        self, guest: ReplayGuest, updates: list[tuple[NodeKey, int]]
    ) -> dict[Inode, Seen | None]:
        """Watch files before their marks apply, so that of each event it is known whether it was
        before that; returns how they are then.
        """
        export = self._export
        files: dict[Inode, Seen | None] = {}
        end = time.monotonic() + GROUP_TIME
        for key, bits in updates:
            inode = export.table.known(key.nodeid)
            if inode is None or inode.is_dir or not bits or export.interest.of(guest, inode):
                continue
            self._marked.setdefault(inode, _Marked()).by[guest] = Mask(bits) & EVENTS
            export.set_watch(inode)
            files[inode] = look(export.table, inode)
            if time.monotonic() > end:
                break
        return files

    def _let_go(self, guest: ReplayGuest, inode: Inode) -> None:
        """Its mark applies, or does not."""
        marked = self._marked[inode]
        del marked.by[guest]
        if not marked.by:
            del self._marked[inode]
            self._export.set_watch(inode)

    def _apply(
        self,
        guest: ReplayGuest,
        updates: list[tuple[NodeKey, int]],
        files: dict[Inode, Seen | None],
        failed: list[tuple[NodeKey, Exception]],
    ) -> int:
        """How many of them are done."""
        export = self._export
        kept, seen = self._since_look_ups(guest)
        own = [event for inode in files for event in self._marked[inode].events]
        events = sorted((*kept, *own), key=lambda event: event.stamp)
        untold = [event for event in events if not self._is_told(guest, event)]
        end = time.monotonic() + GROUP_TIME
        done = 0
        for key, bits in updates:
            done += 1
            try:
                export.update(guest, key, bits)
            except (OSError, ValueError) as error:
                failed.append((key, error))
            if time.monotonic() > end:
                break
        for event in untold:
            self._tell(guest, event)
        for inode, now in files.items():
            mask = missing(seen.get(inode), now, own_events(inode, events, guest))
            wanted = int(export.interest.of(guest, inode))
            for bit in (_MODIFY, _ATTRIB, _DELETE_SELF):
                if mask & bit and (wanted & bit or (wanted and bit == _DELETE_SELF)):
                    guest.offer(Event(inode, bit, b"", 0, HOST, time.monotonic(), inode), FIRST)
        return done

    def _since_look_ups(self, guest: ReplayGuest) -> tuple[dict[Event, None], dict[Inode, Seen]]:
        """What has happened where the guest has looked; and files as it saw them."""
        events: dict[Event, None] = {}
        seen: dict[Inode, Seen] = {}
        for node in self._nodes.values():
            look_up = node.by.get(guest)
            if look_up is None or look_up.since is None:
                continue
            seen.update(look_up.seen)
            for event in node.history:
                if event.stamp > look_up.since:
                    events[event] = None
        return events, seen

    def _is_told(self, guest: ReplayGuest, event: Event) -> bool:
        export = self._export
        if event.origin is guest or export.wanted_halves(guest, event):
            return True
        return event.child is not None and bool(
            int(export.interest.of(guest, event.child)) & event.kind
        )

    def _tell(self, guest: ReplayGuest, event: Event) -> None:
        halves = self._export.wanted_halves(guest, event)
        if halves:
            guest.offer(event, halves)
        elif event.child is not None and event.name:
            mask = int(self._export.interest.of(guest, event.child))
            if mask & event.kind:  # the mark is on the file itself
                own = Event(event.child, event.mask, b"", 0, event.origin, event.stamp, event.child)
                guest.offer(own, FIRST)
