"""Guests, the receivers of events, and the bounded outbox of each.

A guest that reads slowly never delays another: at its limit, events are not queued but noted by
name, and delivered as a difference once the outbox has room.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import structlog

from protocol import frames
from protocol.masks import EVENTS, Mask

from ..events.event import Event, Origin
from ..events.missed import Missed
from ..files.inode import Inode
from ..files.listing import of_inode

if TYPE_CHECKING:
    from .ledger import Ways

log = structlog.get_logger()
TOKEN_SIZE = 16
"""Bytes of the token that an observer presents when it reconnects."""
OUTBOX_LIMIT = 262_144
"""Events queued for one guest: as many as a native watcher with a raised max_queued_events
survives; about 100 MB at most."""
OUTBOX_BYTES = 256 << 20
"""Bytes of events that wait for one guest, in its agent's outbox and those of all its observers
together: OUTBOX_LIMIT events of an agent. Beyond that, events are noted by name."""
EVENT_COST = 350
"""Bytes of an event in an observer's outbox, without its name."""
MISSED_COST = 600
"""Bytes of a missed name, without the name and its known state."""
MISSED_LIMIT = 65_536
"""Names that one guest may have missed, 40 MB. Beyond it they are dropped, and the directories that
it watches are compared as a whole (fsd.events.compare.changed_lately)."""
QUEUED = 2.0
"""Longest time in seconds that the first missed event may have waited in the host's queue."""
PRUNE_AT = 4096
"""Number of missed names at which those that came and went are removed; then at twice as many as
are left."""
MARKS_LIMIT = 524_288
"""Marks of one guest: as high as editors advise to set max_user_watches; about 0.5 GB without host
watches, whose number has a limit of its own (fsd.export.watchlimit)."""

_LEAVES = int(Mask.DELETE | Mask.MOVED_FROM)
_numbers = itertools.count(1)
_LOST = frames.Event(0, 0, int(Mask.Q_OVERFLOW), 0, b"")
FIRST, SECOND = 1, 2
"""Which half of a rename a guest asked for: the event at the old, at the new place."""


def new_token() -> bytes:
    """The token that an observer presents when it reconnects; it cannot be guessed."""
    return secrets.token_bytes(TOKEN_SIZE)


class Account:
    """Bytes that wait for one guest, its own and those of the channels that came through it."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = OUTBOX_BYTES) -> None:
        self.limit = limit
        self.used = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more may wait."""
        return self.used >= self.limit

    @property
    def is_overdrawn(self) -> bool:
        """Whether not even missed names may be noted: they have a quarter more."""
        return self.used >= self.limit * 5 // 4


