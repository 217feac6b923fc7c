"""Sets the queue length of an inotify instance: fs.inotify.max_queued_events.

Apart from the watcher because that number belongs to the whole machine: an instance keeps the one
under which it is made. So it is set for a moment, under a lock, and put back, also after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")
NOTE = Path("/run/fsd-max_queued_events")
"""The lock file. While the number is changed it contains the old and the new one."""
_PATIENCE = 10.0
"""Seconds to wait for another server that is just starting, which takes less than a millisecond."""


@contextmanager
def limited_to(length: int | None) -> Iterator[None]:
    """Within a with block, new inotify instances have queues of that length; None = the machine's.

    Raises OSError if the number has to be changed and may not be: only root can.
    """
    if length is None and not NOTE.exists():
        yield
        return
    try:
        fd = _locked()
    except OSError as error:
        if length is None or _now() == length:
            yield
            return
        raise _refused(error) from error
    try:
        _put_back(fd)
        before = _now()
        if length is None or before == length:
            yield
            return
        os.pwrite(fd, b"%d %d" % (before, length), 0)
        try:
            try:
                LIMIT.write_text(f"{length}\n")
            except OSError as error:
                raise _refused(error) from error
            yield
        finally:
            _put_back(fd)
    finally:
        os.close(fd)


def _now() -> int:
    return int(LIMIT.read_text())


def _refused(error: OSError) -> OSError:
    return OSError(
        error.errno or errno.EIO,
        f"fs.inotify.max_queued_events is {_now()} and cannot be changed ({error.strerror}): "
        "set it by sysctl and leave out --max-queued-events",
    )


def _locked() -> int:
    """The lock file, opened, and locked until it is closed. Raises OSError."""
    fd = os.open(NOTE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise
            time.sleep(0.001)
        else:
            return fd


def _put_back(fd: int) -> None:
    """Restore the number in the file, also for a server that was killed; not if another program has
    set it since.
    """
    numbers = os.pread(fd, 64, 0).split()
    if len(numbers) == 2 and int(numbers[1]) == _now():
        LIMIT.write_text(f"{int(numbers[0])}\n")
    os.ftruncate(fd, 0)
