"""What another thread of this machine is doing: the path on which it sets a mark.

From /proc/TID/syscall and /proc/TID/mem, which ask no file system.
"""

from __future__ import annotations

import os
import platform

from protocol.inotify import MARKING

from . import syscalls

_PATHS = MARKING.get(platform.machine(), {})
_TRIES = 8
"""A thread that has just sent a request may not sleep yet."""
_PATH_MAX = 4096
_PAGE = os.sysconf("SC_PAGE_SIZE")


def sets_mark(thread: int, name: bytes) -> bool:
    """Whether a waiting thread is setting an inotify or fanotify mark on an object of that name, as
    far as its path shows: a directory on the way has another name. False if that cannot be seen:
    another architecture, a sandbox, a process that may not be traced (ptrace(2)).
    """
    path = _path_to_mark(thread)
    if path is None:
        return False
    last = os.path.basename(path.rstrip(b"/"))
    return last in (name, b"", b".", b"..") or path.startswith(b"/proc/")


def _path_to_mark(thread: int) -> bytes | None:
    if not _PATHS or not syscalls.sees_processes():
        return None
    try:
        with open(f"/proc/{thread}/syscall", "rb", buffering=0) as file:
            for _ in range(_TRIES):
                call = os.pread(file.fileno(), 256, 0).split()
                if call and call[0] != b"running":
                    break
                os.sched_yield()
        argument = _PATHS.get(int(call[0]))
        return _text(thread, int(call[1 + argument], 16)) if argument is not None else None
    except (OSError, ValueError, IndexError):
        return None


def _text(thread: int, address: int) -> bytes:
    """A string in a process's memory. Raises OSError."""
    if not address:
        return b""
    text = b""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        while b"\0" not in text and len(text) < _PATH_MAX:
            at = address + len(text)
            text += os.pread(memory.fileno(), _PAGE - at % _PAGE, at)
    return text.partition(b"\0")[0]
