"""Locks as the host's kernel has them: values, the system calls, and requests that wait.

Apart from the locks of a guest (fsd.fuse.hostlocks), which knows their owners: all guests of an
export wait for each other's locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from ..linux import syscalls
from .inode import Inode

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, len, pid
OFFSET_MAX = (1 << 63) - 1
_OPERATIONS = {
    fcntl.F_RDLCK: fcntl.LOCK_SH,
    fcntl.F_WRLCK: fcntl.LOCK_EX,
    fcntl.F_UNLCK: fcntl.LOCK_UN,
}
WOKEN = 16
"""Requests that are tried again at once when a guest releases a lock: thousands may wait, and each
attempt is a system call."""


class Lock(NamedTuple):
    """A lock as in FUSE and fcntl(2)."""

    kind: int  # F_RDLCK, F_WRLCK, F_UNLCK
    start: int
    end: int  # inclusive
    pid: int  # 0 = not known


class LockWaiters:
    """Requests that wait for a lock on an object: tried again when a guest releases one."""

    def __init__(self) -> None:
        self._waiters: dict[Inode, dict[object, Callable[[], None]]] = {}

    def add(self, inode: Inode, retry: Callable[[], None]) -> Callable[[], None]:
        """Call ``retry`` whenever it may succeed; returns a function that ends that."""
        waiters = self._waiters.setdefault(inode, {})
        waiters[me := object()] = retry

        def remove() -> None:
            waiters.pop(me, None)
            if not waiters and self._waiters.get(inode) is waiters:
                del self._waiters[inode]

        return remove

    def wake(self, inode: Inode) -> None:
        """A lock of the object was released: those that have waited longest are called. The others
        may get theirs a pause later.
        """
        for retry in list(islice(self._waiters.get(inode, {}).values(), WOKEN)):
            retry()


def set_lock(fd: int, lock: Lock) -> None:
    """Set or release an OFD lock. Raises BlockingIOError if it conflicts with another."""
    fcntl.fcntl(fd, _F_OFD_SETLK, _pack(lock))


def blocking(fd: int, lock: Lock) -> Lock:
    """A lock that conflicts with this one, else its kind is F_UNLCK."""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _pack(lock))
    kind, _, start, length, pid = _FLOCK.unpack(answer)
    return Lock(kind, start, start + length - 1 if length else OFFSET_MAX, pid)


def held(fd: int) -> list[Lock]:
    """The OFD locks of a descriptor: proc_pid_fdinfo(5)."""
    found = []
    with open(syscalls.fdinfo_path(fd)) as info:
        for line in info:
            fields = line.split()
            if fields[:1] == ["lock:"] and fields[2] == "OFDLCK":
                kind = fcntl.F_WRLCK if fields[4] == "WRITE" else fcntl.F_RDLCK
                end = OFFSET_MAX if fields[8] == "EOF" else int(fields[8])
                found.append(Lock(kind, int(fields[7]), end, 0))
    return found


def flock(fd: int, kind: int) -> None:
    """flock(2), with the kind of fcntl(2). Raises BlockingIOError."""
    if kind not in _OPERATIONS:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fcntl.flock(fd, _OPERATIONS[kind] | fcntl.LOCK_NB)


def _pack(lock: Lock) -> bytes:
    kind, start, end, _ = lock
    if kind not in _OPERATIONS or not 0 <= start <= end <= OFFSET_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return _FLOCK.pack(kind, os.SEEK_SET, start, 0 if end == OFFSET_MAX else end - start + 1, 0)
