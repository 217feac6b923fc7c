"""Polling the FUSE descriptor for a moment before sleeping, while the agent executes an order.

The agent's next request comes about 20 us after the last answer; sleeping and being woken takes
longer (docs/decisions/spin.md has the measurement).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

import trio

SPIN = 60e-6
"""Seconds to poll: a few times the agent's pause between two requests."""


class SpinBeforeSleep(trio.abc.Instrument):
    """Polls ``/dev/fuse`` before trio sleeps, while ``is_busy`` returns True."""

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
        end = time.perf_counter() + SPIN
        while not self._poll.poll(0) and time.perf_counter() < end:
            pass
