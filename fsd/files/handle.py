"""An open file of the export, and what may be opened with which flags."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from .inode import Inode

# O_DIRECT: the caller may not mean the host's. O_PATH and O_TMPFILE open something else than the
# file; kernels do not send them, but hostile guests do.
_O_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
DROPPED_FLAGS = (
    os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_DIRECT | os.O_NOFOLLOW | os.O_PATH | _O_TMPFILE
    | os.O_ASYNC
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Handle:
    """An open file or directory; owns its descriptor."""

    inode: Inode
    fd: int
    flags: int = 0
    fh: int = 0  # by which the guest names it
    opener: int = 0  # pid of the opener, 0 if unknown
    position: int = 0  # of a directory: the descriptor's position; -1 = unknown
    uid: int = 0  # uid of the opener
    appends: bool = False  # of a file: the descriptor's current state (fsd.files.appends)


class OpenFile(Protocol):
    """Opens a regular file by its O_PATH descriptor; ``acting`` as the caller."""

    def __call__(
        self, path_fd: int, flags: int, acting: Callable[[], AbstractContextManager[None]] = ...
    ) -> int:
        """The new descriptor. Raises OSError."""


def check_regular(kind: int) -> None:
    """Raises OSError for files that must not be opened here: a FIFO could wait for ever, a device
    is not part of the export. Guests' kernels open these themselves and do not ask.
    """
    if kind != stat.S_IFREG:
        number = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(kind, errno.ENXIO)
        raise OSError(number, os.strerror(number))
