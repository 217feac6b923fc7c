"""Writes and reads a VMM's eventfds so that the VMM cannot make the server wait.

Whether a write waits is a flag (O_NONBLOCK) of the open file, which the VMM shares and may change
at any moment; there is no flag for one write (RWF_NOWAIT: EOPNOTSUPP, as of Linux 6.18). So a
thread watches, which sleeps while nothing is written, and interrupts a write that does not end.
Python then writes again to the same descriptor number (PEP 475), where the thread has put a file on
which no write waits.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from contextlib import suppress

from ..linux import syscalls

_NAME = "anon_inode:[eventfd]"
TICK = 0.02
"""Seconds between two looks: a write that is the same in two of them is waiting."""
_QUIET = 1.0
"""Seconds without a write after which the thread stops looking."""
_unwritable = select.epoll()
"""A file that answers each write with EINVAL: made now, as it may be impossible later."""
_ONE = (1).to_bytes(8, "little")
_NUMBER = signal.SIGURG
"""Sent to a thread that waits; no other code sends it, and the kernel only when asked to."""


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor is an eventfd: by its link in proc_pid_fd(5), as no file system can have
    that name.
    """
    try:
        return os.readlink(syscalls.fd_path(fd)) == _NAME
    except OSError:
        return False


def _is_full(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return not poll.poll(0)


class StuckError(Exception):
    """The VMM would have made the server wait."""


class Writer:
    """Signals eventfds, from the thread that it is made in; ``here`` is one for all devices."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._count = 0
        self._fd = -1  # that is written to
        self._suspected = 0  # which write may wait
        self._is_stuck = False  # it does
        self._looking = threading.Lock()
        self._is_watched = False
        self._wanted = threading.Semaphore(0)
        self._watcher: threading.Thread | None = None

    @staticmethod
    def here() -> Writer:
        """This thread's."""
        writer: Writer | None = getattr(_here, "writer", None)
        if writer is None:
            writer = _here.writer = Writer()
        return writer

    def signal(self, fd: int) -> None:
        """Add 1. The eventfd may already be set, or have no reader. Raises StuckError."""
        if not self._is_watched:
            self._watch()
        self._count += 1
        self._fd = fd
        try:
            os.write(fd, _ONE)
        except OSError:
            pass
        finally:
            self._fd = -1
        if self._suspected == self._count:
            with self._looking:  # until then the number is not to become another file's
                is_stuck, self._is_stuck = self._is_stuck, False
            if is_stuck:
                raise StuckError("an eventfd of the VMM's is full, and a write to it waits")

    def _watch(self) -> None:
        self._is_watched = True
        if self._watcher is None:
            _interruptible()
            self._watcher = threading.Thread(target=self._run, name="eventfds", daemon=True)
            self._watcher.start()
        self._wanted.release()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            quiet, before = 0.0, self._count
            while quiet < _QUIET or self._fd >= 0:
                time.sleep(TICK)
                count = self._count
                if count != before:
                    quiet = 0.0
                elif self._fd >= 0:
                    self._look(count)
                else:
                    quiet += TICK
                before = count
            self._is_watched = False

    def _look(self, count: int) -> None:
        """The same write for a long time: it waits if the eventfd is full. Else its thread waits
        for a processor.
        """
        with self._looking:
            self._suspected = count
            fd = self._fd  # read after that: either this is seen there, or the end here
            if fd >= 0 and self._count == count and _is_full(fd):
                with suppress(OSError):  # EBUSY, see dup(2): try at the next look
                    os.dup2(_unwritable.fileno(), fd, inheritable=False)
                    self._is_stuck = True
                    signal.pthread_kill(self._thread, _NUMBER)


_here = threading.local()


class Reader:
    """Empties eventfds."""

    def __init__(self) -> None:
        self._room = [bytearray(8)]

    def drain(self, fd: int) -> None:
        """Read the counter, if it is still set. Raises OSError."""
        try:
            os.preadv(fd, self._room, -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return


class _SigAction(ctypes.Structure):
    _fields_ = (("handler", ctypes.c_void_p), ("rest", ctypes.c_char * 248))


def _interruptible() -> None:
    """The signal ends a system call (no SA_RESTART), and does nothing else: its handler is abs(3),
    as Python code would run in the main thread only.
    """
    libc = ctypes.CDLL(None)
    action = _SigAction(handler=ctypes.cast(libc.abs, ctypes.c_void_p).value)
    if libc.sigaction(_NUMBER, ctypes.byref(action), None):
        raise OSError("SIGURG cannot be handled")
