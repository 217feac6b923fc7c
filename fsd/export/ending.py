"""Delivers everything that has happened, before the state is saved or another process takes
over.
"""

from __future__ import annotations

import os
import time

from protocol.masks import Mask

from ..events.missed import CLOCK_LAG_NS
from ..linux import syscalls
from .export import Export

_SETTLING = 2 * CLOCK_LAG_NS / 1e9
"""Quiet time after which file timestamps can tell changes before a save from changes after it."""


def settle(export: Export, patience: float) -> None:
    """Deliver everything that has happened, before the state is saved. Waits up to ``patience``
    seconds for a quiet moment: a change just before would be delivered again.
    """
    deadline = time.monotonic() + patience
    export.watcher.drain()
    while not is_settled(export) and time.monotonic() < deadline:
        export.process(export.watcher.backlog + 1)
        time.sleep(_SETTLING / 10)
        export.watcher.drain()


def hand_over(export: Export, patience: float) -> int:
    """Deliver everything that has happened, and leave later events to the next process. Returns
    the inotify instance in which they are queued; -1 if not everything could be delivered
    within ``patience`` seconds. After this only the state may be asked for.
    """
    deadline = time.monotonic() + patience
    _work_off(export, deadline, drain=True)
    root_fd = export.table.reach.root_fd
    # As the end of this process would close it.
    with export.reader.looking(export.table.root, root_fd, Mask.CLOSE_NOWRITE):
        path_fd = os.open(syscalls.fd_path(root_fd), os.O_PATH | os.O_CLOEXEC)
        os.dup2(path_fd, root_fd, inheritable=False)
        os.close(path_fd)
    inotify = export.watcher.hand_over()
    _work_off(export, deadline + patience, drain=False)
    return -1 if export.is_behind else inotify


def _work_off(export: Export, deadline: float, *, drain: bool) -> None:
    while time.monotonic() < deadline:
        if drain:
            export.watcher.drain()
        if not export.is_busy:
            break
        export.process(export.watcher.backlog + 1)
        if export.is_waiting:
            time.sleep(0.001)


def is_settled(export: Export) -> bool:
    """Whether everything is delivered, and nothing has changed for a moment."""
    quiet = time.monotonic() - export.watcher.last_activity > _SETTLING
    return quiet and not export.is_behind
