"""The trio side of a Saver: writes an image every now and then, in case the server is killed."""

from __future__ import annotations

import structlog
import trio

from ..checkpoint.saver import Saver
from ..export.ending import is_settled
from ..transports.tasks import forever

log = structlog.get_logger()
EVERY = 2.0
"""Seconds between images at least."""
SHARE = 0.02
"""Largest share of the server's time for taking them."""
PATIENCE = 1.0
"""Seconds to wait for a moment without changes."""
_STEP = 0.02


class Snapshots:
    """Saves changes; sleeps while there are none."""

    def __init__(self, saver: Saver, *, every: float = EVERY, patience: float = PATIENCE) -> None:
        self._saver = saver
        self._every = every
        self._patience = patience
        self._changed = trio.Event()
        self._complained = False
        saver.export.on_change = self._wake

    def _wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        await forever("saving an image", self._step)

    async def _step(self) -> None:
        export = self._saver.export
        if not export.is_changed:
            self._changed = trio.Event()
            await self._changed.wait()
        if not self._saver.is_needed:
            await trio.sleep(self._every)
            export.is_changed = False
            return
        with trio.move_on_after(self._patience):
            while not is_settled(export):  # noqa: ASYNC110 - time settles it, no event does
                await trio.sleep(_STEP)
        begun = trio.current_time()
        write = self._saver.take()
        taken = trio.current_time() - begun
        try:
            await trio.to_thread.run_sync(write)
            self._complained = False
        except OSError as error:
            if not self._complained:
                log.warning("state cannot be saved", path=error.filename, error=error.strerror)
            self._complained = True
        await trio.sleep(max(self._every, taken / SHARE))
