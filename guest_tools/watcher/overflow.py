"""Puts IN_Q_OVERFLOW into the queue of an inotify instance: the kernel's own word for lost events,
at which every careful watcher looks at everything anew.

Nothing but a full queue makes one, so the queue is filled with events of a file of our own, and
emptied but for the last event, which is the overflow.
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
"""Queued events, 64 times as many as usual: to make them takes a second or two."""


def add_overflow(fd: int, next_wd: int) -> None:
    """Let IN_Q_OVERFLOW be what is read from the instance next. What was queued is dropped; the
    next watch will be ``next_wd``, where the kernel can be told. Raises Failure, OSError.
    """
    with open(_LIMIT_PATH) as text:
        limit = int(text.read())
    if limit > LONGEST:
        raise Failure(
            f"{_LIMIT_PATH} is {limit}: the queue is too long to fill (at most {LONGEST})"
        )
    memory = os.memfd_create("overflow")
    # Opened again, as the kernel tells nothing of what is done through the descriptor of a memfd.
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
