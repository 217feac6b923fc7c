"""The directories of which a guest's kernel may keep names: each is watched on the host.

The watches are of an inotify instance of their own. What guests watch goes through a resolver and
many queues; what a kernel keeps needs only to be dropped, at once and cheaply.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from protocol.inotify import RawEvent, parse_events
from protocol.masks import Mask

from ..files.inode import Inode
from ..files.table import InodeTable
from ..linux import inotify, syscalls

NAMES = int(Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO)
"""A name has come or gone."""
DATA = int(Mask.MODIFY | Mask.CLOSE_WRITE)
"""CLOSE_WRITE for what was written through a shared mapping, which causes no MODIFY."""
ENDED = int(Mask.DELETE_SELF | Mask.UNMOUNT | Mask.IGNORED)
_MASK = int(NAMES | DATA | Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF) | inotify.ONLYDIR
_READ_SIZE = 1 << 16
_LONGEST_EVENT = 16 + 256
REFUSED = 2.0
"""Seconds after which a directory is tried again for which the host gave no watch."""
REFUSED_LIMIT = 4096
"""Directories for which that is remembered."""


class Name(NamedTuple):
    """A name that the kernel was given: when (time.monotonic()), and the nodeid, 0 if it does not
    exist.
    """

    at: float
    nodeid: int


class Directory:
    """A watched directory, and the names in it that the kernel has been given."""

    __slots__ = ("inode", "names", "wd")

    def __init__(self, inode: Inode, wd: int) -> None:
        self.inode = inode
        self.wd = wd
        self.names: dict[bytes, Name] = {}


class Directories:
    """Those of one guest, the least recently used first: at most ``limit``. Owns a descriptor.
    Raises OSError if the host allows no further inotify instance.
    """

    def __init__(self, table: InodeTable, limit: int) -> None:
        self._table = table
        self._limit = limit
        self.fd = inotify.new_instance()
        self._of: OrderedDict[int, Directory] = OrderedDict()  # by nodeid
        self._by_wd: dict[int, Directory] = {}
        self._refused: OrderedDict[int, float] = OrderedDict()  # nodeid -> when to try again

    def close(self) -> None:
        """Drop all watches."""
        os.close(self.fd)

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Directory]:
        return iter(list(self._of.values()))

    def get(self, inode: Inode) -> Directory | None:
        """The directory, if it is watched."""
        found = self._of.get(inode.nodeid)
        return found if found is not None and found.inode is inode else None

    def of_node(self, nodeid: int) -> Directory | None:
        """The watched directory with that nodeid."""
        return self._of.get(nodeid)

    def use(self, inode: Inode) -> Directory | None:
        """The directory, which is watched from now on; None if the host refuses that."""
        found = self.get(inode)
        if found is not None:
            self._of.move_to_end(inode.nodeid)
            return found
        if inode.nodeid in self._of:  # an earlier one, whose end is still to be read
            return None
        if self._refused and time.monotonic() < self._refused.get(inode.nodeid, 0.0):
            return None
        try:
            with self._table.reach.opened(inode) as fd:
                wd = inotify.add_watch(self.fd, syscalls.fd_path(fd), _MASK)
        except OSError:
            self._refused[inode.nodeid] = time.monotonic() + REFUSED
            if len(self._refused) > REFUSED_LIMIT:
                self._refused.popitem(last=False)
            return None
        if wd in self._by_wd:  # one directory, bound at two places
            return None
        found = self._of[inode.nodeid] = self._by_wd[wd] = Directory(inode, wd)
        self._table.pin(inode)
        return found

    def surplus(self) -> Directory | None:
        """The directory that was not used for longest, if there are too many."""
        return next(iter(self._of.values())) if len(self._of) > self._limit else None

    def drop(self, directory: Directory) -> None:
        """Watch it no longer."""
        if self._by_wd.pop(directory.wd, None) is None:
            return
        del self._of[directory.inode.nodeid]
        with suppress(OSError):  # the kernel has removed it
            inotify.remove_watch(self.fd, directory.wd)
        self._table.unpin(directory.inode)

    @property
    def queued(self) -> int:
        """Bytes of events that wait to be read."""
        return inotify.queued(self.fd)

    def read(self, most: int) -> Iterator[tuple[Directory | None, RawEvent]]:
        """What is queued now, about ``most`` bytes of it. None instead of a directory stands for
        all: some have been lost.
        """
        left = min(self.queued, most)
        while left > 0:
            buffer = os.read(self.fd, max(min(left, _READ_SIZE), _LONGEST_EVENT))
            left -= len(buffer)
            for raw in parse_events(buffer):
                directory = self._by_wd.get(raw.wd)
                if directory is not None or raw.mask & Mask.Q_OVERFLOW:
                    yield directory, raw
