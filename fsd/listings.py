"""What the server last knew of a watched directory, and what differs from it.

Kept current by the events themselves; after lost events it is compared with the host, and the
difference is told as events (docs/decisions/resync.md).
"""

from __future__ import annotations

import os
import stat
import time
from typing import NamedTuple

from .inodes import Inode

CLOCK_LAG_NS = 20_000_000
"""File times lag the clock by up to a tick of the kernel (10 ms at HZ=100), twice for safety."""


class Known(NamedTuple):
    """One name: its inode if that was ever looked at, and until when its changes were told."""

    ino: int
    kind: int  # S_IFMT bits
    seen_ns: int  # time.time_ns()
    inode: Inode | None = None

    def may_be(self, other: Known) -> bool:
        """Whether the two may be one object; its number alone may have been reused."""
        return (self.ino, self.kind) == (other.ino, other.kind)


class Listing:
    """Names of one watched directory."""

    __slots__ = ("complete", "names")

    def __init__(self) -> None:
        self.names: dict[bytes, Known] = {}
        self.complete = False  # False: only names that had events are known


def of_inode(inode: Inode) -> Known:
    """The entry of an object as of now."""
    return Known(inode.identity[1], inode.kind, time.time_ns(), inode)


def read(directory_fd: int) -> dict[bytes, Known]:
    """The directory's names as they are now. The descriptor must be open for reading."""
    now = time.time_ns()
    names: dict[bytes, Known] = {}
    with os.scandir(directory_fd) as entries:
        for entry in entries:
            if entry.is_symlink():
                kind = stat.S_IFLNK
            elif entry.is_dir(follow_symlinks=False):
                kind = stat.S_IFDIR
            elif entry.is_file(follow_symlinks=False):
                kind = stat.S_IFREG
            else:
                try:
                    kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
                except OSError:
                    continue
            names[os.fsencode(entry.name)] = Known(entry.inode(), kind, now)
    return names


class Missed(NamedTuple):
    """A name with events that were not told: what was known before, and their kinds."""

    before: Known | None
    mask: int


def changed_since(status: os.stat_result, seen_ns: int) -> tuple[bool, bool]:
    """Whether (content, anything) changed after that time. ctime cannot be set by anyone."""
    since = seen_ns - CLOCK_LAG_NS
    return status.st_mtime_ns > since, status.st_ctime_ns > since
