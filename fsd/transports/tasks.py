"""Tasks that run as long as the server: a fault in one step never ends them (pacing.guard)."""

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
"""Errors of accept(2) without consequence: no room now, or a peer that has disconnected already."""
FULL_PAUSE = 0.5
"""Seconds until accept(2) is tried again: descriptors become free as guests close files."""


def end_in_time(last: Callable[[], object] = lambda: None) -> None:
    """From now on this process exits within END seconds, whatever it waits for, without cleaning up
    except for ``last``. A thread does it, because this one may be what waits.
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
    """Repeat a step until cancelled. ``about``: as for a Guard."""
    while True:
        with Guard(step, **about) as guard:
            await do()
        if guard.failed:
            await trio.sleep(PAUSE)


async def accept(listener: trio.socket.SocketType, **about: object) -> trio.socket.SocketType:
    """The next connection. Waits while the server has no free descriptor or memory."""
    while True:
        try:
            return (await listener.accept())[0]
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            log.warning("cannot accept a connection yet", error=error.strerror, **about)
            await trio.sleep(FULL_PAUSE)
