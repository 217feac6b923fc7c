"""FUSE requests about locks, as raw messages. SETLKW is tried again until it succeeds: at once when
a guest gives up a lock of that file, else after a pause that grows, as the host tells nobody.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol import fuse
from protocol.fuse import Opcode

from .fusemessage import Request
from .fusewaiting import Loop, Waiting
from .locks import Lock
from .service import Service

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.25
"""Seconds between tries, for locks that a process on the host holds."""


class Locks:
    """Handlers of one guest."""

    def __init__(self, service: Service, loop: Loop, waiting: Waiting) -> None:
        self._service = service
        self._loop = loop
        self._waiting = waiting
        self.handlers: dict[int, Callable[[Request], bytes | None]] = {
            Opcode.GETLK: self._getlk,
            Opcode.SETLK: self._setlk,
            Opcode.SETLKW: self._setlkw,
        }

    def _getlk(self, request: Request) -> bytes:
        fh, owner, start, end, kind, pid, _flags = fuse.LK_IN.unpack(request.body)
        lock = Lock((kind, start, end, pid))
        kind, start, end, pid = self._service.getlk(request.who, fh, owner, lock)
        return fuse.LK_OUT.pack(start, end, kind, pid)

    def _setlk(self, request: Request) -> bytes:
        self._set(request)
        return b""

    def _set(self, request: Request) -> None:
        fh, owner, start, end, kind, pid, flags = fuse.LK_IN.unpack(request.body)
        if flags & fuse.LK_FLOCK:
            self._service.flock(request.who, fh, kind)
        else:
            self._service.setlk(request.who, fh, owner, Lock((kind, start, end, pid)))

    def _setlkw(self, request: Request) -> bytes | None:
        try:
            self._set(request)
        except BlockingIOError:
            self._waiting.check(request)
            inode = self._service.file(fuse.LK_IN.unpack(request.body).fh).inode
            _Wait(request, lambda: self._set(request), self._loop, self._waiting).begin(
                lambda retry: self._service.locks.waiters.add(inode, retry)
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
        self._pause = FIRST_PAUSE
        self._stops: list[Callable[[], None]] = []

    def begin(self, on_unlock: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Wait, and hear of locks that are given up."""
        self._waiting.add(self._request, self._stop)
        unwait = on_unlock(lambda: self._loop.soon(self._retry))
        self._stops = [unwait, self._loop.later(self._pause, self._timed_out)]

    def _stop(self) -> None:
        for stop in self._stops:
            stop()

    def _timed_out(self) -> None:
        self._retry()
        if self._waiting.waits(self._request):
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._stops[1] = self._loop.later(self._pause, self._timed_out)

    def _retry(self) -> None:
        if not self._waiting.waits(self._request):
            return
        failure: OSError | None = None
        try:
            self._attempt()
        except BlockingIOError:
            return
        except OSError as error:
            failure = error

        def payload() -> bytes:
            if failure is not None:
                raise failure
            return b""

        self._waiting.finish(self._request, payload)
