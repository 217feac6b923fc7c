"""Files whose data a guest's kernel moves itself (FUSE_PASSTHROUGH), and which of their host events
it has made.

Such a kernel opens the file once more, uses and closes it outside of any call of the server, so
attribution cannot bracket that. But it does so through a private mount of the share. A fanotify
group watches the same files and ignores that mount: what it reports, others have done. The kernel
queues an event for both in one call, so an event in the host's queue that the group does not report
is the guest's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from protocol.inotify import RawEvent
from protocol.masks import Mask

from ..files.inode import Inode
from ..files.table import InodeTable
from ..linux import fanotify, mounting, syscalls
from .backlog import Backlog
from .event import HOST, SERVER, Origin

TOUCHES = Mask.OPEN | Mask.ACCESS | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
"""The events that are caused without a call of the server."""
LINGER = 1.0
"""Seconds for which a file is remembered after its last RELEASE: its kernel closes it at about the
same time, before or after."""
AGAIN = 0.001
"""Seconds for which further events of a kind are the host's, too: the group counts several as one,
and may have the next before the host's queue has it."""
_TOUCHES, _ISDIR = int(TOUCHES), int(Mask.ISDIR)
_DATA = int(Mask.ACCESS | Mask.MODIFY)
_EACH = [int(bit) for bit in (
    Mask.OPEN, Mask.ACCESS, Mask.MODIFY, Mask.CLOSE_WRITE, Mask.CLOSE_NOWRITE
)]  # fmt: skip


class _Reported:
    """What others have done with a file, according to the group."""

    __slots__ = ("bits", "found", "until")

    def __init__(self) -> None:
        self.bits = self.found = 0
        self.until: dict[int, float] = {}  # of those found: further events are theirs, too

    def has(self, bit: int, now: float) -> bool:
        """Whether an event in the host's queue is theirs."""
        if self.bits & bit:
            self.found |= bit
            self.until[bit] = now + AGAIN
            return True
        return now < self.until.get(bit, 0.0)

    def drop(self, bit: int) -> None:
        """It was the server's own call that the group has reported."""
        self.bits &= ~bit

    def rest(self) -> int:
        """Those that were not in the host's queue when that was read."""
        rest, self.bits, self.found = self.bits & ~self.found, 0, 0
        return rest


class _File:
    """One of them."""

    __slots__ = (
        "handle", "inode", "mask", "name", "named", "number", "own", "parent", "until",
    )  # fmt: skip

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        device, ino, self.handle, _ = inode.identity  # as they are now: it may be removed
        self.number = device, ino
        self.parent, self.name = inode.parent, inode.name
        self.until = math.inf  # time.monotonic() until which it is remembered, once it is closed
        self.mask = 0  # what the group reports of it
        # What others have done, by name and as self event: in the group's report just read, those
        # of it that were in the host's queue, and until when further ones are theirs, too
        self.named, self.own = _Reported(), _Reported()


