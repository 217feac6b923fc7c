"""What a mount guest calls when something changes. Higher packages have the classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from protocol.inotify import RawEvent

from ..files.inode import Inode


class Record(Protocol):
    """Notes a guest's state for the next server process."""

    def replayer(self, pid: int, /) -> None:
        """The agent's number has changed; 0 = there is no agent."""

    def marked(self, nodeid: int, mask: int, /) -> None:
        """The guest's interest in a node (0 = all) has changed."""


class HasState(Protocol):
    """A part of a session that is shown."""

    def state(self) -> dict[str, Any]:
        """For people."""


class KernelCache(HasState, Protocol):
    """What a guest's kernel keeps, and the server takes back."""

    @property
    def is_settled(self) -> bool:
        """Whether the kernel keeps nothing that the host has changed up to now."""

    def watched(self, inode: Inode | None, /) -> None:
        """The guest watches an object (None = all) from now on; the host's events of it are read
        elsewhere already.
        """

    def sees_marks(self, sees: bool, /) -> None:
        """Whether marks set on names that the kernel keeps are seen from now on."""

    def recent(self, since: float, /) -> Iterable[tuple[float, Inode, Inode | None, RawEvent]]:
        """The last changes of others, those read since then: when (time.monotonic()), the
        directory, what has the name if that is known, the event with any watch descriptor.
        """
