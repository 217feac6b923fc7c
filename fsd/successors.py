"""Names whose object was replaced between a look-up and its use, and what is looked up there next.

The kernel's answer to ESTALE is one more look-up and one more try (LOOKUP_REVAL of fs/namei.c); a
second ESTALE is the program's. So what that look-up finds is held until it is opened: it may be
replaced again, and is still what was looked up.
"""

from __future__ import annotations

import math
import os
import time

from .inodes import Inode, InodeTable

HOLD = 1.0
"""Seconds between two requests of one system call that are waited for: far more than they take."""
HELD_LIMIT = 64
"""Objects held at once, each by a descriptor. The oldest gives way: its program sees ESTALE."""
_Place = tuple[int, bytes]


class Successors:
    """The objects that are held. ``deadline`` is the time.monotonic() at which to ``expire``."""

    def __init__(self, table: InodeTable) -> None:
        self._table = table
        self._wanted: dict[_Place, float] = {}  # until when; the oldest first
        self._held: dict[_Place, tuple[Inode, int, float]] = {}
        self.deadline = math.inf

    def __bool__(self) -> bool:
        """Whether a look-up may have to be noted."""
        return bool(self._wanted)

    def replaced(self, inode: Inode) -> None:
        """What a guest looked up is not there any more: it will look again."""
        if inode.parent is not None:
            self._wanted[inode.parent.nodeid, inode.name] = time.monotonic() + HOLD
            if len(self._wanted) > HELD_LIMIT:
                del self._wanted[next(iter(self._wanted))]

    def looked_up(self, parent: Inode, name: bytes, inode: Inode, fd: int) -> None:
        """A name was looked up, and found behind the descriptor."""
        now = time.monotonic()
        place = (parent.nodeid, name)
        if self._wanted.pop(place, 0.0) < now or inode.is_dir:
            return
        if place in self._held:
            self._drop(place)
        elif len(self._held) >= HELD_LIMIT:
            self._drop(next(iter(self._held)))
        held = os.dup(fd)
        inode.open_fds.insert(0, held)
        self._table.pin(inode)
        self._held[place] = inode, held, now + HOLD
        self.deadline = min(self.deadline, now + HOLD)

    def opened(self, inode: Inode) -> None:
        """It has a handle of its own now."""
        if self._held:
            for place in [place for place, held in self._held.items() if held[0] is inode]:
                self._drop(place)

    def expire(self, now: float) -> None:
        """Let go of what nobody came for."""
        if now >= self.deadline:
            for place in [place for place, held in self._held.items() if held[2] <= now]:
                self._drop(place)

    def close(self) -> None:
        """Let go of all."""
        for place in list(self._held):
            self._drop(place)

    def _drop(self, place: _Place) -> None:
        inode, fd, _ = self._held.pop(place)
        inode.open_fds.remove(fd)
        os.close(fd)
        self._table.unpin(inode)
        self.deadline = min((held[2] for held in self._held.values()), default=math.inf)
