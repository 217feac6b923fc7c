"""The length of the host's inotify queues: fs.inotify.max_queued_events.

Apart from the watcher because that number belongs to the whole machine, so the administrator sets
it: fsd only reads it, and reports how to set it.
"""

from __future__ import annotations

import errno
from pathlib import Path

_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")


def queue_length() -> int:
    """How many events a new inotify instance holds."""
    return int(_LIMIT.read_text())


def require_queue(length: int) -> None:
    """Raises OSError if the machine's inotify queues are shorter."""
    now = queue_length()
    if now < length:
        raise OSError(
            errno.EINVAL,
            f"fs.inotify.max_queued_events is {now}: set it by "
            f"sysctl -w fs.inotify.max_queued_events={length}",
        )
