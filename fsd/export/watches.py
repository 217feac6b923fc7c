"""The host watches that guests' interest needs, and the listings of watched directories.

Apart from the interest, which is pure bookkeeping: a watch may be refused, and is then tried again.
"""

from __future__ import annotations

import errno
import math
import time
from collections import Counter
from collections.abc import Iterable

from protocol.masks import EVENTS, Mask

from ..events.reading import Reader
from ..events.watcher import DIRECTORY, MARKED, HostWatcher
from ..files.inode import Inode
from ..files.listing import listing
from ..files.table import InodeTable
from ..guests.guest import Guest
from ..linux import syscalls
from ..pacing.chores import Job, OwnChores, begin
from .interest import Interest
from .watchlimit import has_part

COMPARE_EVERY = 2.0
"""Seconds between comparisons of a directory for which the host gave no watch (ENOSPC)."""
CHUNKS_AT_ONCE = 8
"""Reads of a directory's names at once, before the rest becomes a chore: 8,000 names, 10 ms."""
_NOTHING = Mask(0)


class Watches:
    """The host watches of one export. ``limit``: how many it may have; ``guests`` share them."""

    def __init__(
        self,
        table: InodeTable,
        watcher: HostWatcher,
        reader: Reader,
        interest: Interest,
        *,
        guests: list[Guest],
        limit: int | None,
        chores: OwnChores,
        counts: Counter[str],
    ) -> None:
        self._table = table
        self._watcher = watcher
        self._reader = reader
        self._interest = interest
        self._guests = guests
        self._limit = limit
        self._chores = chores
        self._counts = counts
        self.unwatched: dict[Inode, str] = {}
        """Wanted, but the host gave no watch: the reason."""
        self.look_again_at = math.inf
        """time.monotonic() at which to try again what could not be looked at."""
        self.provisional: set[Inode] = set()
        """Directories that were just looked up (set by Arming)."""
        self.coming: dict[Inode, Mask] = {}
        """What marks that are about to apply ask for (set by MarkedFiles)."""
        self._named_by: dict[Inode, Inode] = {}  # watched object -> the directory that names it
        self._naming: Counter[Inode] = Counter()
        self._unread: dict[Inode, None] = {}  # watched directories whose names are still to be read

    def is_reading(self, directory: Inode) -> bool:
        """Whether the names of a huge directory are still to be read."""
        return directory in self._unread

    def check(self, inode: Inode | None) -> None:
        """Raises OSError ENOSPC if the host gave no watch for an inode; for None, for any inode."""
        if inode in self.unwatched or (inode is None and self.unwatched):
            reason = next(iter(self.unwatched.values())) if inode is None else self.unwatched[inode]
            raise OSError(errno.ENOSPC, reason)

    def ended(self, inode: Inode) -> None:
        """The host's kernel removed a watch: the object is gone, or its file system is."""
        inode.listing = None
        self._allowed(inode)

    def wanted(self, inode: Inode) -> Mask:
        """What to watch the host for: the aggregate, and what keeps names right."""
        mask = self._interest.aggregate(inode) | self.coming.get(inode, _NOTHING)
        if mask:
            mask |= MARKED
        if inode.is_dir:
            mask |= self._interest.aggregate(None)
            if inode in self.provisional:
                mask = EVENTS
            if mask or inode in self._naming:
                mask |= DIRECTORY
        return mask

    def set_watch(self, inode: Inode) -> None:
        """Bring the host watch of an inode in line with what is wanted."""
        mask = self.wanted(inode)
        try:
            if mask and not self._watcher.mask_of(inode):
                self._check_part(inode)
            self._watcher.set_mask(inode, mask)
        except OSError as error:
            if syscalls.is_gone(error):  # its events say so
                self._allowed(inode)
                return
            self._counts["watch_failures"] += 1
            self.look_later(inode, error)
        else:
            self._allowed(inode)
        if not mask:
            inode.listing = None
            self._unread.pop(inode, None)
        elif inode.is_dir and (self._is_armed(inode) or inode in self._naming):
            self._take_listing(inode)

    def _check_part(self, inode: Inode) -> None:
        """Raises OSError ENOSPC if all guests that want the watch have used their part."""
        interested = self._interest.guests(inode) | self._interest.guests(None)
        used, limit = len(self._watcher), self._limit
        if limit is None or not interested:
            return
        if not has_part(interested, self._guests, self._interest, used, limit):
            raise OSError(errno.ENOSPC, "the guest's part of the host watches is used up")

    def _allowed(self, inode: Inode) -> None:
        """The host no longer refuses watches for it."""
        if self.unwatched.pop(inode, None) is not None:
            self._table.unpin(inode)

    def _is_armed(self, inode: Inode) -> bool:
        return bool(self._interest.aggregate(inode) or self._interest.aggregate(None))

    def _take_listing(self, inode: Inode) -> None:
        """Read the names of a watched directory, for later comparisons; those of a huge one
        gradually.
        """
        if listing(inode).complete or inode in self._unread:
            return
        reading = self.reading(inode)
        if not begin(reading, CHUNKS_AT_ONCE):
            reading.close()
            if not self._unread:
                self._chores.add(self._reading_on())
            self._unread[inode] = None

    def look_later(self, inode: Inode, error: OSError) -> None:
        """It could not be looked at, so nothing is known of it: it is tried again, and compared."""
        self._counts["looks_failed"] += 1
        if inode not in self.unwatched:
            self._table.pin(inode)
        self.unwatched[inode] = error.strerror or str(error)
        self.look_again()

    def _reading_on(self) -> Job[None]:
        """One after the other, as each needs a descriptor."""
        while self._unread:
            inode = next(iter(self._unread))
            yield from self.reading(inode)
            self._unread.pop(inode, None)

    def reading(self, inode: Inode) -> Job[None]:
        """Take in the names of a directory. Events meanwhile take precedence: each part is taken in
        as soon as it is read, so that no event is handled between.
        """
        known = listing(inode)
        try:
            for names in self._reader.names_in(inode):
                if inode.listing is not known:
                    return  # it is not watched any more
                for name, entry in names.items():
                    known.names.setdefault(name, entry.of(inode.children.get(name)))
                yield None
        except OSError as error:
            self.look_later(inode, error)
        else:
            known.complete = True

    def follow_name(self, inode: Inode) -> None:
        """Watch a watched object's directory, too, so that its removal comes with a name."""
        parent = inode.parent if self._interest.aggregate(inode) else None
        old = self._named_by.pop(inode, None)
        if parent is not None:
            self._named_by[inode] = parent
        if old is parent:
            return
        for directory, step in ((parent, 1), (old, -1)):
            if directory is None:
                continue
            self._naming[directory] += step
            if not self._naming[directory]:
                del self._naming[directory]
            self.set_watch(directory)

    def look_again(self, pause: float = 0.0) -> None:
        """Try again what could not be looked at, after ``pause`` seconds at the earliest."""
        pause = max(COMPARE_EVERY, pause)
        self.look_again_at = min(self.look_again_at, time.monotonic() + pause)

    def restore(self, marked: Iterable[Inode], order: Iterable[Inode]) -> None:
        """Watch inodes that had marks in the previous server: each once, in that order as far as it
        goes.
        """
        inodes = dict.fromkeys(marked)
        for inode in inodes:
            if inode.parent is not None:
                self._named_by[inode] = inode.parent
                self._naming[inode.parent] += 1
        for inode in dict.fromkeys((*order, *inodes, *self._naming)):
            self.set_watch(inode)

    def drop_unwanted(self, inodes: Iterable[Inode]) -> None:
        """Drop the watches of these inodes if no guest is interested."""
        for inode in inodes:
            if not self.wanted(inode):
                self.set_watch(inode)

    def follow_names(self, *moved: Inode | None) -> None:
        """Objects that may be in another directory now."""
        for inode in moved:
            if inode is not None and inode in self._named_by:
                self.follow_name(inode)