class Guest(Origin):
    """One guest: its counters, and what it missed while its outbox was full."""

    __slots__ = (
        "_missing_since", "_prune_at", "_used", "account", "counts", "events", "has_left",
        "kinds", "latencies", "limit", "lost_since", "max_depth", "missed", "missing", "number",
        "via", "wake",
    )  # fmt: skip

    def __init__(self, name: str, *, limit: int = OUTBOX_LIMIT) -> None:
        super().__init__(name)
        self.number = next(_numbers)
        self.limit = limit
        self.events = EVENTS
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, int]] = Counter()  # the counts of events, by their bits
        self.latencies: deque[float] = deque(maxlen=4096)  # seconds, host event to delivered
        self.missed: dict[tuple[Inode, bytes], Missed] = {}
        self.missing = False  # events are noted, not queued
        self._prune_at = PRUNE_AT  # names that were missed
        self._missing_since = time.time_ns()
        self.lost_since = 0  # time.time_ns() since which not even names are noted; 0 = they are
        self.account = Account()
        self._used = 0  # of the account
        self.has_left = False
        self.max_depth = 0
        self.via: Guest | None = None  # the mount through which it came
        self.wake: Callable[[], None] = _nothing

    def join(self, via: Guest | None) -> None:
        """The guest came through that mount, and shares its account."""
        account = via.account if via is not None else Account()
        self.account.used -= self._used
        account.used += self._used
        self.via, self.account = via, account

    def events_lost(self) -> None:
        """Events of the host were lost; a comparison has delivered, or will deliver, the
        difference.
        """

    def leave(self) -> None:
        """The guest has disconnected: drop everything that waits for it."""
        self.has_left = True
        self.wake = _nothing
        self.missed = {}
        self._charge(-self._used)

    def _charge(self, cost: int) -> None:
        self._used += cost
        self.account.used += cost

    @property
    def depth(self) -> int:
        """Events queued and not yet delivered."""
        raise NotImplementedError

    def enqueue(self, event: Event, halves: int, ways: Ways | None = None) -> None:
        """Queue an event that the guest is interested in. ``ways``: the ways to its places, if not
        the present ones.
        """
        raise NotImplementedError

    def offer(self, event: Event, halves: int = FIRST, ways: Ways | None = None) -> None:
        """Queue an event (see ``enqueue``), or note it as missed. For a rename, ``halves`` are
        those asked for. The event is not changed any more.
        """
        if self.has_left:
            return
        event.freeze()
        if self.missing or self.depth >= self.limit or self.account.is_full:
            self._begin_missing(event.stamp)
            self.note_missed(event)
            return
        self.enqueue(event, halves, ways)
        self.max_depth = max(self.max_depth, self.depth)
        self.wake()

    def _begin_missing(self, stamp: float) -> None:
        if not self.missing:
            self.missing = True
            ago = time.monotonic() - stamp + QUEUED
            self._missing_since = time.time_ns() - int(ago * 1e9)
            self.counts["overflows"] += 1

    def has_missed(self, missed: dict[tuple[Inode, bytes], Missed], lost_since: int) -> None:
        """These are delivered as a difference, once the outbox is empty; and all changes since
        ``lost_since`` (time.time_ns(); 0 = only these).
        """
        self._begin_missing(time.monotonic())
        for (node, name), one in missed.items():
            self.miss(node, name, one)
        if lost_since and not self.lost_since:
            self.lost_since = lost_since
        self.wake()

    def note_missed(self, event: Event) -> None:
        """Note by name an event that could not be delivered; the first ``before`` of a name
        counts.
        """
        self.counts["missed"] += 1
        if self.lost_since:
            return
        for (node, name), missed in missed_by(event):
            self.miss(node, name, missed)
        if len(self.missed) >= self._prune_at or self.account.is_overdrawn:
            self._prune()

    def miss(self, node: Inode, name: bytes, missed: Missed) -> None:
        """Note one name."""
        old = self.missed.get((node, name))
        if old is None:
            self.missed[node, name] = missed
            self._charge(MISSED_COST + len(name))
        else:
            self.missed[node, name] = old.followed_by(missed)

    def _prune(self) -> None:
        """Drop names that came and went meanwhile; if too many are left, all of them."""
        kept = {
            place: missed for place, missed in self.missed.items() if not is_void(*place, missed)
        }
        self._forget_missed(kept)
        self._prune_at = max(PRUNE_AT, 2 * len(kept))
        if len(kept) > MISSED_LIMIT // 2 or self.account.is_overdrawn:
            self._forget_missed({})
            self.lost_since = self._missing_since
            self.counts["given_up"] += 1
            log.warning("events lost", guest=self.name, names=len(kept))

    def _forget_missed(self, kept: dict[tuple[Inode, bytes], Missed]) -> None:
        dropped = self.missed.keys() - kept.keys()
        self._charge(-sum(MISSED_COST + len(name) for _, name in dropped))
        self.missed = kept

    def caught_up(self) -> tuple[dict[tuple[Inode, bytes], Missed], int]:
        """What to deliver now; from now on events are queued again. Returns names, and the time
        since which all changes are to be delivered (time.time_ns(); 0 = only the names).
        """
        missed, since = self.missed, self.lost_since
        self._forget_missed({})
        self.missing, self.lost_since, self._prune_at = False, 0, PRUNE_AT
        return missed, since

    def count(self, what: str, mask: int, times: int = 1) -> None:
        """Count how an event was handled."""
        self.counts[what] += times
        self.kinds[what, mask & 0xFFF] += times

    def delivered(self, mask: int, latency: float) -> None:
        """Count an event as delivered, ``latency`` seconds after it was read from the host."""
        self.count("replayed", mask)
        self.latencies.append(latency)


def missed_by(event: Event) -> Iterator[tuple[tuple[Inode, bytes], Missed]]:
    """What a guest has missed that did not get the event, by place."""
    before = event.before
    if before is None and event.kind & _LEAVES and event.name and event.child is not None:
        before = of_inode(event.child)  # of a directory whose names were not known
    yield (event.node, event.name), Missed(before, event.mask)
    if event.node2 is not None:
        replaced = of_inode(event.replaced) if event.replaced is not None else None
        yield (event.node2, event.name2), Missed(replaced, event.mask)


def is_void(node: Inode, name: bytes, missed: Missed) -> bool:
    """Whether the name did not exist before, and does not now."""
    if missed.before is not None or not name:
        return False
    return node.listing is None or name not in node.listing.names


def _nothing() -> None:
    """Nothing waits for this guest's outbox yet."""


