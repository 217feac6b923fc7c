"""inotify(7) without a library: for many watches of one kind, which are set and dropped often.

The events that guests get come through pyinotify's watches (fsd.events.watcher).
"""

from __future__ import annotations

import ctypes
import fcntl
import struct

from .ioctls import FIONREAD
from .libc import check, libc

_NONBLOCK, _CLOEXEC = 0o4000, 0o2000000
ONLYDIR = 0x0100_0000
"""IN_ONLYDIR."""
_add = libc.inotify_add_watch
_add.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def new_instance() -> int:
    """inotify_init1(2): a descriptor that does not block. Raises OSError."""
    return check(libc.inotify_init1(_NONBLOCK | _CLOEXEC))


def add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the watch descriptor. Raises OSError."""
    return check(_add(fd, path.encode(), mask))


def queued(fd: int) -> int:
    """Bytes of events that wait to be read: FIONREAD of inotify(7). Raises OSError."""
    (size,) = struct.unpack("i", fcntl.ioctl(fd, FIONREAD, b"\0\0\0\0"))
    return int(size)


def remove_watch(fd: int, wd: int) -> None:
    """inotify_rm_watch(2). Raises OSError."""
    check(libc.inotify_rm_watch(fd, wd))