class BackedFiles:
    """Those of one guest, all on the share's own mount. Owns its descriptors. Raises OSError if the
    host does not allow this. ``watched`` returns what an inode is watched for, ``wanted`` what the
    guests' marks on it ask for (None: on the whole share).
    """

    def __init__(
        self,
        table: InodeTable,
        guest: Origin,
        queue: Backlog,
        *,
        watched: Callable[[Inode], Mask],
        wanted: Callable[[Inode | None], Mask],
    ) -> None:
        self._table = table
        self._guest = guest
        self._queue = queue
        self._watched = watched
        self._wanted = wanted
        self._files: dict[Inode, _File] = {}
        self._by_handle: dict[bytes, _File] = {}
        self._by_number: dict[tuple[int, int], _File] = {}
        self._in: dict[Inode, dict[_File, None]] = {}  # by the directory that they are known in
        self._by_place: dict[tuple[Inode, bytes], _File] = {}
        self._reported: dict[_File, None] = {}
        self._armed = 0
        self._now = 0.0  # time.monotonic() of the last ``read``
        self.root_fd = self.fd = -1
        """The root of the private mount, and the group: readable when something is to be
        ``read``."""
        try:
            tree = mounting.clone(table.reach.root_fd)
            try:
                self.root_fd = os.open(
                    ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree
                )
            finally:
                os.close(tree)
            self.fd = fanotify.new_group()
            fanotify.ignore_mount(self.fd, syscalls.fd_path(self.root_fd), _TOUCHES)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Forget all files."""
        for inode in self._files:
            self._table.unpin(inode)
        self._files.clear()
        self._by_handle.clear()
        self._reported.clear()
        self._by_number.clear()
        self._in.clear()
        self._by_place.clear()
        for fd in (self.root_fd, self.fd):
            if fd >= 0:
                os.close(fd)
        self.root_fd = self.fd = -1

    def __bool__(self) -> bool:
        return bool(self._files)

    # Which files

    def add(self, inode: Inode) -> None:
        """Before the kernel opens a file once more. Raises OSError."""
        file = self._files.get(inode)
        if file is None:
            file = _File(inode)
            self._arm(file)
            self._files[inode] = self._by_number[file.number] = file
            self._by_handle[file.handle] = file
            self._table.pin(inode)
            self._put(file)
        file.until = math.inf

    def remove(self, inode: Inode) -> None:
        """It is closed. Call ``expire`` after LINGER seconds."""
        file = self._files.get(inode)
        if file is not None:
            file.until = time.monotonic() + LINGER

    def expire(self) -> bool:
        """Forget files that have been closed for long; whether there are others still to come."""
        now = time.monotonic()
        closed = [file for file in self._files.values() if file.until < math.inf]
        for file in closed:
            if file.until <= now:
                self._disarm(file)
                del self._files[file.inode]
                self._by_number.pop(file.number, None)
                self._by_handle.pop(file.handle, None)
                self._reported.pop(file, None)
                self._take(file)
                self._table.unpin(file.inode)
        return any(file.until > now for file in closed)

    def moved(self, inode: Inode) -> None:
        """An object is known at another place."""
        file = self._files.get(inode)
        if file is not None:
            self._take(file)
            file.parent, file.name = inode.parent, inode.name
            self._put(file)
            with suppress(OSError):
                self._arm(file)

    def watches(self, inode: Inode, mask: int) -> None:
        """An object is to be watched for these events, besides what it is watched for."""
        for file in self._at(inode):
            with suppress(OSError):  # then its events count as the host's
                self._arm(file, mask)

    def watches_less(self, inode: Inode) -> None:
        """It is watched for less, or nothing."""
        for file in self._at(inode):
            if not self._seen_events(file):
                self._disarm(file)

    def _at(self, inode: Inode) -> list[_File]:
        if inode.is_dir:
            return list(self._in.get(inode, ()))
        file = self._files.get(inode)
        return [] if file is None else [file]

    def _put(self, file: _File) -> None:
        if file.parent is not None:
            self._in.setdefault(file.parent, {})[file] = None
            self._by_place[file.parent, file.name] = file

    def _take(self, file: _File) -> None:
        if file.parent is None:
            return
        self._in[file.parent].pop(file, None)
        if not self._in[file.parent]:
            del self._in[file.parent]
        if self._by_place.get(place := (file.parent, file.name)) is file:
            del self._by_place[place]

    def _seen_events(self, file: _File) -> int:
        mask = int(self._watched(file.inode))
        if file.parent is not None:
            mask |= int(self._watched(file.parent))
        return mask & _TOUCHES

    def _arm(self, file: _File, besides: int = 0) -> None:
        """Have the group report what the host's queue reports of the file. Raises OSError."""
        mask = self._seen_events(file) | besides & _TOUCHES
        if mask & ~file.mask:
            self._mark(file, fanotify.watch, mask)
            self._armed += not file.mask
            file.mask |= mask

    def _disarm(self, file: _File) -> None:
        if file.mask:
            with suppress(OSError):  # it is gone, and its mark with it
                self._mark(file, fanotify.unwatch, file.mask)
            file.mask = 0
            self._armed -= 1

    def _mark(self, file: _File, change: Callable[[int, str, int], None], mask: int) -> None:
        fd = syscalls.open_by_handle(self.root_fd, file.handle, os.O_PATH)
        try:
            change(self.fd, syscalls.fd_path(fd), mask)
        finally:
            os.close(fd)

    # Which party

    def read(self) -> None:
        """Take in what others have done: after events were read from the host's queue, and before
        their ``origin_of``.
        """
        self._now = time.monotonic()
        if not self._armed:
            return
        for handle, mask in fanotify.read(self.fd):
            if handle is None:
                for file in self._files.values():
                    self._report(file, file.mask)
            elif (found := self._by_handle.get(handle)) is not None:
                self._report(found, mask)

    def _report(self, file: _File, mask: int) -> None:
        if file.parent is not None:
            file.named.bits |= mask & int(self._watched(file.parent)) & _TOUCHES
        file.own.bits |= mask & int(self._watched(file.inode)) & _TOUCHES
        self._reported[file] = None

    def origin_of(self, node: Inode | None, raw: RawEvent, origin: Origin) -> Origin:
        """Which party has caused an event of ``node``'s watch, found in the host's queue. SERVER:
        the kernel has opened or closed a file once more for an open file of the guest, or moved
        data and nobody wants to know. ``origin``: the party whose call of the server caused it, or
        the host.
        """
        if node is None or raw.mask & _ISDIR:
            return origin
        file = self._named(node, raw) if raw.name else self._files.get(node)
        bits = raw.mask & _TOUCHES
        if file is None:
            return origin
        if bits & ~file.mask:  # it has come into view just now
            with suppress(OSError):
                self._arm(file)
            return origin
        reported = file.named if raw.name else file.own
        if origin is not HOST:  # the group reports the server's own calls, too
            reported.drop(bits)
            return origin
        if reported.has(bits, self._now):
            return HOST
        # There may be a million of these a second, in a directory that is watched because it was
        # just looked up.
        return self._guest if bits & _DATA & self._asked_for(file) else SERVER

    def _asked_for(self, file: _File) -> int:
        mask = self._wanted(None) | self._wanted(file.inode)
        return int(mask if file.parent is None else mask | self._wanted(file.parent))

    def _named(self, directory: Inode, raw: RawEvent) -> _File | None:
        """The file of a name. If changes of the name are still to be processed, the one that has it
        now.
        """
        name = raw.name
        if self._queue.is_changing(raw.wd, name, SERVER):
            try:
                with self._table.reach.directory(directory) as fd:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except OSError:
                return None
            return self._by_number.get((status.st_dev, status.st_ino))
        child = directory.children.get(name)
        if child is not None:
            return self._files.get(child)
        # Unlinked, or made with O_TMPFILE: its events have the last name that the kernel had.
        return self._by_place.get((directory, name))

    @property
    def has_rest(self) -> bool:
        """Whether the last ``read`` has taken in anything."""
        return bool(self._reported)

    def rest(self) -> Iterator[tuple[Inode, bytes, int]]:
        """What others have done and was not in the host's queue when that was read: object watched,
        name, event. It counts at once. When its event comes, that counts as the guest's; or it has
        come before the group had it.
        """
        for file in self._reported:
            named, own = file.named.rest(), file.own.rest()
            for bit in _EACH:
                if named & bit and file.parent is not None:
                    yield file.parent, file.name, bit
                if own & bit:
                    yield file.inode, b"", bit
        self._reported.clear()
