"""The trio side of an Export: a task that reads the host's inotify queue, one for the rest."""

from __future__ import annotations

import time

import trio

from ..export import Export

BUDGET = 64
"""Events processed before requests get their turn: about 2 ms."""


class Pump:
    """Moves events through an export, and sleeps while there is nothing to do."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._poke = trio.Event()
        export.watcher.on_arrival = self.poke

    def poke(self) -> None:
        """There may be work, or an earlier deadline."""
        self._poke.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            nursery.start_soon(self._work)

    async def _read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._export.watcher.fd)
            self._export.watcher.drain()
            self._export.process(BUDGET)

    async def _work(self) -> None:
        while True:
            self._poke = trio.Event()
            self._export.process(BUDGET)
            wait = self._export.next_deadline - time.monotonic()
            if wait <= 0:
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_after(wait):
                await self._poke.wait()
