"""Adaptive busy polling: to look for the next request for a moment, before sleeping.

Where requests come in quick succession, each that finds the server asleep waits for two switches of
context. So after a request that came soon, the next one is looked for, as KVM's halt polling does
(Documentation/virt/kvm/halt-polling.rst). docs/decisions/busy-polling.md has the figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter

import trio

WINDOW = 400e-6
"""Seconds from an answer to the next request up to which it is worth to look for it: by default."""
PROCESSORS = len(os.sched_getaffinity(0))  # now, as the sandbox lets nobody ask
_MUCH = 1 << 18
"""Bytes of data for which the guest is given one window more, as it is busy with them first."""
_LIKELY, _SURE = 2, 3
"""Requests in a row after which the next is looked for, and for that they count at most: a
saturating counter, as processors predict branches with."""
_TURN = 50e-6
"""Seconds of looking before other tasks have a turn."""
_LOST = 1e-3
"""Seconds by which a turn is too long: another program had the processor, and may need it more."""
_PAUSE, _LONGEST_PAUSE = 0.005, 0.16
"""Seconds for which nothing is looked for then: twice as long if that is soon so again."""
_SOON = 1.0


class BusyPolling:
    """Of one queue; ``window`` in seconds, 0 never looks. Nor does a server that has but one
    processor: the guest needs it.
    """

    def __init__(self, window: float) -> None:
        self._window = window if PROCESSORS > 1 else 0.0
        self._streak = 0  # requests that came in time, up to _SURE, less those that did not
        self._end = 0.0  # time.perf_counter() up to which the next one comes in time
        self._pause = 0.0
        self._paused_until = 0.0

    async def finds(self, is_there: Callable[[], bool], moved: int = 0) -> bool:
        """Called after an answer: whether the next request comes in time. ``moved`` are the bytes
        of the request and its answer. Others run meanwhile.
        """
        now = turn = perf_counter()
        self._end = end = now + self._window * (1 + moved / _MUCH)
        if self._streak < _LIKELY or now < self._paused_until:
            return False
        while True:
            # Whom the answer has woken may wait for this very processor.
            os.sched_yield()
            if self._is_late(turn) or now >= end:
                return False
            await trio.lowlevel.checkpoint()
            turn = perf_counter() + _TURN
            while (now := perf_counter()) < turn:
                if is_there():
                    self._streak = min(self._streak + 1, _SURE)
                    return True

    def _is_late(self, expected: float) -> bool:
        """Whether another program had the processor: nothing is looked for during a pause then."""
        now = perf_counter()
        if now < expected + _LOST:
            return False
        again = now < self._paused_until + _SOON
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if again else _PAUSE
        self._paused_until = now + self._pause
        return True

    def slept(self) -> None:
        """It has slept until a request came."""
        if perf_counter() < self._end:
            self._streak = min(self._streak + 1, _SURE)
        else:
            self._streak = max(self._streak - 1, 0)
