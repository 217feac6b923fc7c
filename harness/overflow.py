"""Makes an inotify queue of the host run full.

Apart from a change of fs.inotify.max_queued_events, which is the whole machine's: whatever starts
meanwhile, another test or another program, would get a short queue, too.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")
_IN_ATTRIB = 0x4
_SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def fill(fd: int, room: int) -> None:
    """Fill the queue of an inotify instance, but for ``room`` events (at least one), with those of
    a watch that its owner does not know.
    """
    with tempfile.TemporaryDirectory(prefix="fsd-overflow-") as folder:
        files = [os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY) for name in "ab"]
        wd = _checked(_libc.inotify_add_watch(fd, os.fsencode(folder), _IN_ATTRIB))
        try:
            # In turns, as an event like the one before is merged with it. The last is IN_IGNORED.
            for number in range(int(_LIMIT.read_text()) - room - 1):
                os.utime(files[number % 2])
        finally:
            _libc.inotify_rm_watch(fd, wd)
            for file in files:
                os.close(file)


@contextmanager
def queue_of(pid: int) -> Iterator[int]:
    """The inotify instance of another process; of an fsd server, the first one: the next is that
    of its kernel's cache."""
    there = Path(f"/proc/{pid}/fd")
    number = min(
        int(name) for name in os.listdir(there) if os.readlink(there / name) == "anon_inode:inotify"
    )
    pidfd = os.pidfd_open(pid)
    try:
        fd = _checked(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
    finally:
        os.close(pidfd)
    try:
        yield fd
    finally:
        os.close(fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