class Observer(Guest):
    """A guest that gets events as messages: tools, tests, simulated guests.

    ``reports_losses``: it gets IN_Q_OVERFLOW also for a loss that a comparison recovers.
    """

    __slots__ = ("_before", "_handed", "_outbox", "reports_losses", "sent", "token")

    def __init__(
        self, name: str, *, limit: int = OUTBOX_LIMIT, reports_losses: bool = False
    ) -> None:
        super().__init__(name, limit=limit)
        self.reports_losses = reports_losses
        self.token = b""  # to reconnect to another server; b"" if it will not
        self.sent = 0  # events that were handed out before the last batch
        self._handed: list[frames.Event] = []  # the last batch handed out: it may be on the way
        self._before = 0  # how many of the outbox are of the server before
        self._outbox: deque[tuple[frames.Event, float]] = deque()

    @property
    def depth(self) -> int:
        """Events queued."""
        return len(self._outbox)

    def enqueue(self, event: Event, halves: int, ways: Ways | None = None) -> None:
        """Queue the event's frames: a rename has two, an exchange four."""
        isdir = event.mask & int(Mask.ISDIR)
        replaced = event.replaced
        isdir2 = int(Mask.ISDIR) if replaced is not None and replaced.is_dir else 0
        if event.node2 is None:
            self._frame(event, event.node, event.name, event.mask, event.cookie)
            if event.exchanged:
                mask = int(Mask.MOVED_FROM) | isdir2
                self._frame(event, event.node, event.name, mask, event.exchanged)
            return
        old, new = (event.node, event.name), (event.node2, event.name2)
        moves = [(FIRST, old, SECOND, new, isdir, event.cookie)]
        if event.exchanged:
            moves.append((SECOND, new, FIRST, old, isdir2, event.exchanged))
        for half_from, source, half_to, target, flag, cookie in moves:
            if halves & half_from:
                self._frame(event, *source, int(Mask.MOVED_FROM) | flag, cookie)
            if halves & half_to:
                self._frame(event, *target, int(Mask.MOVED_TO) | flag, cookie)

    def _frame(self, event: Event, node: Inode, name: bytes, mask: int, cookie: int) -> None:
        frame = frames.Event(node.nodeid, node.generation, mask, cookie, name)
        self._queue(frame, event.stamp)

    def _queue(self, frame: frames.Event, stamp: float) -> None:
        self._outbox.append((frame, stamp))
        self._charge(EVENT_COST + len(frame.name))

    def _next(self) -> tuple[frames.Event, float]:
        frame, stamp = self._outbox.popleft()
        self._charge(-EVENT_COST - len(frame.name))
        return frame, stamp

    def leave(self) -> None:
        """The guest has disconnected."""
        super().leave()
        self._outbox.clear()
        self._handed.clear()

    def caught_up(self) -> tuple[dict[tuple[Inode, bytes], Missed], int]:
        """As for any guest; as with a full inotify queue, the observer gets IN_Q_OVERFLOW."""
        missed, since = super().caught_up()
        if since or self.reports_losses:
            self._queue(_LOST, time.monotonic())
        return missed, since

    def events_lost(self) -> None:
        """If it wants losses reported, one IN_Q_OVERFLOW for consecutive ones."""
        if not self.reports_losses or self.missing:
            return  # in the latter case it gets one when it has caught up
        if not self._outbox or self._outbox[-1][0] is not _LOST:
            self._queue(_LOST, time.monotonic())
            self.wake()

    def take(self, limit: int) -> list[frames.Message]:
        """The next messages to send."""
        self.sent += len(self._handed)
        self._handed = []
        while self._outbox and len(self._handed) < limit:
            frame, stamp = self._next()
            self._handed.append(frame)
            self.delivered(frame.mask, time.monotonic() - stamp)
        return list(self._handed)

    def undelivered(self) -> list[frames.Event]:
        """Events that may not have arrived; those before them have."""
        return [*self._handed, *(frame for frame, _ in self._outbox)]

    def resume(self, sent: int, events: Sequence[frames.Event]) -> None:
        """Take over what the previous server has delivered, and what it has not."""
        now = time.monotonic()
        self.sent, self._before = sent, len(events)
        for event in events:
            self._queue(event, now)

    def keep(self, token: bytes) -> None:
        """From now on, delivered events are counted."""
        self.token, self.sent, self._handed = token, 0, []

    def received(self, count: int) -> None:
        """The observer has reconnected; it has received ``count`` events in total."""
        known = min(max(count - self.sent, 0), self._before)
        for _ in range(known):
            self._next()
        # A comparison delivers the changes meanwhile; and if the server was killed before it saved
        # what it had delivered, that is unknown.
        if self.reports_losses or count > self.sent + known:
            self._queue(_LOST, time.monotonic())
            self._outbox.rotate(1)
        self._before = 0
        self.sent = count


BY_HAND = "by hand"
"""The name of the guest that holds the host's own marks by hand. An image names that of a machine
by its mount."""


class HandMarks(Guest):
    """Marks set by hand. They hold host watches; their events are only counted."""

    __slots__ = ()

    @property
    def depth(self) -> int:
        """Nothing is queued."""
        return 0

    def enqueue(self, event: Event, halves: int, ways: Ways | None = None) -> None:
        """Count it."""
        self.delivered(event.mask, time.monotonic() - event.stamp)

    def take(self, limit: int) -> list[frames.Message]:
        """Nothing is sent."""
        return []
