"""What the server last knew of a watched directory, and what differs from it.

Kept current by the events themselves; after lost events it is compared with the host, and the
difference is told as events (docs/decisions/resync.md).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from ..files.table import Inode
from ..linux import directories

UNKNOWN = (1 << 64) - 1
"""Inode number of an object that nobody could look at: it may be any."""
_READ_SIZE = 1 << 15
"""Bytes of names read at once, up to 1,300: some 2 ms of work."""
CLOCK_LAG_NS = 20_000_000
"""File times lag the clock by up to a tick of the kernel (10 ms at HZ=100), twice for safety."""


class Known(NamedTuple):
    """One name: its inode if that was ever looked at, and until when its changes were told."""

    ino: int
    kind: int  # S_IFMT bits, 0 where nobody could look
    seen_ns: int  # time.time_ns()
    inode: Inode | None = None

    def may_be(self, other: Known) -> bool:
        """Whether the two may be one object; its number alone may have been reused."""
        if self.kind != other.kind and self.kind and other.kind:
            return False
        return self.ino == other.ino or UNKNOWN in (self.ino, other.ino)

    def of(self, inode: Inode | None) -> Known:
        """The same with its inode, if that is it: another object's birth may be too close to
        ``seen_ns`` to be told apart by that.
        """
        if inode is None or inode.is_placeholder or inode.identity[1] != self.ino:
            return self
        return self._replace(inode=inode)


class Listing:
    """Names of one watched directory."""

    __slots__ = ("complete", "names")

    def __init__(self) -> None:
        self.names: dict[bytes, Known] = {}
        self.complete = False  # False: only names that had events are known


def of_inode(inode: Inode) -> Known:
    """The entry of an object as of now."""
    ino = UNKNOWN if inode.is_placeholder else inode.identity[1]
    return Known(ino, inode.kind, time.time_ns(), inode)


def read(directory_fd: int) -> dict[bytes, Known]:
    """The directory's names as they are now. The descriptor must be open for reading, and new.

    A name whose object cannot be looked at is one all the same, of unknown type. Raises OSError.
    """
    names: dict[bytes, Known] = {}
    for some in chunks(directory_fd):
        names.update(some)
    return names


def chunks(directory_fd: int) -> Iterator[dict[bytes, Known]]:
    """The same in parts, each as it was at one moment: that of its system call."""
    now = time.time_ns()  # before the call
    while entries := directories.read(directory_fd, _READ_SIZE):
        yield {
            name: Known(ino, kind << 12 or _kind(directory_fd, name), now)
            for name, ino, kind, _ in entries
            if name not in (b".", b"..")
        }
        now = time.time_ns()


def _kind(directory_fd: int, name: bytes) -> int:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode)
    except OSError:
        return 0


class Missed(NamedTuple):
    """A name with events that were not told: what was known before, and their kinds."""

    before: Known | None
    mask: int

    def followed_by(self, later: Missed) -> Missed:
        """Both of the same name: what was known before the first counts."""
        return Missed(self.before, self.mask | later.mask)


def changed_since(status: os.stat_result, seen_ns: int) -> tuple[bool, bool]:
    """Whether (content, anything) changed after that time. ctime cannot be set by anyone."""
    since = seen_ns - CLOCK_LAG_NS
    return status.st_mtime_ns > since, status.st_ctime_ns > since
