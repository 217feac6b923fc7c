"""The removal of a name whose object may be long: freeing its blocks takes long."""

from __future__ import annotations

import os
from collections.abc import Callable

from protocol.masks import Mask

from ..events.attribution import Expected
from ..files.inode import Inode
from ..files.slowcalls import LONG


class Removal:
    """Holds the object of a name during its removal, if it is long: its blocks are freed by the
    last close, which a thread then does. Call it with the name just before the removal.
    """

    def __init__(
        self, close_slowly: Callable[[int, tuple[Expected, ...]], None], child: Inode | None
    ) -> None:
        self._close_slowly = close_slowly
        self._child = child
        self._fd = -1

    def __enter__(self) -> Removal:
        return self

    def __call__(self, dir_fd: int, name: bytes) -> None:
        try:
            if os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_size > LONG:
                self._fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        except OSError:
            pass  # the removal reports the error

    def __exit__(self, *_error: object) -> None:
        if self._fd >= 0:
            self._close_slowly(self._fd, ((self._child, b"", Mask.DELETE_SELF),))
