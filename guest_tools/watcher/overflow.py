"""Puts IN_Q_OVERFLOW into the queue of an inotify instance: the kernel's own event for lost events,
upon which a careful watcher looks at everything again.

The kernel makes it only when the queue is full. So the queue is filled with events of a temporary
file, and emptied except for the last event, which is the overflow.
"""

from __future__ import annotations

import os
from contextlib import suppress

from protocol.inotify import HEADER
from protocol.masks import Mask

from ..errors import Failure
from . import notify

_LIMIT_PATH = "/proc/sys/fs/inotify/max_queued_events"
LONGEST = 1 << 20
"""Queued events, 64 times as many as usual: making them takes a second or two."""


def add_overflow(fd: int, next_wd: int) -> None:
    """Make IN_Q_OVERFLOW the next event of the instance. Queued events are dropped. The next watch
    will be ``next_wd``, if the kernel supports that. Raises Failure, OSError.
    """
    with open(_LIMIT_PATH) as text:
        limit = int(text.read())
    if limit > LONGEST:
        raise Failure(
            f"{_LIMIT_PATH} is {limit}: the queue is too long to fill (at most {LONGEST})"
        )
    memory = os.memfd_create("overflow")
    # Opened again, as the kernel reports no events for accesses through a memfd's own descriptor.
    file = os.open(notify.fd_path(memory), os.O_RDWR | os.O_CLOEXEC)
    os.close(memory)
    try:
        os.pwrite(file, b"x", 0)
        wd = notify.add_watch(fd, notify.fd_path(file), Mask.ACCESS | Mask.MODIFY)
        read, write = os.pread, os.pwrite
        for _ in range(limit // 2 + 1):  # by turns: the kernel merges equal ones
            read(file, 1, 0)
            write(file, b"x", 0)
        notify.remove_watch(fd, wd)  # IN_IGNORED finds the queue full, too
    finally:
        os.close(file)
    with suppress(OSError):
        notify.set_next_wd(fd, next_wd)
    queued = notify.bytes_queued(fd)
    if queued > HEADER.size:
        os.read(fd, queued - HEADER.size)
