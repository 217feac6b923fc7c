"""Reads the names of a watched directory, without causing events for guests.

Apart from the listings (fsd.files.listing), which store what was read, and from the comparison: a
new watch and a guest that asks for names need it, too.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, suppress

from protocol.masks import Mask

from ..files.inode import Inode
from ..files.listing import Known
from ..files.table import InodeTable
from ..linux import directories, syscalls
from .watcher import HostWatcher

_READ_SIZE = 1 << 15
"""Bytes of names read at once, up to 1,300: about 2 ms of work."""


class Reader:
    """Reads one export's directories."""

    def __init__(self, table: InodeTable, watcher: HostWatcher) -> None:
        self._table = table
        self._watcher = watcher

    def names_in(self, inode: Inode) -> Generator[dict[bytes, Known]]:
        """The current names of a directory, in parts; none if it is gone. The events of the reading
        are attributed to the server. Raises OSError if it cannot be read.
        """
        fd = -1
        with (
            syscalls.skipping_gone,
            self._table.reach.directory(inode) as path_fd,
            self.looking(inode, path_fd, Mask.OPEN),
        ):
            fd = _open_quietly(syscalls.fd_path(path_fd))
        if fd < 0:
            return
        try:
            parts = chunks(fd)
            while True:
                names = None
                with syscalls.skipping_gone, self.looking(inode, fd, Mask.ACCESS):
                    names = next(parts, None)
                if names is None:
                    return
                yield names
        finally:
            with self.looking(inode, fd, Mask.CLOSE_NOWRITE):
                os.close(fd)

    def looking(self, inode: Inode, fd: int, mask: Mask) -> AbstractContextManager[None]:
        """Run a call of the server that makes these events of the directory open as ``fd``: under
        its current name, as the event of a rename may still be queued.
        """
        name = inode.name
        with suppress(OSError):
            name = os.path.basename(syscalls.shown_path(fd))
        return self._watcher.looking(inode, name, mask)


def read(directory_fd: int) -> dict[bytes, Known]:
    """The directory's current names. The descriptor must be open for reading, and new.

    A name whose object cannot be looked at is included with an unknown type. Raises OSError.
    """
    names: dict[bytes, Known] = {}
    for some in chunks(directory_fd):
        names.update(some)
    return names


def chunks(directory_fd: int) -> Iterator[dict[bytes, Known]]:
    """The same in parts, each as of one moment: that of its system call."""
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


def _open_quietly(path: str) -> int:
    """Open a directory for reading, without changing its atime if that is allowed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # not its owner
        return os.open(path, flags)
