"""The backlog: host events that were read and are not processed yet, in queue order.

Apart from the watcher, which reads them and decides their origin. The resolver takes the next one,
looks ahead, and takes related events out of order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Set
from itertools import islice
from typing import NamedTuple

from protocol.inotify import RawEvent
from protocol.masks import STRUCTURE, Mask

from .event import HOST, Origin
from .queuednames import QueuedNames

BACKLOG_LIMIT = 524_288
"""Events read and not yet processed, about 150 MB; beyond it there is an overflow."""
_OVERFLOW = RawEvent(-1, int(Mask.Q_OVERFLOW), 0, b"")
_ARRIVING = int(Mask.CREATE | Mask.MOVED_TO)
_MOVED_TO = int(Mask.MOVED_TO)
_STRUCTURE = int(STRUCTURE)


class Arrival(NamedTuple):
    """One event as read from the queue; ``stamp`` is time.monotonic(), ``number`` counts them."""

    raw: RawEvent
    origin: Origin
    stamp: float
    number: int


class Backlog:
    """The queue. Events that arrive while it is full become one overflow."""

    def __init__(self) -> None:
        self._arrivals: deque[Arrival] = deque()
        self._names = QueuedNames()
        # Cookies of waiting MOVED_TOs: most that are sought are not there, as nobody watches them
        self._moved_to: Counter[int] = Counter()
        self.next_number = 0
        """The number of the event that is read next."""

    def __len__(self) -> int:
        return len(self._arrivals)

    def push(self, raw: RawEvent, origin: Origin, stamp: float) -> bool:
        """An event was read; returns whether there was room for it."""
        if len(self._arrivals) >= BACKLOG_LIMIT:
            if self._arrivals[-1].raw is not _OVERFLOW:
                self._arrivals.append(Arrival(_OVERFLOW, HOST, stamp, self.next_number))
            return False
        arrival = Arrival(raw, origin, stamp, self.next_number)
        self._arrivals.append(arrival)
        self.next_number += 1
        self._count(arrival, 1)
        return True

    def _count(self, arrival: Arrival, step: int) -> None:
        origin = arrival.origin
        self._names.count(arrival.raw, None if origin is HOST else origin, step)
        if arrival.raw.mask & _MOVED_TO:
            cookie = arrival.raw.cookie
            self._moved_to[cookie] += step
            if not self._moved_to[cookie]:
                del self._moved_to[cookie]

    def pop(self) -> Arrival:
        """The next event in queue order."""
        arrival = self._arrivals.popleft()
        self._count(arrival, -1)
        return arrival

    def push_back(self, arrival: Arrival) -> None:
        """Undo a pop."""
        self._arrivals.appendleft(arrival)
        self._count(arrival, 1)

    def put_before(self, events: list[RawEvent], stamp: float) -> None:
        """The host's events that happened before all that wait; but nothing says of them what else
        was queued then.
        """
        first = self._arrivals[0].number if self._arrivals else self.next_number
        for before, raw in enumerate(reversed(events), 1):
            self.push_back(Arrival(raw, HOST, stamp, first - before))

    def has_any(self, wds: Set[int], besides: Origin | None = None) -> bool:
        """Whether an event of one of the watches waits that another party than ``besides`` has
        caused.
        """
        return any(a.raw.wd in wds and a.origin is not besides for a in self._arrivals)

    def discard(self, wds: Set[int]) -> None:
        """Drop the events of these watches, except for their ends."""
        if self.has_any(wds):
            self._keep(
                a for a in self._arrivals if a.raw.wd not in wds or a.raw.mask & Mask.IGNORED
            )

    def _keep(self, arrivals: Iterable[Arrival]) -> None:
        self._arrivals = deque(arrivals)
        self._names.clear()
        self._moved_to.clear()
        for arrival in self._arrivals:
            self._count(arrival, 1)

    def drop_known(self, wd: int, names: Container[bytes]) -> None:
        """Drop the first waiting event of each name, if it created a name that is in ``names``, or
        removed one that is not: it happened before they were read.
        """
        seen: set[bytes] = set()

        def is_told(raw: RawEvent) -> bool:
            if raw.wd != wd or not raw.mask & _STRUCTURE or raw.name in seen:
                return False
            seen.add(raw.name)
            return (raw.name in names) == bool(raw.mask & _ARRIVING)

        self._keep([arrival for arrival in self._arrivals if not is_told(arrival.raw)])

    def attribute_last(self, raw: RawEvent, origin: Origin) -> None:
        """The last such event belongs to another party, if there is one."""
        for index in reversed(range(len(self._arrivals))):
            arrival = self._arrivals[index]
            if arrival.raw == raw:
                self._arrivals[index] = arrival._replace(origin=origin)
                return

    def leaving(self, wd: int, name: bytes) -> int:
        """How many events remove or replace the name."""
        return self._names.leaving(wd, name)

    def is_changing(self, wd: int, name: bytes, besides: Origin) -> bool:
        """Whether an event of another party than that guest creates, removes or moves the name."""
        return self._names.is_changing(wd, name, besides)

    def is_past(self, number: int) -> bool:
        """Whether all events before that one are processed."""
        return not self._arrivals or self._arrivals[0].number >= number

    def peek(self, count: int) -> list[Arrival]:
        """The next events, not removed."""
        return [self._arrivals[i] for i in range(min(count, len(self._arrivals)))]

    def take_moved_to(self, cookie: int, within: int) -> Arrival | None:
        """Remove and return the other half of a rename, if it is among the next events."""
        for index, raw in self._of_rename(cookie, within):
            if raw.mask & _MOVED_TO:
                return self._take(index)
        return None

    def has_moved_to(self, cookie: int, within: int) -> bool:
        """Whether the other half of a rename is among the next events."""
        return any(raw.mask & _MOVED_TO for _, raw in self._of_rename(cookie, within))

    def _of_rename(self, cookie: int, within: int) -> Iterator[tuple[int, RawEvent]]:
        """Where its halves are, if the second one waits at all."""
        if cookie not in self._moved_to:
            return
        for index, arrival in enumerate(islice(self._arrivals, within)):
            if arrival.raw.cookie == cookie:
                yield index, arrival.raw

    def drop_rename(self, cookie: int, within: int) -> None:
        """Remove both halves of a rename from the next events."""
        for index, arrival in reversed([*enumerate(islice(self._arrivals, within))]):
            if arrival.raw.cookie == cookie:
                self._take(index)

    def _take(self, index: int) -> Arrival:
        arrival = self._arrivals[index]
        del self._arrivals[index]
        self._count(arrival, -1)
        return arrival
