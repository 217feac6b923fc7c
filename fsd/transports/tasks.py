"""Tasks that last as long as the server: a fault in one step never ends them (fsd.guard)."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import structlog
import trio

from ..guard import PAUSE, Guard

log = structlog.get_logger()
_REFUSED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED)
"""Of accept(2): no room now, or a peer that has gone already."""
FULL_PAUSE = 0.5
"""Seconds until accept(2) is tried again: descriptors come back as guests close files."""


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
            log.warning("a connection waits", error=error.strerror, **about)
            await trio.sleep(FULL_PAUSE)
