"""The trio side of a Saver: writes an image every now and then, in case the server is killed."""

from __future__ import annotations

from functools import partial

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
    """Saves changes; sleeps while there are none. The export calls ``wake`` at the first change."""

    def __init__(self, *, every: float = EVERY, patience: float = PATIENCE) -> None:
        self._every = every
        self._patience = patience
        self._changed = trio.Event()
        self._complained = False

    def wake(self) -> None:
        """The state has changed since it was saved."""
        self._changed.set()

    async def run(self, saver: Saver) -> None:
        """Until cancelled."""
        await forever("saving an image", partial(self._step, saver))

    async def _step(self, saver: Saver) -> None:
        export = saver.export
        if not export.is_changed:
            self._changed = trio.Event()
            await self._changed.wait()
        if not saver.is_needed:
            await trio.sleep(self._every)
            export.is_changed = False
            return
        with trio.move_on_after(self._patience):
            while not is_settled(export):  # noqa: ASYNC110 - time settles it, no event does
                await trio.sleep(_STEP)
        begun = trio.current_time()
        write = saver.take()
        taken = trio.current_time() - begun
        try:
            await trio.to_thread.run_sync(write)
            self._complained = False
        except OSError as error:
            if not self._complained:
                log.warning("state cannot be saved", path=error.filename, error=error.strerror)
            self._complained = True
        await trio.sleep(max(self._every, taken / SHARE))
