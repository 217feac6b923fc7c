"""Appends: a write through an O_APPEND descriptor goes to the current end of the host's file.

Apart because a guest's kernel sends an offset, the end that it remembers, while host programs
append too; and because each transport shows in its own way which writes are appends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import Counter, OrderedDict

from .handle import Handle

ENDS_LIMIT = 4096
"""Files whose ends are remembered, the last ones used: about 200 bytes each."""
_ENDS = 16
"""Ends of one file: answers about it that its kernel may not have processed yet."""
_UNKNOWN = (-1,)
_PAGE = mmap.PAGESIZE


def follow(handle: Handle, appends: bool) -> None:
    """Make a descriptor append, or not, like the guest's now: fcntl(2) may have changed that.
    Raises OSError EPERM for an append-only file of the host that is written at another place.
    """
    if handle.appends != appends:
        flags = fcntl.fcntl(handle.fd, fcntl.F_GETFL) & ~os.O_APPEND
        fcntl.fcntl(handle.fd, fcntl.F_SETFL, flags | os.O_APPEND if appends else flags)
        handle.appends = appends


class Bypass:
    """Which open files bypass their kernel's page cache: those that append, because the kernel
    sends a write across the end of a page as two WRITEs, and others could write between them.

    Linux before 6.6 leaves old pages in the cache then, and maps no such file shared. There, all
    open descriptors of a file are of one kind, and those that may be mapped keep the cache.
    """

    def __init__(self) -> None:
        self.mixes = False
        """Whether the kernel is newer, and has agreed to DIRECT_IO_ALLOW_MMAP."""
        self._files: dict[int, tuple[int, bool]] = {}
        self._counts: Counter[tuple[int, bool]] = Counter()

    def opened(self, handle: Handle) -> bool:
        """Whether a file that is opened now does."""
        appends = bool(handle.flags & os.O_APPEND)
        if self.mixes:
            return appends
        node = handle.inode.nodeid
        appends = appends and handle.flags & os.O_ACCMODE == os.O_WRONLY
        bypasses = bool(self._counts[node, True]) or (appends and not self._counts[node, False])
        self._files[handle.fh] = node, bypasses
        self._counts[node, bypasses] += 1
        return bypasses

    def bypasses(self, fh: int) -> bool:
        """Whether an open file does; not known if the kernel mixes."""
        return self._files.get(fh, (0, False))[1]

    def closed(self, fh: int) -> None:
        """A file is closed."""
        file = self._files.pop(fh, None)
        if file is not None:
            self._counts[file] -= 1
            if not self._counts[file]:
                del self._counts[file]


class Ends:
    """The end of a file according to its kernel, for transports where WRITE comes without the
    descriptor's flags: an append has that offset, and written-back pages of a mapped file lie
    before it.
    """

    def __init__(self) -> None:
        # By nodeid: where the last WRITE ended, or -1, and sizes that the kernel got since.
        self._ends: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def size_reported(self, nodeid: int, size: int) -> None:
        """The kernel gets a file's size. It ignores an answer that a WRITE has overtaken, so the
        earlier ones count, too.
        """
        written, *reported = self._ends.get(nodeid, _UNKNOWN)
        if not reported or reported[-1] != size:
            self._set(nodeid, (written, *reported[1 - _ENDS :], size))

    def is_append(self, handle: Handle, offset: int, size: int) -> bool:
        """Whether a WRITE is an append, through a descriptor that was opened for appending."""
        ends = self._ends.get(handle.inode.nodeid, _UNKNOWN)
        is_known = ends != _UNKNOWN
        may_be_mapped = handle.flags & os.O_ACCMODE == os.O_RDWR
        may_be_page = not is_known or not size % _PAGE or offset + size in ends
        if may_be_mapped and may_be_page and not offset % _PAGE:
            return is_known and offset in (ends[0], ends[-1])
        return offset in ends or not is_known

    def written(self, nodeid: int, offset: int, size: int) -> None:
        """The kernel learns that a WRITE was done: the file ends there, or later."""
        end, ends = offset + size, self._ends.get(nodeid, _UNKNOWN)
        later = tuple(one for one in ends if one > end)
        self._set(nodeid, (end if offset in ends or not later else -1, *later))
        self._ends.move_to_end(nodeid)

    def _set(self, nodeid: int, ends: tuple[int, ...]) -> None:
        self._ends[nodeid] = ends
        if len(self._ends) > ENDS_LIMIT:
            self._ends.popitem(last=False)
