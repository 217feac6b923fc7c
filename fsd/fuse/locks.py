"""FUSE requests about locks, as raw messages. SETLKW is tried again until it succeeds: at once when
a guest releases a lock of that file, else after a growing pause, because the host does not report
it. All waiting requests of a guest share the pause, and the work.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import islice

from protocol import fuse
from protocol.fuse import Opcode

from ..files.locks import Lock
from .operations import Operations
from .pending import Loop, Waiting
from .request import Request

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
"""Seconds between rounds of attempts, for locks that a process on the host holds."""
TRIES = 16
"""Waiting requests that one round tries; the next round tries the next ones. After the longest
pause it is a 16th of them if that is more: of the 4,096 that a guest may have (WAITING_LIMIT) 1,000
a second, which takes 1 % of a processor."""


class Locks:
    """Handlers of one guest."""

    def __init__(self, operations: Operations, loop: Loop, waiting: Waiting) -> None:
        self._operations = operations
        self._retries = _Retries(loop)
        self._loop = loop
        self._waiting = waiting
        self.handlers: dict[int, Callable[[Request], bytes | None]] = {
            Opcode.GETLK: self._getlk,
            Opcode.SETLK: self._setlk,
            Opcode.SETLKW: self._setlkw,
        }

    def _getlk(self, request: Request) -> bytes:
        fh, owner, start, end, kind, pid, _flags = fuse.LK_IN.unpack(request.body)
        lock = Lock(kind, start, end, pid)
        kind, start, end, pid = self._operations.files.getlk(request.who, fh, owner, lock)
        return fuse.LK_OUT.pack(start, end, kind, pid)

    def _setlk(self, request: Request) -> bytes:
        self._set(request)
        return b""

    def _set(self, request: Request) -> None:
        fh, owner, start, end, kind, pid, flags = fuse.LK_IN.unpack(request.body)
        if flags & fuse.LK_FLOCK:
            self._operations.files.flock(request.who, fh, kind)
        else:
            self._operations.files.setlk(request.who, fh, owner, Lock(kind, start, end, pid))

    def _setlkw(self, request: Request) -> bytes | None:
        try:
            self._set(request)
        except BlockingIOError:
            self._waiting.check(request)
            inode = self._operations.handles.file(fuse.LK_IN.unpack(request.body).fh).inode
            _Wait(request, lambda: self._set(request), self._loop, self._waiting).begin(
                self._retries,
                lambda retry: self._operations.handles.locks.waiters.add(inode, retry),
            )
            return None
        return b""


class _Wait:
    """One SETLKW that waits."""

    def __init__(
        self, request: Request, attempt: Callable[[], None], loop: Loop, waiting: Waiting
    ) -> None:
        self._request = request
        self._attempt = attempt
        self._loop = loop
        self._waiting = waiting
        self._is_woken = False
        self._stops: list[Callable[[], None]] = []

    def begin(
        self, retries: _Retries, on_unlock: Callable[[Callable[[], None]], Callable[[], None]]
    ) -> None:
        """Wait, and be called when locks are released."""
        self._waiting.add(self._request, self._stop)
        self._stops = [on_unlock(self._wake), retries.add(self)]

    def _stop(self) -> None:
        stops, self._stops = self._stops, []  # which lead back here, and here to guest memory
        for stop in stops:
            stop()

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._loop.soon(self._woken)

    def _woken(self) -> None:
        self.retry()

    def retry(self) -> bool:
        """Try once more, and answer unless it has to wait again; returns whether it was
        answered.
        """
        self._is_woken = False
        if not self._waiting.waits(self._request):
            return False
        try:
            self._attempt()
        except BlockingIOError:
            return False
        except OSError as error:
            if self._waiting.end(self._request):
                self._request.fail(error.errno or errno.EIO)
        else:
            self._waiting.finish(self._request, lambda: b"")
        return True


class _Retries:
    """Tries waiting requests, a round at a time."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waits: dict[_Wait, None] = {}  # in the order in which they are tried
        self._pause = FIRST_PAUSE
        self._cancel: Callable[[], None] | None = None

    def add(self, wait: _Wait) -> Callable[[], None]:
        """Try it from now on; returns a function that ends that."""
        self._waits[wait] = None
        self._restart()
        return lambda: self._remove(wait)

    def _remove(self, wait: _Wait) -> None:
        self._waits.pop(wait, None)
        if not self._waits and self._cancel is not None:
            self._cancel()
            self._cancel = None

    def _restart(self) -> None:
        if self._cancel is not None and self._pause > FIRST_PAUSE:
            self._cancel()
            self._cancel = None
        self._pause = FIRST_PAUSE
        if self._cancel is None:
            self._cancel = self._loop.later(self._pause, self._round)

    def _round(self) -> None:
        self._cancel = None
        share = int(len(self._waits) * self._pause / LONGEST_PAUSE / 16)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        for wait in list(islice(self._waits, max(TRIES, share))):
            if wait in self._waits:  # not answered meanwhile
                self._waits[wait] = self._waits.pop(wait)
                if wait.retry():
                    self._pause = FIRST_PAUSE  # others may have waited for the same
        if self._waits:
            self._cancel = self._loop.later(self._pause, self._round)
