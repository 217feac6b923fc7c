"""What a service manager gives and is told: sockets that it has opened, and that we are ready."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

import structlog

log = structlog.get_logger()
_FIRST = 3  # SD_LISTEN_FDS_START


def notifier() -> Callable[[bytes], None]:
    """sd_notify(3), to be called with a state; does nothing where nobody asked for it. Connects
    now, as a sandbox may not let it later.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return lambda state: None
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        manager.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        manager.close()
        log.warning("no one hears NOTIFY_SOCKET", address=address, reason=error.strerror or error)
        return lambda state: None

    def notify(state: bytes) -> None:
        with suppress(OSError):
            manager.send(state)

    return notify


def listen_fds() -> list[int]:
    """sd_listen_fds(3): the sockets passed to this process; they are no one else's afterwards."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    os.environ.pop("LISTEN_FDNAMES", None)
    count = os.environ.pop("LISTEN_FDS", "")
    return list(range(_FIRST, _FIRST + int(count))) if count.isdecimal() else []
