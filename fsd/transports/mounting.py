"""What a transport of `fsd mount` is given, and what it offers: the same for all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol


class MountError(Exception):
    """Why a mount cannot be made, in a few words for people."""


class UnavailableError(MountError):
    """The transport cannot be had on this machine; another one might."""


@dataclass(frozen=True)
class Place:
    """What is mounted where, and for whom."""

    source: str
    """A path, for people."""
    mountpoint: str
    fd: int
    """The mountpoint's, O_PATH: a path may lead elsewhere by the time of the mount."""
    for_all: bool
    """Whether other users than the server's may use the mount."""

    @property
    def is_judged(self) -> bool:
        """Whether the kernel checks permissions: wherever the server does for others what it may
        do itself. For an ordinary user alone the host's file system judges better.
        """
        return self.for_all or os.geteuid() == 0


class MountTransport(Protocol):
    """A mount that was made. Its constructor takes the operations and the place, and raises
    MountError.
    """

    name: str

    async def run(self) -> None:
        """Serve until the mount is gone, or ``stop``."""

    def stop(self) -> None:
        """Make ``run`` return."""

    def close(self) -> None:
        """Unmount, unless somebody has, and end the connection. After ``run``."""
