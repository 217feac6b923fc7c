"""When the agent looks at which process: the scanner's timetable.

Apart from the scanner's thread, so that it can be tried with any clock: all times are
time.monotonic() seconds, and nothing here sleeps or looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from math import inf
from typing import NamedTuple

from protocol.frames import ALL_PROCESSES

STEPS = (0.0, 0.0005, 0.002, 0.008, 0.016, 0.024, 0.032, 0.064, 0.12, 0.5, 1.0, 2.5)
"""Seconds after a process's last hint at which to look at it: the mark comes just after the
look-up, mostly. The server keeps its provisional watches for a little longer."""
TRACED_STEPS = (0.12,)
"""The same where the calls that set marks are traced: for those of 32-bit programs, which are
not."""
SPACING = 0.008
"""Seconds between looks at a process that goes on looking things up. It is reached by and by: what
has just begun sets its marks now."""
SETTLE = 0.008
"""Seconds after a hint until a look that finds no mark says that none was set: from the answer to a
look-up to the mark it takes microseconds, unless the process has to wait for a processor."""
ANSWERS = 0.03
"""Seconds between answers to a server that goes on giving hints: each costs both a message."""
SHARE, ALL_SHARE = 9.0, 3.0
"""A look at a process is followed by at least this many times its own duration of rest for that
process, and for all."""
FULL_EVERY = 30.0
"""Seconds between full looks while something happens; at rest there are none, unless marks may be
set that nothing tells of."""
RECHECK = 2.0
"""Seconds after which the known watchers are read again, while events flow to them."""
RETRY = 0.5
"""Seconds after which what could not be looked at is looked at again."""
HOT_LIMIT = 4096
"""Processes looked at one by one, at most; beyond that, all are looked at."""
OPEN_LIMIT = 256
"""Hints that are told apart while they are not answered; the rest is answered as one."""


class Look(NamedTuple):
    """What is to be looked at now."""

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

    __slots__ = ("number", "pids", "settled")

    def __init__(self) -> None:
        self.number = 0
        self.settled = 0.0
        self.pids: set[int] = set()  # still to be looked at, from ``settled`` on


class Schedule:
    """``is_traced``: the calls that set marks are told by ``call``; ``blind``: marks may be set
    that neither a hint nor a call tells of.
    """

    def __init__(self, now: float, *, is_traced: bool = False, blind: bool = False) -> None:
        self._steps = TRACED_STEPS if is_traced else STEPS
        self._is_traced = is_traced
        self._blind = blind
        self._hot: dict[int, _Hot] = {}
        self._open: deque[_Hint] = deque()
        self._hinted_since = -inf
        self._called: set[int] = set()
        self._rest = 0.0
        self._full_at = now + FULL_EVERY
        self._full_rest = 0.0
        self._is_behind = False  # a full look is wanted, no matter what happens
        self._recheck_at = inf
        self.exits_unseen = False
        """Some processes with marks may end without our being told."""
        self._answered = 0
        self._answer_at = 0.0

    @property
    def hot(self) -> int:
        """How many processes are looked at one by one."""
        return len(self._hot)

    def hint(self, number: int, pids: Collection[int], now: float) -> None:
        """The server says that these processes have looked something up; ALL_PROCESSES is all."""
        if not self._open and not self._hot:
            self._hinted_since = now
        if len(self._open) < OPEN_LIMIT:
            self._open.append(_Hint())
        last = self._open[-1]
        last.number, last.settled = number, now + SETTLE
        if ALL_PROCESSES in pids or len(self._hot) + len(pids) > HOT_LIMIT:
            last.pids.add(ALL_PROCESSES)
            self.look_at_all(now + SETTLE)
            return
        if not self._is_traced:
            last.pids.update(pids)
        for pid in pids:
            hot = self._hot.setdefault(pid, _Hot(now))
            hot.hinted, hot.step = now, 0

    def call(self, pids: Iterable[int]) -> None:
        """These have set or removed marks: they are looked at as soon as may be."""
        self._called.update(pids)

    @property
    def is_called(self) -> bool:
        """Whether such a look is due."""
        return bool(self._called)

    def look_at_all(self, at: float) -> None:
        """Look at all processes then."""
        self._is_behind = True
        self._full_at = min(self._full_at, at)

    def events_flow(self, now: float) -> None:
        """See in a while whether the known watchers still want them."""
        if self._recheck_at == inf:
            self._recheck_at = now + RECHECK

    def anew(self, now: float) -> None:
        """Another server, which has given no hints yet: it is told all at once."""
        self._open.clear()
        self._answered, self._answer_at = 0, 0.0
        self._rest = self._full_rest = 0.0
        self.look_at_all(now)

    def next(self) -> float:
        """When to call ``take``; inf at rest."""
        due = min((self._due(hot) for hot in self._hot.values()), default=inf)
        if self._called:
            due = 0.0
        if self._open and not self._open[0].pids:
            due = min(due, max(self._open[0].settled, self._answer_at))
        if self._wants_full:
            due = min(due, max(self._full_at, self._full_rest))
        return max(min(due, self._recheck_at), self._rest)

    def _due(self, hot: _Hot) -> float:
        return max(hot.hinted + self._steps[hot.step], hot.rest)

    @property
    def _wants_full(self) -> bool:
        """Whether all processes are to be looked at now and then, or soon."""
        busy = bool(self._hot) or self._recheck_at < inf
        return busy or self._blind or self._is_behind or self.exits_unseen

    def take(self, now: float) -> Look | None:
        """What to look at now; then call ``done``. None where it is not time yet."""
        if now < self.next():
            return None
        if self._wants_full and now >= max(self._full_at, self._full_rest):
            return Look(frozenset(), full=True)
        pids = [pid for pid, hot in self._hot.items() if self._due(hot) <= now]
        look = Look(frozenset((*pids, *self._called)), watchers=now >= self._recheck_at)
        return look if look.pids or look.watchers else None

    def done(self, look: Look, gone: Collection[int], began: float, now: float, *,
             complete: bool) -> None:  # fmt: skip
        """It was looked at from ``began`` to ``now``. ``gone``: processes that have ended.
        ``complete``: all that there is was read.
        """
        took = now - began
        self._rest = now + ALL_SHARE * took
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
            self._settle(look, gone, began)

    def _looked_at(self, pid: int, is_gone: bool, began: float, now: float, took: float) -> None:
        hot = self._hot.get(pid)
        if hot is None:
            return
        while hot.step < len(self._steps) and hot.hinted + self._steps[hot.step] <= began:
            hot.step += 1
        if is_gone or hot.step == len(self._steps):
            del self._hot[pid]
        hot.rest = now + max(SHARE * took, min(SPACING, (now - hot.began) / 4))

    def _settle(self, look: Look, gone: Collection[int], began: float) -> None:
        """Note for each hint which of its processes have been looked at late enough."""
        for hint in self._open:
            hint.pids.difference_update(gone)
            if began < hint.settled:
                if look.full and ALL_PROCESSES in hint.pids:
                    self.look_at_all(hint.settled)
            elif look.full:
                hint.pids.clear()
            else:
                hint.pids -= look.pids

    def answer(self, now: float) -> int:
        """The last hint that can be answered: all of its processes have been looked at since, and
        so has the trace of calls.
        """
        answered = self._answered
        while self._open and now >= max(self._open[0].settled, self._answer_at):
            if self._open[0].pids or (self._is_traced and (self._called or self._is_behind)):
                break
            self._answered = self._open.popleft().number
        if self._answered != answered:
            self._answer_at = now + min(ANSWERS, (now - self._hinted_since) / 4)
        return self._answered
