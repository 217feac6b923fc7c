"""The trio side of an Export: one task reads the host's inotify queue, another does the rest."""

from __future__ import annotations

import time

import trio

from ..export.export import Export
from ..transports.tasks import forever

READ = 1 << 15
"""Bytes of events read before some are processed: 1,000 to 2,000 events, about 5 ms."""
BUDGET = 64
"""Events processed before requests get their turn: about 2 ms."""


class Pump:
    """Moves events through an export, and sleeps while there are none."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._poke = trio.Event()
        self._until = 0.0  # time.monotonic() at which _work looks again
        export.watcher.on_arrival = self._arrived

    def _arrived(self) -> None:
        """There may be work, or an earlier deadline."""
        self._poke.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forever, "reading host events", self._read)
            nursery.start_soon(forever, "handling host events", self._work)

    async def _read(self) -> None:
        watcher = self._export.watcher
        await trio.lowlevel.wait_readable(watcher.fd)
        # Without waking the task, because these events are processed at once: the task that waits
        # for orders should run next.
        watcher.on_arrival = _nothing
        try:
            watcher.drain(READ)
        finally:
            watcher.on_arrival = self._arrived
        with self._export.turn:
            self._export.process(BUDGET)
        if self._export.next_deadline < self._until:
            self._poke.set()

    async def _work(self) -> None:
        self._poke = trio.Event()
        with self._export.turn:
            self._export.process(BUDGET)
        self._until = self._export.next_deadline
        wait = self._until - time.monotonic()
        if wait <= 0:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(wait):
            await self._poke.wait()


def _nothing() -> None:
    pass
