"""Files whose marks are about to apply. They are watched before that, so that for each event it is
known whether it came before the mark.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

from protocol.handles import NodeKey
from protocol.masks import EVENTS, Mask

from ..events.event import Event
from ..files.inode import Inode
from ..files.table import InodeTable
from ..guests.mount import MountGuest
from .interest import Interest
from .lookups import Kept
from .seen import Seen, look
from .watches import Watches

SELF_LIMIT = 64
"""A file's self events that are kept until its mark applies, some milliseconds."""
GROUP_TIME = 0.05
"""Seconds after which a group of marks ends in any case: requests wait meanwhile."""


@dataclass(slots=True)
class _Marked:
    by: dict[MountGuest, Mask] = field(default_factory=dict)
    events: deque[Kept] = field(default_factory=lambda: deque(maxlen=SELF_LIMIT))


class MarkedFiles:
    """Those of one export."""

    def __init__(self, table: InodeTable, interest: Interest, watches: Watches) -> None:
        self._table = table
        self._interest = interest
        self._watches = watches
        self._marked: dict[Inode, _Marked] = {}

    def remember(self, number: int, event: Event) -> None:
        """Keep a file's self event."""
        marked = self._marked.get(event.node)
        if marked is not None and not event.name and event.part_of is None:
            marked.events.append(Kept(number, event, next(iter(marked.by)).ways(event)))

    def events(self, inode: Inode) -> deque[Kept]:
        """Its self events since ``watch``."""
        return self._marked[inode].events

    def watch(
        self, guest: MountGuest, updates: list[tuple[NodeKey, int]]
    ) -> dict[Inode, Seen | None]:
        """Watch the files among these; returns their state then."""
        files: dict[Inode, Seen | None] = {}
        end = time.monotonic() + GROUP_TIME
        for key, bits in updates:
            inode = self._table.known(key.nodeid)
            if inode is None or inode.is_dir or not bits or self._interest.of(guest, inode):
                continue
            self._marked.setdefault(inode, _Marked()).by[guest] = Mask(bits) & EVENTS
            self._watch(inode)
            files[inode] = look(self._table, inode)
            if time.monotonic() > end:
                break
        return files

    def drop(self, guest: MountGuest, inode: Inode) -> None:
        """Its mark applies, or will not."""
        marked = self._marked[inode]
        del marked.by[guest]
        if not marked.by:
            del self._marked[inode]
            self._watch(inode)

    def _watch(self, inode: Inode) -> None:
        """As the marks ask that are about to apply."""
        marked = self._marked.get(inode)
        if marked is None:
            self._watches.coming.pop(inode, None)
        else:
            self._watches.coming[inode] = reduce(or_, marked.by.values())
        self._watches.set_watch(inode)
