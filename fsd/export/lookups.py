"""State of directories that guests have just looked up, until their marks arrive."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..events.compare import Changes
from ..events.event import Event
from ..files.inode import Inode
from ..guests.ledger import Ways
from ..guests.mount import MountGuest
from ..pacing import windows
from .seen import Seen


class Kept(NamedTuple):
    """An event that may be delivered later, by its number in the order of all, and the ways to its
    places at that time.
    """

    number: int
    event: Event
    ways: Ways


class Hint(NamedTuple):
    """A hint that is not answered, by its number. Times are time.monotonic()."""

    number: int
    looked_up: float
    """The first look-up that it is for."""
    since: float
    """From then on events may be delivered: the same, or later if no mark was seen since."""


@dataclass(slots=True, eq=False)
class LookUp:
    """One guest's look-ups of a directory."""

    open: deque[Hint] = field(default_factory=deque)
    answered: int = 0
    """The last hint that the agent has answered; those up to it may still be open, see
    ``arming._is_overtaken``."""
    threads: dict[int, float] = field(default_factory=dict)
    """The threads, each with the time.monotonic() of its first look-up; THREADS_LIMIT and one more
    stand for any number."""
    is_doubtful: bool = False
    """There is an event that is to be delivered if the guest has a new mark."""
    has_new: bool = False
    """The server has seen a new mark since the last scan, or cannot see whether there is one."""

    seen: dict[Inode, Seen] = field(default_factory=dict)
    """Its files."""

    def is_awaited(self, hint: int | None = None) -> bool:
        """Whether the agent has not answered all hints, or those up to that one."""
        numbers = (hint.number for hint in self.open if hint.number > self.answered)
        first = next(numbers, None)
        return first is not None and (hint is None or first <= hint)

    @property
    def since(self) -> float:
        """The time from which events may be delivered."""
        return self.open[0].since if self.open else math.inf


@dataclass(slots=True)
class Provisional:
    """A directory with a provisional watch, because it was just looked up."""

    inode: Inode
    expires: float = field(default_factory=lambda: time.monotonic() + windows.KEEP)
    renewals: int = windows.KEEP_RENEWALS
    by: dict[MountGuest, LookUp] = field(default_factory=dict)
    history: deque[Kept] = field(default_factory=deque)
    missed: Changes = field(default_factory=dict)
    """By name, what was too much to keep."""
    unkept: int = 0
    """Events that were not kept, since ``begun``, KEEP ago at most."""
    begun: float = 0.0
    lost_ns: int = 0
    """time.time_ns() since which not even names are kept; 0 = they are."""

    def renew(self, now: float) -> bool:
        """Keep it watched for longer, as an agent has still to say whether there is a mark. Whether
        it does.
        """
        if not self.renewals or not any(g.pid and up.is_awaited() for g, up in self.by.items()):
            return False
        self.renewals -= 1
        self.expires = now + windows.KEEP
        return True

    @property
    def muted(self) -> bool:
        """Whether nothing more is kept."""
        return bool(self.lost_ns)


class Holding:
    """Events that wait for one guest, behind those that are in doubt."""

    def __init__(self, guest: MountGuest, until: float) -> None:
        self._history = guest.history
        self.until = until
        self.events: deque[tuple[Kept, int]] = deque()
        self.is_over = False  # it took too long

    def take(self, last: int) -> Iterator[tuple[Kept, int]]:
        """Those up to that number no longer wait."""
        while self.events and self.events[0][0].number <= last:
            kept, halves = self.events.popleft()
            self._history.unhold(kept.event)
            yield kept, halves
