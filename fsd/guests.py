"""Guests: who gets events, and the bounded outbox through which they get them.

A Guest that reads slowly never delays another: at its limit, events are not queued but noted by
name, and told as a difference once the outbox has room (DESIGN 4.5).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from protocol import frames
from protocol.masks import EVENTS, Mask

from .events import Event
from .inodes import Inode
from .listings import Missed, of_inode
from .watcher import Origin

OUTBOX_LIMIT = 262_144
"""Events queued for one guest: bursts that a native watcher with a raised max_queued_events
survives; some 100 MB at worst."""
MARKS_LIMIT = 1_048_576
"""Marks of one guest: the kernel's own ceiling for max_user_watches."""

_numbers = itertools.count(1)
FIRST, SECOND = 1, 2
"""Which half of a rename a guest asked for: what happened at the old, at the new place."""


class Guest(Origin):
    """One guest: its counters, and what it missed while its outbox was full."""

    __slots__ = (
        "counts", "events", "kinds", "latencies", "limit", "max_depth", "missed", "missing",
        "number", "via", "wake",
    )  # fmt: skip

    def __init__(self, name: str, *, limit: int = OUTBOX_LIMIT) -> None:
        super().__init__(name)
        self.number = next(_numbers)
        self.limit = limit
        self.events = EVENTS
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, int]] = Counter()  # what of counts is events: by their bits
        self.latencies: deque[float] = deque(maxlen=4096)  # seconds, host event to delivered
        self.missed: dict[tuple[Inode, bytes], Missed] = {}
        self.missing = False  # events are noted, not queued
        self.max_depth = 0
        self.via: Guest | None = None  # the mount through which it came
        self.wake: Callable[[], None] = _nothing

    @property
    def depth(self) -> int:
        """Events queued and not yet delivered."""
        raise NotImplementedError

    def enqueue(self, event: Event, halves: int) -> None:
        """Queue an event that the guest is interested in."""
        raise NotImplementedError

    def offer(self, event: Event, halves: int = FIRST) -> None:
        """Queue an event, or note it as missed. Of a rename, ``halves`` are asked for. Nobody
        changes it any more.
        """
        event.settle()
        if self.missing or self.depth >= self.limit:
            if not self.missing:
                self.missing = True
                self.counts["overflows"] += 1
            self.note_missed(event)
            return
        self.enqueue(event, halves)
        self.max_depth = max(self.max_depth, self.depth)
        self.wake()

    def note_missed(self, event: Event) -> None:
        """Remember by name what could not be told; the first ``before`` of a name counts."""
        self.counts["missed"] += 1
        places = [(event.node, event.name, event.before)]
        if event.node2 is not None:
            replaced = of_inode(event.replaced) if event.replaced is not None else None
            places.append((event.node2, event.name2, replaced))
        for node, name, before in places:
            old = self.missed.get((node, name))
            if old is None:
                self.missed[node, name] = Missed(before, event.mask)
            else:
                self.missed[node, name] = Missed(old.before, old.mask | event.mask)

    def count(self, what: str, mask: int, times: int = 1) -> None:
        """Count what became of an event."""
        self.counts[what] += times
        self.kinds[what, mask & 0xFFF] += times

    def delivered(self, mask: int, latency: float) -> None:
        """Count an event as delivered, ``latency`` seconds after it was read from the host."""
        self.count("replayed", mask)
        self.latencies.append(latency)


def _nothing() -> None:
    """No one waits for this guest's outbox yet."""


class Observer(Guest):
    """A guest that gets events as they are: tools, tests, simulated guests."""

    __slots__ = ("_before", "_handed", "_outbox", "token", "told")

    def __init__(self, name: str, *, limit: int = OUTBOX_LIMIT) -> None:
        super().__init__(name, limit=limit)
        self.token = b""  # by which it comes back to another server; b"" where it does not
        self.told = 0  # events that were handed out, and have left
        self._handed: list[frames.Event] = []  # those handed out last: they may be on the way
        self._before = 0  # how many of the outbox are of the server before
        self._outbox: deque[tuple[frames.Event, float]] = deque()

    @property
    def depth(self) -> int:
        """Events queued."""
        return len(self._outbox)

    def enqueue(self, event: Event, halves: int) -> None:
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
        self._outbox.append((frame, event.stamp))

    def take(self, limit: int) -> list[frames.Message]:
        """The next messages to send."""
        self.told += len(self._handed)
        self._handed = []
        while self._outbox and len(self._handed) < limit:
            frame, stamp = self._outbox.popleft()
            self._handed.append(frame)
            self.delivered(frame.mask, time.monotonic() - stamp)
        return list(self._handed)

    def undelivered(self) -> list[frames.Event]:
        """What may not have arrived: more than ``told`` events, and these have."""
        return [*self._handed, *(frame for frame, _ in self._outbox)]

    def resume(self, told: int, events: Sequence[frames.Event]) -> None:
        """Take up what the server before has told, and has not."""
        now = time.monotonic()
        self.told, self._before = told, len(events)
        self._outbox.extend((event, now) for event in events)

    def keep(self, token: bytes) -> None:
        """From now on, what is told is counted."""
        self.token, self.told, self._handed = token, 0, []

    def received(self, count: int) -> None:
        """The guest has come back, with so many events received in all."""
        known = min(max(count - self.told, 0), self._before)
        for _ in range(known):
            self._outbox.popleft()
        if count > self.told + known:  # the server that told it was killed before it saved that
            lost = frames.Event(0, 0, int(Mask.Q_OVERFLOW), 0, b"")
            self._outbox.appendleft((lost, time.monotonic()))
        self._before = 0
        self.told = count


class HandMarks(Guest):
    """Marks that people set by hand. They hold host watches; their events are only counted."""

    __slots__ = ()

    @property
    def depth(self) -> int:
        """Nothing is queued."""
        return 0

    def enqueue(self, event: Event, halves: int) -> None:
        """Count it."""
        self.delivered(event.mask, time.monotonic() - event.stamp)

    def take(self, limit: int) -> list[frames.Message]:
        """Nothing is sent."""
        return []
