"""Adaptive busy polling: look for the next request for a moment before sleeping.

When requests come in quick succession, each request that finds the server asleep waits for two
context switches. So after a request that came soon, the server polls for the next one, as KVM's
halt polling does (Documentation/virt/kvm/halt-polling.rst). Figures:
docs/decisions/busy-polling.md. pyfuse3 reads the requests itself: there, a trio
instrument polls (docs/decisions/spin.md).
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from time import perf_counter

import trio

WINDOW = 400e-6
"""Default number of seconds from an answer up to which polling for the next request is
worthwhile."""
LOCAL_WINDOW = 60e-6
"""The same for a local mount: a few times the agent's pause between two requests."""
PROCESSORS = len(os.sched_getaffinity(0))  # now, as the sandbox does not allow the call
_MUCH = 1 << 18
"""Bytes of data for which the guest gets one window more, because it is busy with them first."""
_LIKELY, _SURE = 2, 3
"""Requests in a row after which to poll for the next one, and the largest count: a saturating
counter, as in branch prediction."""
_TURN = 50e-6
"""Seconds of polling before the thread that our answer woke may have this processor again."""
_ALONE = 200e-6
"""Seconds for which one queue's requests are served and waited for before other tasks get a turn,
which costs some 25 us."""
_LOST = 1e-3
"""Seconds by which a turn is too long: another program had the processor, and may need it more."""
_PAUSE, _LONGEST_PAUSE = 0.005, 0.16
"""Seconds without polling after that: doubled if it soon happens again."""
_SOON = 1.0


class BusyPolling:
    """Polling of one queue; ``window`` in seconds, 0 never polls. On a single processor it never
    polls either: the guest needs the processor.
    """

    def __init__(self, window: float) -> None:
        self._window = window if PROCESSORS > 1 else 0.0
        self._streak = 0  # requests that came in time, up to _SURE, less those that did not
        self._end = 0.0  # time.perf_counter() up to which the next one comes in time
        self._pause = 0.0
        self._paused_until = 0.0
        self._yielded = 0.0  # time.perf_counter() at which other tasks had a turn

    async def finds(self, is_there: Callable[[], bool], moved: int = 0) -> bool:
        """Called after an answer: whether the next request comes in time. ``moved``: bytes of the
        request and its answer. Other tasks run meanwhile.
        """
        now = turn = perf_counter()
        self._end = end = now + self._window * (1 + moved / _MUCH)
        if self._streak < _LIKELY or now < self._paused_until:
            return False
        while True:
            # The thread that our answer woke may be waiting for this CPU.
            os.sched_yield()
            if self._is_late(turn) or now >= end:
                return False
            if perf_counter() > self._yielded + _ALONE:
                await trio.lowlevel.checkpoint()
                self._yielded = perf_counter()
            turn = perf_counter() + _TURN
            while (now := perf_counter()) < turn:
                if is_there():
                    self._streak = min(self._streak + 1, _SURE)
                    return True

    def _is_late(self, expected: float) -> bool:
        """Whether another program had the processor: then there is a pause without polling."""
        now = perf_counter()
        if now < expected + _LOST:
            return False
        again = now < self._paused_until + _SOON
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if again else _PAUSE
        self._paused_until = now + self._pause
        return True

    def slept(self) -> None:
        """The queue has slept until a request came."""
        if perf_counter() < self._end:
            self._streak = min(self._streak + 1, _SURE)
        else:
            self._streak = max(self._streak - 1, 0)


class SpinBeforeSleep(trio.abc.Instrument):
    """Polls ``/dev/fuse`` before trio sleeps, while ``is_busy`` returns True: for LOCAL_WINDOW."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._poll = select.poll()
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                    self._poll.register(int(name), select.POLLIN)
            except OSError:
                continue

    def before_io_wait(self, timeout: float) -> None:
        """trio is about to wait for I/O."""
        if timeout <= 0 or not self._is_busy():
            return
        end = perf_counter() + LOCAL_WINDOW
        while not self._poll.poll(0) and perf_counter() < end:
            pass
