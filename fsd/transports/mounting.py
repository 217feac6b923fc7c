"""The interface of the transports of `fsd mount`: what they get, and what they offer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol


class MountError(Exception):
    """Why a mount cannot be made, in a few words for the user."""


class UnavailableError(MountError):
    """The transport is not available on this machine; another one might be."""


@dataclass(frozen=True)
class Place:
    """What to mount where, and for which users."""

    source: str
    """A path, for people."""
    mountpoint: str
    fd: int
    """The mountpoint's, O_PATH: its path may lead elsewhere by the time of the mount."""
    for_all: bool
    """Whether other users than the server's may use the mount."""

    @property
    def is_judged(self) -> bool:
        """Whether the kernel checks permissions: whenever the server acts for others with its own
        rights. For an ordinary user alone the host's file system checks more exactly.
        """
        return self.for_all or os.geteuid() == 0


class MountTransport(Protocol):
    """An existing mount. Its constructor takes the operations and the place, and raises
    MountError.
    """

    name: str

    async def run(self) -> None:
        """Serve until the mount is gone, or ``stop``."""

    def stop(self) -> None:
        """Make ``run`` return."""

    def close(self) -> None:
        """Unmount, unless that has happened, and end the connection. Call it after ``run``."""
