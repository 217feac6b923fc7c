"""Closes the arming gap: from inotify_add_watch(2) in the guest to the host watch.

Before the guest's kernel can hold a mark, its path was looked up through the server. So the server
watches a directory that was just looked up, remembers its events for a moment, and has the agent
read the marks of the process that looked it up. When the mark arrives, the server delivers the
events since the first look-up that no scan has disproved: the look-up of the mark is not older.

While it is in doubt whether an event is to be delivered, later events wait, so that the order is
kept. If the mount is this machine's own, the doubt usually ends at once (``newmarks``).

Longer than other modules, because look-ups, doubts and scans decide together about each event.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol, TypeVar

from protocol.frames import ProtocolError
from protocol.handles import NodeKey
from protocol.masks import EVENTS, Mask

from ..events.event import HOST, Event
from ..events.watcher import HostWatcher
from ..files.inode import Inode
from ..files.passthrough import Entry
from ..files.table import InodeTable
from ..guests.guest import FIRST, MARKS_LIMIT, QUEUED, Guest, is_void, missed_by
from ..guests.mount import MountGuest
from ..pacing import windows
from ..pacing.chores import Job, Pause, finish
from .interest import Interest
from .lookups import Hint, Holding, Kept, LookUp, Provisional
from .markedfiles import GROUP_TIME, MarkedFiles
from .newmarks import NewMarks
from .seen import Seen, missing, self_events
from .tracedmarks import TracedMarks
from .watches import Watches

_MODIFY, _ATTRIB, _DELETE_SELF = int(Mask.MODIFY), int(Mask.ATTRIB), int(Mask.DELETE_SELF)
_NOTHING = Mask(0)
_T = TypeVar("_T")
HISTORY_LIMIT = 16_384
"""Events kept for one directory: as many as the kernel keeps for a watcher that does not read
(max_queued_events of inotify(7)). Beyond it, the difference is delivered."""
HISTORIES_LIMIT = 65_536
"""Events kept for all of them together, about 60 MB."""
DIRECTORIES_LIMIT = 16_384
"""Looked-up directories that are watched for one guest: as many as a program visits in KEEP. Beyond
it, events before the mark arrives are not delivered."""
SEEN_LIMIT = 16_384
"""Files that one guest has looked up in KEEP whose attributes are remembered, about 10 MB. For
others, changes through other names before the mark arrives are not delivered."""
DRAIN_EVERY = 128
"""Events that are worked on before the host's queue is read again, some 2 ms."""
GROUP = 512
"""Marks of a scan that are applied together."""
STORM_LIMIT = 4096
"""Events of a looked-up directory in KEEP that are not kept, beyond which it is no longer watched:
a storm in an unmarked directory takes time from guests with marks."""
HOLD_LIMIT = 4096
"""Largest number of events that wait for one guest's scan: about 50 ms of a storm."""
THREADS_LIMIT = 16
"""Threads whose marks the server reads itself; more are left to the agent."""
QUEUE_LOOK = 256
"""Events of the host's queue among which to search for those of one directory."""
DIFFERENCE_LIMIT = 4096
"""Names kept of what does not fit into the history of a directory."""
OPEN_HINTS_LIMIT = 8
"""Unanswered hints that are kept apart in one directory."""


class Share(Protocol):
    """What a scan asks of the export: to apply its marks, and to route all events before them."""

    def update(self, guest: Guest, key: NodeKey, bits: int) -> object:
        """Apply a mark. Raises OSError, ValueError."""

    def process(self, budget: int) -> None:
        """Route up to ``budget`` events, and do what is due."""

    def route(self, budget: int) -> None:
        """Route up to ``budget`` events."""

    def has_routed(self, stamp: float) -> bool:
        """Whether everything is routed that was read from the host up to then."""


