"""Tasks that last as long as the server: a fault in one step never ends them (fsd.pacing.guard)."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Awaitable, Callable

import structlog
import trio

from ..files.slowcalls import END, running
from ..pacing.guard import PAUSE, Guard

log = structlog.get_logger()
_REFUSED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED)
"""Of accept(2): no room now, or a peer that has gone already."""
FULL_PAUSE = 0.5
"""Seconds until accept(2) is tried again: descriptors come back as guests close files."""


def end_in_time(last: Callable[[], object] = lambda: None) -> None:
    """From now on this process ends within END seconds, whatever it waits for: without cleaning up,
    but for ``last``. By a thread, as this one may be what waits.
    """

    def end() -> None:
        time.sleep(END)
        hanging = ", ".join(running()) or "the server itself"
        log.error("exiting without waiting any longer", hangs=hanging, seconds=END)
        with Guard("the end"):
            last()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


async def forever(step: str, do: Callable[[], Awaitable[object]], **about: object) -> None:
    """Do a step again and again, until cancelled. ``about``: as a Guard's."""
    while True:
        with Guard(step, **about) as guard:
            await do()
        if guard.failed:
            await trio.sleep(PAUSE)


async def accept(listener: trio.socket.SocketType, **about: object) -> trio.socket.SocketType:
    """The next connection. Where the server has no descriptor or memory left, it waits there."""
    while True:
        try:
            return (await listener.accept())[0]
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            log.warning("cannot accept a connection yet", error=error.strerror, **about)
            await trio.sleep(FULL_PAUSE)
