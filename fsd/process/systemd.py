"""The interface to a service manager: inherited sockets, readiness, and descriptors that it holds
for the next process. The manager is systemd or keeper.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import structlog

from ..linux import fdpassing

log = structlog.get_logger()
_FIRST = 3  # SD_LISTEN_FDS_START
KEPT = "kept-"
"""Names of stored descriptors begin with this; other inherited descriptors are sockets."""


class Manager:
    """sd_notify(3) and its FDSTORE=1. Does nothing without NOTIFY_SOCKET. Connects now, as a
    sandbox may not allow it later.
    """

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET")
        self._socket: socket.socket | None = None
        self.stores = False
        """Whether descriptors are held for the next process. systemd reports it from 254 on; for an
        older one the user sets Environment=FDSTORE=1."""
        if not address:
            return
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            manager.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            manager.close()
            reason = error.strerror or error
            log.warning("cannot connect to NOTIFY_SOCKET", address=address, reason=reason)
            return
        self._socket = manager
        self.stores = os.environ.get("FDSTORE", "0") not in ("", "0")

    def notify(self, state: str, fds: Sequence[int] = ()) -> None:
        """Send a state."""
        if self._socket is not None:
            try:
                self._socket.sendmsg([state.encode()], fdpassing.ancillary(fds))
            except OSError as error:
                log.warning("cannot notify the service manager", state=state, reason=str(error))
                self.stores = False  # the manager is gone


class Store:
    """Descriptors that outlive this process, by name. ``kept`` are those of the previous process;
    this object owns them.
    """

    def __init__(self, manager: Manager, kept: Mapping[str, int]) -> None:
        self._manager = manager
        self._kept = dict(kept)

    @property
    def holds(self) -> bool:
        """Whether descriptors put here outlive this process."""
        return self._manager.stores

    def stopping(self) -> None:
        """This process exits because it was asked to, and the next one shall continue."""
        self._manager.notify("STOPPING=1")

    def put(self, name: str, fd: int) -> None:
        """Store a descriptor's open file. A name is used once: systemd does not replace."""
        if self.holds:
            self._manager.notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={KEPT}{name}", [fd])

    def drop(self, name: str) -> None:
        """Keep it no longer."""
        if self.holds:
            self._manager.notify(f"FDSTOREREMOVE=1\nFDNAME={KEPT}{name}")

    def take(self, name: str) -> int:
        """A descriptor of the previous process, which the caller owns now. It stays in the store.
        -1 if there is none.
        """
        return self._kept.pop(KEPT + name, -1)

    def sweep(self, prefix: str = "") -> None:
        """Drop descriptors that were not taken."""
        for name in [name for name in self._kept if name.startswith(KEPT + prefix)]:
            os.close(self._kept.pop(name))
            self.drop(name.removeprefix(KEPT))


class Inherited(NamedTuple):
    """What this process has inherited."""

    sockets: list[int]
    kept: dict[str, int]


def listen_fds() -> Inherited:
    """sd_listen_fds_with_names(3): descriptors passed to this process; afterwards no other code
    sees them.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdecimal():
        return Inherited([], {})
    inherited = Inherited([], {})
    names += [""] * int(count)
    for fd, name in zip(range(_FIRST, _FIRST + int(count)), names, strict=False):
        if not name.startswith(KEPT):
            inherited.sockets.append(fd)
        elif name in inherited.kept:
            os.close(fd)
        else:
            with suppress(OSError):
                os.set_inheritable(fd, False)
            inherited.kept[name] = fd
    return inherited