class Arming:
    """Provisional watches and scans of one export. Calls ``on_work`` when ``deadline`` is earlier
    than before.
    """

    def __init__(
        self,
        share: Share,
        table: InodeTable,
        watcher: HostWatcher,
        interest: Interest,
        watches: Watches,
        counts: Counter[str],
        on_work: Callable[[], None],
    ) -> None:
        self._share = share
        self._table = table
        self._watcher = watcher
        self._interest = interest
        self._watches = watches
        self._counts = counts
        self._on_work = on_work
        self._nodes: dict[Inode, Provisional] = {}
        self._kept = 0  # events in all histories
        self._directories: dict[Guest, int] = {}  # that each guest has looked up
        self._seen: Counter[Guest] = Counter()  # files
        self.files = MarkedFiles(table, interest, watches)
        self.traced = TracedMarks(table, watcher, interest)
        self._updates: dict[Guest, list[tuple[NodeKey, int]]] = {}
        self._new_marks = NewMarks()
        self._number = 0  # of the last event
        self._doubts: dict[MountGuest, dict[LookUp, Provisional]] = {}
        self._holding: dict[MountGuest, Holding] = {}
        self._expiry = math.inf  # of the first provisional watch

    @property
    def deadline(self) -> float:
        """time.monotonic() at which ``expire`` has something to do; inf if never."""
        due = self._expiry
        for guest, holding in self._holding.items():
            if holding.events:
                due = min(due, holding.until)
                if any(not look_up.has_new for look_up in self._doubts.get(guest, ())):
                    due = min(due, self._new_marks.rest)
        return due

    def looked_up(
        self, guest: MountGuest, directory: Inode, thread: int, file: Entry | None = None
    ) -> None:
        """A thread of the guest may be about to watch a directory, or a file in it."""
        hint = guest.hint(thread)
        node = self._nodes.get(directory)
        known = node is not None and guest in node.by
        if not known and self._directories.get(guest, 0) >= DIRECTORIES_LIMIT:
            return
        if node is None:
            node = self._nodes[directory] = Provisional(directory)
            self._watches.provisional.add(directory)
            self._watches.set_watch(directory)
            self._expiry = min(self._expiry, node.expires)
            self._on_work()
        if not known:
            self._directories[guest] = self._directories.get(guest, 0) + 1
        look_up = node.by.get(guest)
        if look_up is None:
            look_up = node.by[guest] = LookUp(has_new=not guest.device)
        if node.muted:
            return
        node.expires = time.monotonic() + windows.KEEP
        node.renewals = windows.KEEP_RENEWALS
        self._watcher.catch_up()  # queued events happened before
        if look_up.open and (look_up.is_doubtful or self._is_queued(guest, directory)):
            self._look(guest, node, look_up, self._new_marks.rest_of_requests)
        if not look_up.open or (
            hint > look_up.open[-1].number and len(look_up.open) < OPEN_HINTS_LIMIT
        ):
            now = time.monotonic()
            look_up.open.append(Hint(hint, now, now))
        if len(look_up.threads) <= THREADS_LIMIT:
            look_up.threads.setdefault(thread, time.monotonic())
        if file is not None and file.inode not in look_up.seen and self._seen[guest] < SEEN_LIMIT:
            look_up.seen[file.inode] = Seen.of(file.attr)
            self._seen[guest] += 1

    def _is_queued(self, guest: MountGuest, directory: Inode) -> bool:
        """Whether there may be an event for the guest that is not routed yet. Its own are not: a
        program that creates and renames files would have its descriptors read at each look-up.
        """
        watcher = self._watcher
        if not watcher.backlog:
            return False
        wds = {watcher.wd_of(directory)}
        return watcher.backlog > QUEUE_LOOK or watcher.queue.has_any(wds, besides=guest)

    def _look(self, guest: MountGuest, node: Provisional, look_up: LookUp, rest: float) -> None:
        """If the guest can be seen to have no new mark there, earlier events are not delivered to
        it. Not before ``rest``.
        """
        if look_up.has_new or time.monotonic() < rest:
            return
        look_up.has_new = len(look_up.threads) > THREADS_LIMIT or self._new_marks.may_be(
            look_up.threads, guest.device, partial(self._knows, guest, node.inode, look_up)
        )
        if not look_up.has_new:
            now = time.monotonic()
            look_up.open = deque([look_up.open[-1]._replace(since=now)])
            look_up.threads = dict.fromkeys(look_up.threads, now)
            self._forget_seen(guest, look_up)
            self._trim(node)
            self._doubt_no_more(guest, look_up)

    def _forget_seen(self, guest: MountGuest, look_up: LookUp) -> None:
        self._seen[guest] -= len(look_up.seen)
        look_up.seen.clear()

    def _knows(
        self, guest: MountGuest, directory: Inode, look_up: LookUp, key: NodeKey, bits: int
    ) -> bool:
        """Whether a mark is elsewhere, or already known."""
        try:
            inode = self._table.find(key)
        except OSError:
            return False
        if directory not in (inode, inode.parent) and inode not in look_up.seen:
            return True
        return not bits & int(EVENTS) & ~int(self._interest.of(guest, inode))

    def _doubt_no_more(self, guest: MountGuest, look_up: LookUp) -> None:
        look_up.is_doubtful = False
        doubts = self._doubts.get(guest)
        if doubts is None:
            return
        doubts.pop(look_up, None)
        if not doubts:
            del self._doubts[guest]
            holding = self._holding.pop(guest, None)
            if holding is not None:
                self._release(guest, holding)

    def expire(self, now: float) -> None:
        """Drop watches for which no mark came, and end waits that are too long."""
        for guest, holding in list(self._holding.items()):
            if now >= self._new_marks.rest:
                for look_up, node in list(self._doubts.get(guest, {}).items()):
                    self._look(guest, node, look_up, self._new_marks.rest)
            if now >= holding.until and holding.events:
                self._give_up(guest, holding)
        if now < self._expiry:
            return
        due = [(inode, node) for inode, node in self._nodes.items() if node.expires <= now]
        old = [inode for inode, node in due if not node.renew(now)]
        for inode in old:
            node = self._nodes.pop(inode)
            self._kept -= len(node.history)
            for guest, look_up in node.by.items():
                self._count_down(guest)
                self._forget_seen(guest, look_up)
                self._doubt_no_more(guest, look_up)
            self._watches.provisional.discard(inode)
            self._watches.set_watch(inode)
        self._expiry = min((node.expires for node in self._nodes.values()), default=math.inf)

    def remember(self, event: Event) -> None:
        """Keep an event of a looked-up directory, or of a file whose mark is about to apply."""
        self._number += 1
        self.files.remember(self._number, event)
        for inode in {event.node, event.node2}:
            node = self._nodes.get(inode) if inode is not None else None
            if node is None or inode is None or node.muted:
                continue
            self._ask(node, event)
            may_be_due = any(
                event.stamp > look_up.since and not self._gets_anyway(guest, event)
                for guest, look_up in node.by.items()
            )
            if may_be_due and len(node.history) < HISTORY_LIMIT and self._kept < HISTORIES_LIMIT:
                guest = next(iter(node.by))
                node.history.append(Kept(self._number, event, guest.ways(event)))
                self._kept += 1
                continue
            if event.stamp > node.begun + windows.KEEP:
                node.unkept, node.begun = 0, event.stamp
            node.unkept += 1
            if node.unkept > STORM_LIMIT:
                self._mute(node, event)
            elif may_be_due:
                self._miss(node, event)

    def _miss(self, node: Provisional, event: Event) -> None:
        """Keep the difference that it makes instead of the event."""
        for place, missed in missed_by(event):
            before = node.missed.get(place)
            node.missed[place] = missed if before is None else before.followed_by(missed)
        if len(node.missed) > DIFFERENCE_LIMIT:
            node.missed = {p: m for p, m in node.missed.items() if not is_void(*p, m)}
        if len(node.missed) > DIFFERENCE_LIMIT // 2:
            self._mute(node, event)

    def _mute(self, node: Provisional, event: Event) -> None:
        """Stop watching the directory, unless a guest has a mark there."""
        node.missed.clear()
        node.lost_ns = time.time_ns() - int(1e9 * (time.monotonic() - event.stamp + QUEUED))
        self._counts["muted"] += 1
        self._watches.provisional.discard(node.inode)
        self._watches.set_watch(node.inode)

    def _ask(self, node: Provisional, event: Event) -> None:
        """Note for which guests the event is in doubt, and check where that is possible."""
        for guest, look_up in node.by.items():
            if event.stamp <= look_up.since or self._gets_anyway(guest, event):
                continue
            look_up.is_doubtful = True
            if not self._has_mark(guest, event):
                self._doubts.setdefault(guest, {})[look_up] = node
            self._look(guest, node, look_up, self._new_marks.rest)

    def _has_mark(self, guest: MountGuest, event: Event) -> bool:
        """Whether the guest watches there already. Then a new mark that asks for more is too
        unlikely to make other events wait: each look-up by a watcher would delay the next ones.
        """
        of = self._interest.of
        return any(i is not None and of(guest, i) for i in (event.node, event.child))

    def holds(self, guest: Guest, event: Event, halves: int) -> bool:
        """Whether an event for the guest, the last one remembered, waits for a scan."""
        if not isinstance(guest, MountGuest) or guest not in self._doubts:
            return False
        holding = self._holding.get(guest)
        if holding is None:
            holding = self._holding[guest] = Holding(guest, time.monotonic() + windows.HOLD)
            self._on_work()  # there is a deadline
        if len(holding.events) >= HOLD_LIMIT:
            self._give_up(guest, holding)
        if holding.is_over:
            return False
        event.freeze()
        holding.events.append((Kept(self._number, event, guest.ways(event)), halves))
        guest.history.hold(event)
        return True

    def held(self, guest: MountGuest) -> list[Event]:
        """The events that wait for a scan."""
        holding = self._holding.get(guest)
        return [kept.event for kept, _ in holding.events] if holding is not None else []

    def _give_up(self, guest: MountGuest, holding: Holding) -> None:
        """Nothing waits until the doubt has ended."""
        holding.is_over = True
        self._release(guest, holding)

    # Scans

    def scan_update(self, guest: Guest, key: NodeKey, bits: int) -> None:
        """A mark that the agent found changed; applied at the end of its scan."""
        updates = self._updates.setdefault(guest, [])
        if len(updates) >= MARKS_LIMIT:
            raise ProtocolError(f"more than {MARKS_LIMIT} marks changed in a scan")
        updates.append((key, bits))

    def asked(self) -> dict[MountGuest, int]:
        """The last hint of each guest that its agent has not answered."""
        last: dict[MountGuest, int] = {}
        for node in self._nodes.values():
            for guest, look_up in node.by.items():
                if guest.pid and look_up.is_awaited():
                    last[guest] = max(last.get(guest, 0), look_up.open[-1].number)
        return last

    def awaits(self, asked: Mapping[MountGuest, int]) -> bool:
        """Whether an agent has not answered up to these hints yet: there may be marks that only it
        knows.
        """
        return any(
            guest.pid and look_up.is_awaited(asked.get(guest, 0))
            for node in self._nodes.values()
            for guest, look_up in node.by.items()
        )

    def scan_abort(self, guest: Guest) -> None:
        """The agent is gone in the middle of a scan."""
        self._updates.pop(guest, None)
        if isinstance(guest, MountGuest):
            self.traced.since(guest)

    def forget(self, guest: Guest) -> None:
        """The guest has disconnected."""
        self.scan_abort(guest)
        for node in self._nodes.values():
            if isinstance(guest, MountGuest) and node.by.pop(guest, None) is not None:
                self._trim(node)
        self._directories.pop(guest, None)
        del self._seen[guest]
        if isinstance(guest, MountGuest):
            self._doubts.pop(guest, None)
            self._holding.pop(guest, None)

    def _disprove(self, guest: MountGuest, hint: int) -> None:
        """The guest has no marks from the look-ups up to that hint; but see ``_is_overtaken``."""
        seen: dict[frozenset[int], list[tuple[NodeKey, int]] | None] = {}
        for node in self._nodes.values():
            look_up = node.by.get(guest)
            if look_up is None:
                continue
            look_up.answered = hint
            if not self._is_overtaken(guest, node, look_up, hint, seen):
                self._disprove_of(node, guest, look_up, hint)
                continue
            while look_up.open and look_up.open[0].number <= hint:
                last = look_up.open.popleft()
            since = max(last.since, last.looked_up + windows.UNMARKED)
            if look_up.open:  # the mark may come from there
                since = min(since, look_up.open[0].since)
            look_up.open.appendleft(Hint(hint, last.looked_up, since))
            self._trim(node)

    def _is_overtaken(
        self,
        guest: MountGuest,
        node: Provisional,
        look_up: LookUp,
        hint: int,
        seen: dict[frozenset[int], list[tuple[NodeKey, int]] | None],
    ) -> bool:
        """Whether a mark may have been set since the agent looked: on a busy machine a program may
        take longer for that than the agent waits. ``seen``: what was read for this scan.
        """
        last = max((asked.since for asked in look_up.open if asked.number <= hint), default=0.0)
        if not guest.device or time.monotonic() > last + windows.HOLD:
            return False
        threads = frozenset(look_up.threads)
        if threads not in seen:
            is_much = len(threads) > THREADS_LIMIT or len(seen) >= THREADS_LIMIT
            seen[threads] = [] if is_much else self._new_marks.of(threads, guest.device)
        marks = seen[threads]
        return marks is None or not all(
            self._knows(guest, node.inode, look_up, *mark) for mark in marks
        )

    def _disprove_of(
        self, node: Provisional, guest: MountGuest, look_up: LookUp, hint: int
    ) -> None:
        look_up.has_new = not guest.device
        while look_up.open and look_up.open[0].number <= hint:
            look_up.open.popleft()
        if not look_up.open:
            look_up.threads.clear()
            self._forget_seen(guest, look_up)
        self._trim(node)
        if not any(kept.event.stamp > look_up.since for kept in reversed(node.history)):
            self._doubt_no_more(guest, look_up)

    def _trim(self, node: Provisional) -> None:
        """Drop events that no guest will get any more."""
        since = min((look_up.since for look_up in node.by.values()), default=math.inf)
        while node.history and node.history[0].event.stamp <= since:
            node.history.popleft()
            self._kept -= 1
        if not node.history:
            node.missed.clear()

    def _count_down(self, guest: Guest) -> None:
        count = self._directories[guest] - 1
        if count:
            self._directories[guest] = count
        else:
            del self._directories[guest]

    def scan_end(
        self, guest: MountGuest, hint: int, *, full: bool
    ) -> list[tuple[NodeKey, Exception]]:
        """``scan_ending``, completed at once."""
        self._share.process(self._watcher.backlog)
        return finish(self.scan_ending(guest, hint, full=full))

    def scan_ending(
        self, guest: MountGuest, hint: int, *, full: bool
    ) -> Job[list[tuple[NodeKey, Exception]]]:
        """Apply the marks, deliver the events since they were set; returns those that failed. Works
        on a GROUP at a time, so that a very large scan is divided.
        """
        guest.scanned(hint)
        since = self.traced.since(guest)
        updates = self._updates.pop(guest, [])
        failed: list[tuple[NodeKey, Exception]] = []
        if full:
            published = {key for key, bits in updates if bits}
            for inode in list(self._interest.marks(guest)):
                key = inode.key if inode is not None else NodeKey(0, 0)
                if key not in published:
                    updates.append((key, 0))
        due: dict[int, tuple[Kept, int]] = {}
        done = 0
        try:
            while done < len(updates):
                group = updates[done : done + GROUP]
                unwatched = [
                    inode
                    for inode in self.traced.unwatched(group)
                    if not self._has_asked(guest, inode)  # else its events are kept here
                ]
                files, until = self.files.watch(guest, group), time.monotonic()
                try:
                    yield from self._routing(self._as_of(guest, group))
                    done += self._apply(guest, group, files, failed, due)
                    self.traced.insert(guest, unwatched, since, until)
                finally:
                    for inode in files:
                        self.files.drop(guest, inode)
                if done < len(updates):
                    yield None  # not after the last: later events are delivered after these
        finally:
            self._deliver(guest, due)
            self._deliver_missed(guest, updates[:done])
        self._disprove(guest, hint)
        return failed

    def _has_asked(self, guest: MountGuest, inode: Inode) -> bool:
        """Whether a look-up of a directory has caused a hint that is not answered."""
        node = self._nodes.get(inode)
        look_up = node.by.get(guest) if node is not None else None
        return look_up is not None and bool(look_up.open)

    def _as_of(self, guest: MountGuest, updates: list[tuple[NodeKey, int]]) -> float:
        """The time from which the marks may hold (time.monotonic()): usually now. But everything in
        a directory since its look-up is delivered, so events that wait in the host's queue need
        no place in its history, which a storm soon fills.
        """
        self._watcher.drain()
        as_of = 0.0
        for key, bits in updates:
            inode = self._table.known(key.nodeid)
            node = self._nodes.get(inode) if inode is not None else None
            look_up = node.by.get(guest) if node is not None else None
            if not bits or look_up is None or not look_up.open:
                return time.monotonic()
            as_of = max(as_of, look_up.since)
        return as_of

    def _routing(self, stamp: float) -> Job[None]:
        """All that has happened up to then."""
        while not self._share.has_routed(stamp):
            self._share.route(GROUP)
            if not self._share.has_routed(stamp):
                yield Pause.LATER

    def _apply(
        self,
        guest: MountGuest,
        updates: list[tuple[NodeKey, int]],
        files: dict[Inode, Seen | None],
        failed: list[tuple[NodeKey, Exception]],
        due: dict[int, tuple[Kept, int]],
    ) -> int:
        """How many of them are done. Adds the events to deliver now, by number."""
        found, seen = self._since_look_ups(guest, {key for key, bits in updates if bits})
        found |= {kept.number: kept for inode in files for kept in self.files.events(inode)}
        undelivered = [
            kept
            for kept in self._draining(found.values())
            if not self._gets_anyway(guest, kept.event)
            and not self._interest.follows(guest, kept.event)
        ]
        end = time.monotonic() + GROUP_TIME
        done = 0
        for key, bits in updates:
            done += 1
            try:
                self._share.update(guest, key, bits)
            except (OSError, ValueError) as error:
                failed.append((key, error))
            if time.monotonic() > end:
                break
        by_name = set()  # delivered now; their self events follow in the guest
        for kept in self._draining(undelivered):
            if (wanted := self._wanted(guest, kept)) is not None:
                due[kept.number] = wanted
                by_name.add(kept.event)
        for number in [n for n, (kept, _) in due.items() if kept.event.part_of in by_name]:
            del due[number]
        events = [found[number].event for number in sorted(found)]
        for inode, now in files.items():
            mask = missing(seen.get(inode), now, self_events(inode, events, guest))
            interest = int(self._interest.of(guest, inode))
            for bit in (_MODIFY, _ATTRIB, _DELETE_SELF):
                if mask & bit and (interest & bit or (interest and bit == _DELETE_SELF)):
                    event = Event(inode, bit, b"", 0, HOST, time.monotonic(), inode)
                    self._number += 1
                    due[self._number] = Kept(self._number, event, guest.ways(event)), FIRST
        return done

    def _draining(self, items: Iterable[_T]) -> Iterator[_T]:
        """These; meanwhile the host's queue is read, which would overflow in a storm."""
        for index, item in enumerate(items):
            if index % DRAIN_EVERY == DRAIN_EVERY - 1:
                self._watcher.drain()
            yield item

    def _deliver_missed(self, guest: Guest, updates: list[tuple[NodeKey, int]]) -> None:
        """Deliver the difference for what was too much to keep."""
        marked = {key for key, bits in updates if bits}
        for inode, node in self._nodes.items():
            if (node.missed or node.lost_ns) and inode.key in marked:
                guest.has_missed(node.missed, node.lost_ns)

    def _since_look_ups(
        self, guest: MountGuest, marked: set[NodeKey]
    ) -> tuple[dict[int, Kept], dict[Inode, Seen]]:
        """The events where the guest has looked, since the programs did that hold these marks, and
        the files as it saw them.
        """
        found: dict[int, Kept] = {}
        seen: dict[Inode, Seen] = {}
        for node in self._nodes.values():
            look_up = node.by.get(guest)
            if look_up is None or not look_up.open:
                continue
            seen.update(look_up.seen)
            since = look_up.since
            if node.history and node.history[-1].event.stamp > since:
                since = max(since, self._first_look(guest, look_up, marked))
            for kept in node.history:
                if kept.event.stamp > since:
                    found[kept.number] = kept
        return found, seen

    def _first_look(self, guest: MountGuest, look_up: LookUp, marked: set[NodeKey]) -> float:
        """The first look-up by one of the programs that hold these marks; 0 if it is not known
        which of several they are.
        """
        threads = look_up.threads
        if not 1 < len(threads) <= THREADS_LIMIT or not guest.device:
            return 0.0
        holders = self._new_marks.holders(threads, guest.device, marked)
        return min((threads[thread] for thread in holders), default=0.0)

    def _gets_anyway(self, guest: MountGuest, event: Event) -> bool:
        if event.origin is guest or self._interest.wanted_halves(guest, event):
            return True
        return event.child is not None and bool(
            int(self._interest.of(guest, event.child)) & event.kind
        )

    def _wanted(self, guest: MountGuest, kept: Kept) -> tuple[Kept, int] | None:
        """The part of an event that the guest has asked for by now."""
        event = kept.event
        halves = self._interest.wanted_halves(guest, event)
        if halves:
            return kept, halves
        if event.child is not None and event.name:
            mask = int(self._interest.of(guest, event.child))
            if mask & event.kind:  # the mark is on the file itself
                own = Event(event.child, event.mask, b"", 0, event.origin, event.stamp, event.child)
                return kept._replace(event=own), FIRST
        return None

    def _deliver(self, guest: MountGuest, due: dict[int, tuple[Kept, int]]) -> None:
        """Deliver these, each behind older waiting events."""
        if not due:
            return
        last = max(due)
        holding = self._holding.get(guest)
        if holding is not None:
            due |= {kept.number: (kept, halves) for kept, halves in holding.take(last)}
        for _, (kept, halves) in self._draining(sorted(due.items())):
            guest.offer(kept.event, halves, kept.ways)

    def _release(self, guest: MountGuest, holding: Holding) -> None:
        """Deliver the waiting events."""
        for kept, halves in holding.take(self._number):
            guest.offer(kept.event, halves, kept.ways)
