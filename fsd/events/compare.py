"""After lost events: compares directories with their listings, and makes events of the difference.

There is one way for every loss: a host overflow, a directory without a watch, a guest's full
outbox, an agent that was away. The events are MOVED by inode, DELETE, CREATE, MODIFY with
CLOSE_WRITE, ATTRIB, in that order, because the true order is not known any more
(docs/decisions/resync.md).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from protocol.masks import Mask

from ..files.inode import Inode
from ..files.listing import UNKNOWN, Known, Listing
from ..files.passthrough import PassthroughFS
from ..linux import syscalls
from ..pacing.chores import Job, finish
from .event import HOST, RENAME, Event
from .missed import CLOCK_LAG_NS, Missed, changed_since
from .reading import Reader
from .watcher import HostWatcher

Changes = dict[tuple[Inode, bytes], Missed]
"""Possible changes: directory and name -> the state known before, and the kinds of change."""

_CHANGE = int(Mask.MODIFY | Mask.CLOSE_WRITE)
_ATTEMPTS = 8
"""Attempts to compare a directory that keeps changing, until no change comes in between."""
_ATTRIB = int(Mask.ATTRIB)
_KINDS = [int(k) for k in (Mask.ACCESS, Mask.MODIFY, Mask.ATTRIB)]
_CLOSES = [int(k) for k in (Mask.CLOSE_WRITE, Mask.CLOSE_NOWRITE)]


class Comparer:
    """Compares one export's directories. ``failed`` is called for each object that cannot be looked
    at, of which nothing is known then.
    """

    def __init__(
        self,
        fs: PassthroughFS,
        watcher: HostWatcher,
        reader: Reader,
        failed: Callable[[Inode, OSError], None],
    ) -> None:
        self._fs = fs
        self._table = fs.table
        self._watcher = watcher
        self._reader = reader
        self._failed = failed

    def difference(self, node: Inode, known: Listing) -> Changes:
        """``comparing``, completed at once."""
        return finish(self.comparing(node, known))

    def comparing(self, node: Inode, known: Listing) -> Job[Changes]:
        """Compare a directory with its listing, and bring the listing up to date. An object that
        cannot be looked at counts as unchanged, and is compared later.
        """
        changes: Changes = {}
        try:
            now: dict[bytes, Known] = {}
            for names in self._reader.names_in(node):
                now.update(names)
                yield None
            with syscalls.skipping_gone, self._table.reach.directory(node) as dir_fd:
                for name, after in now.items():
                    yield None
                    if (before := known.names.get(name)) is None:
                        changes[node, name] = Missed(None, _CHANGE)
                        continue
                    try:
                        before, mask = self._compared(dir_fd, name, before, after)
                    except OSError as error:
                        self._failed(node, error)
                        now[name] = before
                        continue
                    if before.may_be(after):
                        inode = None if before.ino == UNKNOWN else before.inode
                        now[name] = after._replace(kind=after.kind or before.kind, inode=inode)
                    if mask:
                        changes[node, name] = Missed(before, mask)
        except OSError as error:
            self._failed(node, error)
            return {}
        for name in known.names.keys() - now.keys():
            changes[node, name] = Missed(known.names[name], _CHANGE)
        known.names = now
        return changes

    def _compared(self, dir_fd: int, name: bytes, before: Known, after: Known) -> tuple[Known, int]:
        """The state known before, without a number if that stands for another object now, and the
        kinds of change. Raises OSError if the object cannot be looked at.
        """
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            # Any other object was made since, and so changed.
            anything = changed_since(status, before.seen_ns)[1]
            if anything and self._is_reborn(dir_fd, name, before):
                before = before._replace(ino=0)
        except OSError as error:
            if not syscalls.is_gone(error):
                raise
            # Removed just now, for which there will be an event.
            return before, 0 if before.may_be(after) else _CHANGE
        return before, _touched(status, before) if before.may_be(after) else _CHANGE

    def comparing_at_once(self, node: Inode, known: Listing) -> Job[Changes]:
        """The difference as of one moment: it includes older events of the queue, which are
        dropped.
        """
        watcher = self._watcher
        watched = (node, *(child for child in node.children.values() if not child.is_dir))
        wds = {wd for inode in watched if (wd := watcher.wd_of(inode)) >= 0}
        changes: Changes = {}
        for _ in range(_ATTEMPTS):
            watcher.discard(wds)
            for place, now in (yield from self.comparing(node, known)).items():
                before = changes.get(place)
                changes[place] = Missed(before.before, before.mask | now.mask) if before else now
            watcher.drain()
            if not watcher.queue.has_any(wds):
                return changes
        watcher.queue.drop_known(watcher.wd_of(node), known.names)
        return changes

    def changed_lately(self, node: Inode, since_ns: int) -> Job[Changes]:
        """Changes and new files in a directory since then, by the times of its files: for a guest
        that missed too many names to keep them. Removed files are not among them.
        """
        changes: Changes = {}
        known = node.listing
        with suppress(OSError), self._table.reach.directory(node) as dir_fd:
            for name, entry in list(known.names.items()) if known is not None else ():
                with suppress(OSError):
                    status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                    content, anything = changed_since(status, since_ns)
                    if anything and syscalls.born_ns(dir_fd, name) > since_ns - CLOCK_LAG_NS:
                        changes[node, name] = Missed(None, 0)
                    elif anything:
                        changes[node, name] = Missed(entry, _CHANGE if content else _ATTRIB)
                yield None
        return changes

    def _is_reborn(self, dir_fd: int, name: bytes, before: Known) -> bool:
        """Whether the name stands for another object, with the inode number of the known one.
        Raises OSError.
        """
        known = before.inode
        if known is None or known.is_placeholder:
            return syscalls.born_ns(dir_fd, name) > before.seen_ns
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            return self._table.reach.identify(fd)[0] != known.identity
        finally:
            os.close(fd)

    def events_for(self, changes: Changes) -> Iterator[Event]:
        """Events that lead from the state known before to that of the listings."""
        gone: dict[tuple[int, int], tuple[Inode, bytes, Known]] = {}
        new: dict[tuple[Inode, bytes], Known] = {}
        kept: list[tuple[Inode, bytes, Known, int]] = []
        removed: list[tuple[Inode, bytes, Known]] = []
        for (node, name), (before, mask) in changes.items():
            if not name:
                kept.append((node, name, Known(node.identity.ino, node.kind, 0, node), mask))
                continue
            after = node.listing.names.get(name) if node.listing is not None else None
            if before is not None and after is not None and before.may_be(after):
                kept.append((node, name, after, mask))
                continue
            if before is not None:
                key = (before.ino, before.kind)
                if key in gone:  # another hard link: it is not known which one moved
                    removed.append((node, name, before))
                else:
                    gone[key] = (node, name, before)
            if after is not None:
                new[node, name] = after
        for (node, name), after in list(new.items()):
            source = gone.get((after.ino, after.kind))
            # A name that was also taken again becomes DELETE and CREATE: the order of moves is not
            # known.
            if source is None or source[:2] in new or changes[node, name].before is not None:
                continue
            if self._came_since(node, name, source[2]):
                continue
            del gone[after.ino, after.kind], new[node, name]
            yield self._moved(source[0], source[1], source[2], node, name)
        for node, name, before in [*gone.values(), *removed]:
            yield self._event(node, name, before, int(Mask.DELETE))
        for (node, name), after in new.items():
            yield self._event(node, name, after, int(Mask.CREATE))
            if stat.S_ISREG(after.kind) and self._has_content(node, name):
                kept.append((node, name, after, _CHANGE))
        for node, name, after, mask in kept:
            for kind in _KINDS:
                if mask & kind:
                    yield self._event(node, name, after, kind)
            for kind in _CLOSES:
                if mask & kind and name:
                    yield self._event(node, name, after, kind)

    def _came_since(self, node: Inode, name: bytes, before: Known) -> bool:
        try:
            with self._table.reach.directory(node) as dir_fd:
                return self._is_reborn(dir_fd, name, before)
        except OSError:  # by its number it is the same
            return False

    def _has_content(self, node: Inode, name: bytes) -> bool:
        """Whether a new file may have been written to."""
        try:
            with self._table.reach.directory(node) as dir_fd:
                return bool(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_size)
        except OSError as error:
            return not syscalls.is_gone(error)

    def _child(self, node: Inode, name: bytes, known: Known) -> Inode:
        if known.inode is not None:
            return self._table.current(known.inode)
        child = node.children.get(name)
        if child is not None and child.identity.ino == known.ino:
            return child
        try:
            child = self._fs.peek(node, name).inode
        except OSError:  # gone, or cannot be looked at: the event is about its name
            child = None
        if child is not None and child.identity.ino == known.ino:
            return child
        return self._table.placeholder(known.kind or stat.S_IFREG, node, name)

    def _event(self, node: Inode, name: bytes, known: Known, kind: int) -> Event:
        mask = kind | (int(Mask.ISDIR) if stat.S_ISDIR(known.kind) else 0)
        child = self._child(node, name, known) if name else node
        before = None if kind & Mask.CREATE else known  # it may be missed again
        return Event(node, mask, name, 0, HOST, time.monotonic(), child, before=before)

    def _moved(self, node: Inode, name: bytes, known: Known, node2: Inode, name2: bytes) -> Event:
        event = self._event(node, name, known, RENAME)
        event.node2, event.name2 = node2, name2
        event.cookie = next(_cookies)
        child = event.child
        if child is not None and not child.is_placeholder:
            self._table.place(child, node2, name2)
        return event


def _touched(status: os.stat_result, before: Known) -> int:
    content, anything = changed_since(status, before.seen_ns)
    if content and stat.S_ISREG(status.st_mode):
        return _CHANGE
    return int(Mask.ATTRIB) if anything and not stat.S_ISDIR(status.st_mode) else 0


def _count() -> Iterator[int]:
    cookie = 0x8000_0000  # distinct from the kernel's, which count up from 1
    while True:
        cookie = cookie + 1 & 0xFFFF_FFFF | 0x8000_0000
        yield cookie


_cookies = _count()
