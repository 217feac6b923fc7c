"""The scanner's timetable: when to read which process.

Apart from the scanner's thread, so that tests can use any clock: all times are time.monotonic()
seconds, and nothing here sleeps or reads processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import NamedTuple

from protocol.frames import ALL_PROCESSES

STEPS = (0.0, 0.0005, 0.002, 0.008, 0.016, 0.024, 0.032, 0.064, 0.12, 0.5, 1.0, 2.5)
"""Seconds after a process's last hint at which to read it: the mark usually comes right after the
look-up. The server keeps its provisional watches a little longer."""
TRACED_STEPS = (0.12,)
"""The same if the calls that set marks are traced: for those of 32-bit programs, which are not."""
SPACING = 0.008
"""Seconds between readings of a process that keeps looking things up, grown to gradually: a process
that has just begun sets its marks now."""
SETTLE = 0.008
"""Seconds after a hint until a reading without a mark shows that none was set: from the answer to a
look-up to the mark it takes microseconds, unless the process has to wait for a processor."""
ANSWERS = 0.03
"""Seconds between answers to a server that keeps sending hints: each costs both sides a message."""
SHARE, ALL_SHARE = 9.0, 3.0
"""After a reading, the process rests for at least this many times the duration of the reading; so
do all together."""
FULL_EVERY = 30.0
"""Seconds between full scans while something happens. When idle there are none, unless marks may be
set that nothing reports."""
RECHECK = 2.0
"""Seconds after which the known watchers are read again, while they get events."""
RETRY = 0.5
"""Seconds after which a failed reading is repeated."""
CALLS = 0.005
"""Seconds between readings of the trace while a process is to be read that has to rest."""
HOT_LIMIT = 4096
"""Largest number of processes read one by one; beyond that, all are scanned."""
OPEN_LIMIT = 256
"""Largest number of unanswered hints that are kept apart; the rest is answered as one."""


class Look(NamedTuple):
    """What to read now."""

    pids: frozenset[int]
    full: bool = False  # all processes, these among them
    watchers: bool = False  # and the known watchers


class _Hot:
    """A process that has just looked something up."""

    __slots__ = ("began", "hinted", "rest", "step")

    def __init__(self, now: float) -> None:
        self.began = self.hinted = now
        self.rest = 0.0  # not before then
        self.step = 0


class _Hint:
    """A hint that is not answered yet."""

    __slots__ = ("asked", "number", "pids", "settled")

    def __init__(self) -> None:
        self.number = 0
        self.settled = 0.0
        self.pids: set[int] = set()  # still to be read, from ``settled`` on
        self.asked: set[int] = set()  # that it is about, if calls are traced


class Schedule:
    """``is_traced``: ``call`` reports the calls that set marks. ``blind``: marks may be set that
    neither a hint nor a call reports.
    """

    def __init__(self, now: float, *, is_traced: bool = False, blind: bool = False) -> None:
        self._steps = TRACED_STEPS if is_traced else STEPS
        self._is_traced = is_traced
        self._blind = blind
        self._hot: dict[int, _Hot] = {}
        self._open: deque[_Hint] = deque()
        self._hinted_since = -inf
        self._called: set[int] = set()
        self._heavy: dict[int, float] = {}  # processes that took long to read, and until when to
        self._rest = 0.0  # rest
        self._full_at = now + FULL_EVERY
        self._full_rest = 0.0
        self._is_behind = False  # a full scan is needed, whatever happens
        self._recheck_at = inf
        self.exits_unseen = False
        """Some processes with marks may exit unnoticed."""
        self._answered = 0
        self._answer_at = 0.0

    @property
    def hot(self) -> int:
        """How many processes are read one by one."""
        return len(self._hot)

    def hint(self, number: int, pids: Collection[int], now: float) -> None:
        """The server reports that these processes have looked something up; ALL_PROCESSES: all."""
        if not self._open and not self._hot:
            self._hinted_since = now
        if len(self._open) < OPEN_LIMIT:
            self._open.append(_Hint())
        last = self._open[-1]
        last.number, last.settled = number, now + SETTLE
        if ALL_PROCESSES in pids or len(self._hot) + len(pids) > HOT_LIMIT:
            last.pids.add(ALL_PROCESSES)
            last.asked.add(ALL_PROCESSES)
            self.look_at_all(now + SETTLE)
            return
        if self._is_traced:
            last.asked.update(pids if len(last.asked) < HOT_LIMIT else (ALL_PROCESSES,))
        else:
            last.pids.update(pids)
        for pid in pids:
            hot = self._hot.setdefault(pid, _Hot(now))
            hot.hinted, hot.step = now, 0

    def call(self, pids: Iterable[int]) -> None:
        """These have set or removed marks: they are read as soon as possible; those that take long,
        because they have many, behind the others.
        """
        self._called.update(pids)

    @property
    def is_called(self) -> bool:
        """Whether such a reading is due."""
        return bool(self._called)

    def look_at_all(self, at: float) -> None:
        """Scan all processes at that time."""
        self._is_behind = True
        self._full_at = min(self._full_at, at)

    def events_flow(self, now: float) -> None:
        """Check in a while whether the known watchers still exist."""
        if self._recheck_at == inf:
            self._recheck_at = now + RECHECK

    def expect_new_server(self, now: float) -> None:
        """Prepare for another server, which has sent no hints yet and needs all marks."""
        self._open.clear()
        self._answered, self._answer_at = 0, 0.0
        self._rest = self._full_rest = 0.0
        self.look_at_all(now)

    def next(self) -> float:
        """When to call ``take``; inf when idle."""
        due = min((self._due(hot) for hot in self._hot.values()), default=inf)
        due = min(due, min((self._heavy.get(pid, 0.0) for pid in self._called), default=inf))
        if self._open and not self._open[0].pids:
            due = min(due, max(self._open[0].settled, self._answer_at))
        if self._wants_full:
            due = min(due, max(self._full_at, self._full_rest))
        return max(min(due, self._recheck_at), self._rest)

    def _due(self, hot: _Hot) -> float:
        return max(hot.hinted + self._steps[hot.step], hot.rest)

    @property
    def _wants_full(self) -> bool:
        """Whether all processes are to be scanned now and then, or soon."""
        busy = bool(self._hot) or self._recheck_at < inf
        return busy or self._blind or self._is_behind or self.exits_unseen

    def take(self, now: float) -> Look | None:
        """What to read now; then call ``done``. None if nothing is due."""
        if now < self.next():
            return None
        if self._wants_full and now >= max(self._full_at, self._full_rest):
            return Look(frozenset(), full=True)
        pids = [pid for pid, hot in self._hot.items() if self._due(hot) <= now]
        called = self._called - self._heavy.keys()
        if not called:
            called = {pid for pid in self._called if self._heavy[pid] <= now}
        look = Look(frozenset((*pids, *called)), watchers=now >= self._recheck_at)
        return look if look.pids or look.watchers else None

    def done(self, look: Look, gone: Collection[int], began: float, now: float, *,
             complete: bool, heavy: Mapping[int, float] | None = None) -> None:  # fmt: skip
        """It was read from ``began`` to ``now``. ``gone``: processes that have exited.
        ``complete``: everything could be read. ``heavy``: seconds that some have taken."""
        took = now - began
        heavy = heavy or {}
        long = min(took, sum(heavy.values()))
        self._rest = now + ALL_SHARE * (took - long)
        for pid in [pid for pid in self._heavy if look.full or pid in look.pids or pid in gone]:
            del self._heavy[pid]
        self._heavy.update((pid, now + SHARE * long) for pid in heavy)
        self._called -= look.pids
        if look.watchers:
            self._recheck_at = inf
        if look.full:
            self._called.clear()
            self._is_behind = not complete
            self._full_at = now + (FULL_EVERY if complete else RETRY)
            self._full_rest = now + SHARE * took
        elif not complete:
            self.look_at_all(now + RETRY)
        for pid in list(self._hot) if look.full else look.pids:
            self._looked_at(pid, pid in gone, began, now, took / max(1, len(look.pids)))
        if complete:
            self._settle_hints(look, gone, began)

    def _looked_at(self, pid: int, is_gone: bool, began: float, now: float, took: float) -> None:
        hot = self._hot.get(pid)
        if hot is None:
            return
        while hot.step < len(self._steps) and hot.hinted + self._steps[hot.step] <= began:
            hot.step += 1
        if is_gone or hot.step == len(self._steps):
            del self._hot[pid]
        hot.rest = now + max(SHARE * took, min(SPACING, (now - hot.began) / 4))

    def _settle_hints(self, look: Look, gone: Collection[int], began: float) -> None:
        """Note for each hint which of its processes have been read late enough."""
        for hint in self._open:
            hint.pids.difference_update(gone)
            if began < hint.settled:
                if look.full and ALL_PROCESSES in hint.pids:
                    self.look_at_all(hint.settled)
            elif look.full:
                hint.pids.clear()
            else:
                hint.pids -= look.pids

    def unanswered(self) -> set[int]:
        """The processes that are still to be read for a hint."""
        return set().union(*(hint.pids for hint in self._open))

    def answer_without(
        self,
        changed: Collection[int],
        settled: Collection[int],
        read: Collection[int],
        began: float,
    ) -> int:
        """The last hint that can be answered before the changes that a reading from ``began`` on
        has found: those up to it do not come from the processes with changes. ``settled``: those
        that had ended, or were not setting marks when they were read.
        """
        while self._open and not self._is_traced:
            hint = self._open[0]
            is_settled = began >= hint.settled
            left = hint.pids.difference(settled, read if is_settled else ())
            if left or not hint.pids.isdisjoint(changed):
                break
            self._answered = self._open.popleft().number
        return self._answered

    def _may_lack(self, hint: _Hint) -> bool:
        """Whether the process of a hint may have set a mark that is not read yet."""
        if self._is_behind or ALL_PROCESSES in hint.asked:
            return self._is_behind or bool(self._called)
        return not self._called.isdisjoint(hint.asked)

    def answer(self, now: float) -> int:
        """The last hint that can be answered: all of its processes have been read since, and so has
        the trace of calls.
        """
        answered = self._answered
        while self._open and now >= max(self._open[0].settled, self._answer_at):
            if self._open[0].pids or (self._is_traced and self._may_lack(self._open[0])):
                break
            self._answered = self._open.popleft().number
        if self._answered != answered:
            self._answer_at = now + min(ANSWERS, (now - self._hinted_since) / 4)
        return self._answered
