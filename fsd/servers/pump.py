"""The trio side of an Export: one task reads the host's inotify queue, another does the rest."""

from __future__ import annotations

import time
from functools import partial

import trio

from ..export.export import Export
from ..transports.tasks import forever

READ = 1 << 15
"""Bytes of events read before some are processed: 1,000 to 2,000 events, about 5 ms."""
BUDGET = 64
"""Events processed before requests get their turn: about 2 ms."""


class Pump:
    """Moves events through an export, and sleeps while there are none. The export calls ``wake``
    when there may be work, or an earlier deadline.
    """

    def __init__(self) -> None:
        self._poke = trio.Event()
        self._until = 0.0  # time.monotonic() at which _work looks again
        self._is_reading = False

    def wake(self) -> None:
        """There may be work, or an earlier deadline."""
        if not self._is_reading:
            self._poke.set()

    async def run(self, export: Export) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forever, "reading host events", partial(self._read, export))
            nursery.start_soon(forever, "handling host events", partial(self._work, export))

    async def _read(self, export: Export) -> None:
        watcher = export.watcher
        await trio.lowlevel.wait_readable(watcher.fd)
        # Without waking the task, because these events are processed at once: the task that waits
        # for orders should run next.
        self._is_reading = True
        try:
            watcher.drain(READ)
        finally:
            self._is_reading = False
        with export.turn:
            export.process(BUDGET)
        if export.next_deadline < self._until:
            self._poke.set()

    async def _work(self, export: Export) -> None:
        self._poke = trio.Event()
        with export.turn:
            export.process(BUDGET)
        self._until = export.next_deadline
        wait = self._until - time.monotonic()
        if wait <= 0:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(wait):
            await self._poke.wait()
