"""What has happened in a directory between the call that marked it and the host's watch.

A program can mark a name that its kernel keeps without any request, so nothing watches for the mark
in advance (``arming``). The agent traces such calls and says when they were made. The changes since
then are among those that the kernel's cache was told of, and are put into the queue.
"""

from __future__ import annotations

import math
import os
import time
from functools import cache, partial

from protocol.frames import Calls
from protocol.handles import NodeKey
from protocol.inotify import RawEvent
from protocol.masks import STRUCTURE, Mask

from ..events.watcher import HostWatcher
from ..files.inode import Inode
from ..files.table import InodeTable
from ..guests.mount import MountGuest
from .interest import Interest

_OF_FILE = int(Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE)
_MOVED_FROM, _MOVE_SELF = int(Mask.MOVED_FROM), int(Mask.MOVE_SELF)
_NAMES = int(STRUCTURE)
_TICK = time.clock_getres(5)  # CLOCK_REALTIME_COARSE of clock_getres(2)
ON_ITS_WAY = 0.001
"""Seconds from an agent's clock, which is another one than the server's, to its message."""


class TracedMarks:
    """Those of all guests of one export."""

    def __init__(self, table: InodeTable, watcher: HostWatcher, interest: Interest) -> None:
        self._table = table
        self._watcher = watcher
        self._interest = interest
        self._since: dict[MountGuest, float] = {}

    def called(self, guest: MountGuest, calls: Calls) -> None:
        """The agent will report marks that these calls have set."""
        now = calls.now / 1e6 if guest.is_local else time.monotonic() - ON_ITS_WAY
        self._since[guest] = now - (calls.now - calls.first) / 1e6

    def since(self, guest: MountGuest) -> float:
        """time.monotonic() of the first call whose marks are reported next; inf if unknown."""
        return self._since.pop(guest, math.inf)

    def unwatched(self, updates: list[tuple[NodeKey, int]]) -> list[Inode]:
        """The objects to be marked in which nobody is interested yet."""
        inodes = (self._table.known(key.nodeid) for key, bits in updates if bits)
        return [i for i in inodes if i is not None and not self._interest.aggregate(i)]

    def insert(self, guest: MountGuest, inodes: list[Inode], since: float, until: float) -> None:
        """Put into the queue what has happened to these since then; they are watched now, and files
        have been ``until`` then.
        """
        if guest.cache is None or since == math.inf or not inodes:
            return
        marked = set(inodes)
        events: list[tuple[Inode, RawEvent]] = []
        is_older = cache(partial(self._is_older, time.time() - time.monotonic() + since))
        for stamp, directory, child, raw in guest.cache.recent(since):
            changed = directory if raw.mask & _NAMES else child
            if changed is None or is_older(changed):
                continue
            if directory in marked:
                events.append((directory, raw))
            if child is not None and child in marked and not child.is_dir and stamp < until:
                mask = raw.mask & _OF_FILE or _MOVE_SELF * bool(raw.mask & _MOVED_FROM)
                if mask:
                    events.append((child, RawEvent(raw.wd, mask, 0, b"")))
        if events:
            self._watcher.insert(events)

    def _is_older(self, since: float, inode: Inode) -> bool:
        """Whether an object was changed last before that time.time(). The kernel's clock for that
        has ticks.
        """
        try:
            with self._table.reach.opened_by_any_name(inode) as fd:
                return os.fstat(fd).st_ctime + _TICK <= since
        except OSError:  # removed since
            return False
