"""The names of a watched directory are read, and nobody gets an event of that.

Apart from the listings, which say what was read, and from the comparison: a new watch and a guest
that asks for names need it, too.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, suppress

from ..files.table import Inode, InodeTable
from ..linux import syscalls
from . import listings
from .watcher import HostWatcher


class Reader:
    """Reads one export's directories."""

    def __init__(self, table: InodeTable, watcher: HostWatcher) -> None:
        self._table = table
        self._watcher = watcher

    def names_in(self, inode: Inode) -> Generator[dict[bytes, listings.Known]]:
        """The names of a directory now, in parts; none where it is gone. Our own echo is no one's
        event. Raises OSError where it cannot be read.
        """
        fd = -1
        with (
            syscalls.skipping_gone,
            self._table.directory(inode) as path_fd,
            self.looking(inode, path_fd),
        ):
            fd = _open_quietly(syscalls.fd_path(path_fd))
        if fd < 0:
            return
        try:
            parts = listings.chunks(fd)
            while True:
                names = None
                with syscalls.skipping_gone, self.looking(inode, fd):
                    names = next(parts, None)
                if names is None:
                    return
                yield names
        finally:
            with self.looking(inode, fd):
                os.close(fd)

    def looking(self, inode: Inode, fd: int) -> AbstractContextManager[None]:
        """Run a call of the server that reads the directory which is open as ``fd``: by the name
        that it has now, as the news of a rename may be still to come.
        """
        name = inode.name
        with suppress(OSError):
            name = os.path.basename(syscalls.shown_path(fd))
        return self._watcher.looking(inode, name)


def _open_quietly(path: str) -> int:
    """Open a directory for reading, leaving its atime alone where that is allowed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # not its owner
        return os.open(path, flags)
