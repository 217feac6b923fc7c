"""Long work in the way of events, done in steps: no event is routed before it is finished."""

from __future__ import annotations

import time
from collections import Counter, deque

import structlog

from ..pacing.chores import Job, Pause, begin

log = structlog.get_logger()


class Steps:
    """Jobs, one after the other. An exception is logged and counted, and ends its job."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._jobs: deque[Job[None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Job[None]) -> None:
        """Do it in later turns, after earlier jobs."""
        self._jobs.append(job)

    def do(self, job: Job[None]) -> None:
        """Begin it now if no job is before it, and do the rest in later turns."""
        if self._jobs or not begin(job):
            self._jobs.append(job)

    def between(self, job: Job[None]) -> Job[None]:
        """Do a job before the next event is handled."""
        self._jobs.append(job)
        while job in self._jobs:
            yield Pause.LATER

    def work(self, end: float) -> bool:
        """Work on the first step until then; returns whether it is done."""
        try:
            for _ in self._jobs[0]:
                if time.monotonic() >= end:
                    return False
        except Exception:  # a fault in one event never ends the process
            self._counts["faults"] += 1
            log.exception("event failed")
        self._jobs.popleft()
        return True

    def close(self) -> None:
        """Give all of it up."""
        for job in self._jobs:
            job.close()
