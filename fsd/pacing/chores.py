"""Work that may take longer than one turn of the event loop: done in steps, with other work
between.

Work for one frame, one event or one refused watch that has no bound is written as a Job.
Synchronous; the pump calls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from enum import Enum
from typing import Any, TypeVar

import structlog

log = structlog.get_logger()
TURN = 0.002
"""Seconds of work after which requests get their turn: as much as 64 events take."""
SLICE = 0.0005
"""Seconds of one job before the next one gets its slice."""
AT_ONCE = 256
"""Steps that a job makes at once, before it becomes a chore: small trees, lists and scans are
finished when the call returns. About 10 ms."""
LONGEST = 0.1
"""Seconds after which it becomes a chore in any case."""

_T = TypeVar("_T")


class Pause(Enum):
    """Why a job yields before its slice is over."""

    LATER = 1
    """It has nothing to do in this turn, but may have in the next."""
    UNTIL_ADDED = 2
    """It has nothing to do until it is added again."""


Job = Generator["Pause | None", None, _T]
"""Yields after each step, which takes well under a millisecond. Closing it ends the work."""


def finish(job: Job[_T]) -> _T:
    """Do all of it now; at the start and the end of the server, when nothing else waits."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            result: _T = end.value
            return result


def begin(job: Job[Any], steps: int = AT_ONCE) -> bool:
    """Do the first steps of a job; returns whether it is finished."""
    end = time.monotonic() + LONGEST
    for _ in range(steps):
        if time.monotonic() > end:
            return False
        try:
            if next(job) is not None:
                return False
        except StopIteration:
            return True
    return False


class Chores:
    """Jobs of several owners. The owners get turns in rotation, however many jobs each has."""

    def __init__(self) -> None:
        self._jobs: dict[object, deque[Job[Any]]] = {}
        self._owners: deque[object] = deque()

    def __bool__(self) -> bool:
        return bool(self._owners)

    def add(self, owner: object, job: Job[Any]) -> None:
        """Do it in later turns. An exception is logged, and ends the job."""
        jobs = self._jobs.get(owner)
        if jobs is None:
            jobs = self._jobs[owner] = deque()
            self._owners.append(owner)
        jobs.append(job)

    def do(self, owner: object, job: Job[Any]) -> None:
        """Begin it now, and do the rest in later turns."""
        if not begin(job):
            self.add(owner, job)

    def of(self, owner: object) -> OwnChores:
        """Those of one owner."""
        return OwnChores(self, owner)

    def run(self, seconds: float = TURN) -> int:
        """One turn. Returns how many jobs have failed."""
        failed = idle = 0
        end = time.monotonic() + seconds
        while self._owners and idle < len(self._owners):
            owner = self._owners.popleft()
            jobs = self._jobs[owner]
            job = jobs.popleft()
            pause: Pause | None = Pause.UNTIL_ADDED
            try:
                pause = _slice(job)
            except StopIteration:
                pass
            except Exception:
                failed += 1
                log.exception("chore failed")
            if pause is not Pause.UNTIL_ADDED:
                jobs.append(job)
            idle = idle + 1 if pause is Pause.LATER else 0
            if jobs:
                self._owners.append(owner)
            else:
                del self._jobs[owner]
            if time.monotonic() >= end:
                break
        return failed

    def close(self) -> None:
        """Give all of it up."""
        for jobs in self._jobs.values():
            for job in jobs:
                with suppress(Exception):
                    job.close()
        self._jobs.clear()
        self._owners.clear()


class OwnChores:
    """One owner's."""

    def __init__(self, chores: Chores, owner: object) -> None:
        self._chores = chores
        self._owner = owner

    def add(self, job: Job[Any]) -> None:
        """Do it in later turns."""
        self._chores.add(self._owner, job)

    def do(self, job: Job[Any]) -> None:
        """Begin it now, and do the rest in later turns."""
        self._chores.do(self._owner, job)


def _slice(job: Job[Any]) -> Pause | None:
    end = time.monotonic() + SLICE
    while (pause := next(job)) is None and time.monotonic() < end:
        pass
    return pause
