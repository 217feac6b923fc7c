"""Names whose object was replaced between a look-up and its use, and the next object looked up
there.

Upon ESTALE the kernel makes one more look-up and one more attempt (LOOKUP_REVAL of fs/namei.c); the
program sees a second ESTALE. So the object of that look-up is held until it is opened: it may be
replaced again, and is still the one that was looked up.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .inode import Inode
from .table import InodeTable

HOLD = 1.0
"""Longest time in seconds between two requests of one system call: far more than they take."""
HELD_LIMIT = 64
"""Objects held at once, each by a descriptor. The oldest is dropped: its program sees ESTALE."""
_Place = tuple[int, bytes]
_ANYWHERE: _Place = (0, b"")


class Successors:
    """The held objects. ``deadline`` is the time.monotonic() at which to ``expire``."""

    def __init__(self, table: InodeTable) -> None:
        self._table = table
        self.wanted: dict[_Place, float] = {}
        """Names whose look-ups are to be noted, and until when; the oldest first."""
        self._held: dict[Inode, tuple[int, float]] = {}  # descriptor, until when
        self.deadline = math.inf

    @contextmanager
    def used(self, inode: Inode, *, to_open: bool = False) -> Iterator[int]:
        """The very object that a guest's kernel looked up, and whose permissions it has checked.

        Raises OSError ESTALE if another has its name: the kernel then looks the name up again.
        """
        try:
            fd = self._table.reach.open(inode)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            raise self.lost(inode, to_open=to_open) from None
        try:
            yield fd
        finally:
            os.close(fd)

    def lost(self, inode: Inode, *, to_open: bool = False) -> OSError:
        """The error for an object that a guest looked up, and that is no longer there. If it has no
        place any more, it was removed, or another was looked up there since: only if the guest is
        ``to_open`` it does it ask by a name, and looks again.
        """
        self.replaced(inode)
        if inode.parent is None and not to_open:
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def replaced(self, inode: Inode) -> None:
        """The object that a guest looked up is no longer there: it will look again."""
        # Of one that has no known place any more, it may be any.
        self._want(_ANYWHERE if inode.parent is None else (inode.parent.nodeid, inode.name))

    def sent_back(self, parent: Inode, name: bytes) -> None:
        """A guest will look the name up again before it opens what has it."""
        self._want((parent.nodeid, name))

    def _want(self, place: _Place) -> None:
        until = time.monotonic() + HOLD
        self.wanted.pop(place, None)
        self.wanted[place] = until
        if len(self.wanted) > HELD_LIMIT:
            del self.wanted[next(iter(self.wanted))]
        self.deadline = min(self.deadline, until)

    def looked_up(self, parent: Inode, name: bytes, inode: Inode, fd: int) -> None:
        """A guest looked a name up, and has found the object of the descriptor."""
        now = time.monotonic()
        wanted = self.wanted.get((parent.nodeid, name), 0.0), self.wanted.get(_ANYWHERE, 0.0)
        if max(wanted) < now or inode.is_dir:
            return
        if inode not in self._held:
            if len(self._held) >= HELD_LIMIT:
                self._drop(next(iter(self._held)))
            held = os.dup(fd)
            inode.open_fds.insert(0, held)
            self._table.pin(inode)
            self._held[inode] = held, now + HOLD

    def opened(self, inode: Inode) -> None:
        """It has a handle of its own now."""
        if self._held:
            self._drop(inode)

    def expire(self, now: float) -> None:
        """Drop objects that were not opened in time."""
        if now < self.deadline:
            return
        self.wanted = {place: until for place, until in self.wanted.items() if until > now}
        for inode in [inode for inode, (_, until) in self._held.items() if until <= now]:
            self._drop(inode)
        ends = [*self.wanted.values(), *(until for _, until in self._held.values())]
        self.deadline = min(ends, default=math.inf)

    def close(self) -> None:
        """Drop all."""
        self.wanted.clear()
        for inode in list(self._held):
            self._drop(inode)

    def _drop(self, inode: Inode) -> None:
        if inode in self._held:
            fd, _ = self._held.pop(inode)
            inode.open_fds.remove(fd)
            os.close(fd)
            self._table.unpin(inode)
