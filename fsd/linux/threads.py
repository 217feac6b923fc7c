"""What another thread of this machine is doing: the path on which it sets a mark.

From /proc/TID/syscall and /proc/TID/mem. Reading these may wait: for memory that is mapped from a
file of the very mount that this process serves, for a userfaultfd, for an execve(2). So a thread
does it, and whoever asks waits for a moment only.
"""

from __future__ import annotations

import os
import platform
import time
from queue import Empty, SimpleQueue
from threading import Thread

from protocol.inotify import MARKING

from . import syscalls

_PATHS = MARKING.get(platform.machine(), {})
_TRIES, _PAUSE = 8, 0.0005
"""A thread that has just sent a request may not sleep yet. Tries without and seconds with a pause
between them."""
_PATH_MAX = 4096
PATIENCE = 0.03
"""Seconds to wait for the answer. It takes 0.1 ms, and 10 if two other programs keep two processors
busy. Without one, no other is asked for until it has come, and for REST times that long."""
REST = 10
_PAGE = os.sysconf("SC_PAGE_SIZE")


def sets_mark(thread: int, name: bytes) -> bool:
    """Whether a waiting thread is setting an inotify or fanotify mark on an object of that name, as
    far as its path shows: a directory on the way has another name. False if that cannot be seen:
    another architecture, a sandbox, a process that may not be traced (ptrace(2)).
    """
    path = _reader.ask(thread) if _PATHS and syscalls.sees_processes() else None
    if path is None:
        return False
    last = os.path.basename(path.rstrip(b"/"))
    return last in (name, b"", b".", b"..") or path.startswith(b"/proc/")


class _Reader:
    """The thread that reads, begun when it is needed."""

    def __init__(self) -> None:
        self._questions: SimpleQueue[int] = SimpleQueue()
        self._answers: SimpleQueue[bytes | None] = SimpleQueue()
        self._late = 0  # answers that nobody waits for any more
        self._rest = 0.0  # time.monotonic() until which nothing is asked
        self._thread: Thread | None = None

    def ask(self, thread: int) -> bytes | None:
        """The path to the mark that a thread sets; None if it sets none, or cannot be read."""
        while self._late and not self._answers.empty():
            self._answers.get()
            self._late -= 1
        if self._late or time.monotonic() < self._rest:
            return None
        if self._thread is None:
            self._thread = Thread(target=self._run, name="reader of threads", daemon=True)
            self._thread.start()
        self._questions.put(thread)
        try:
            return self._answers.get(timeout=PATIENCE)
        except Empty:
            self._late += 1
            self._rest = time.monotonic() + REST * PATIENCE
            return None

    def _run(self) -> None:
        while True:
            self._answers.put(_path_to_mark(self._questions.get()))


_reader = _Reader()


def _path_to_mark(thread: int) -> bytes | None:
    try:
        with open(f"/proc/{thread}/syscall", "rb", buffering=0) as file:
            end, tries = time.monotonic() + PATIENCE, 0
            while True:
                call = os.pread(file.fileno(), 256, 0).split()
                if (call and call[0] != b"running") or time.monotonic() > end:
                    break
                tries += 1
                if tries < _TRIES:
                    os.sched_yield()
                else:  # it waits for a processor
                    time.sleep(_PAUSE)
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
