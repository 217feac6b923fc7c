"""Requests of one guest that are answered later: by an event, a timer, a thread."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog

from ..guests.history import PATIENCE, Wait
from .request import Request

log = structlog.get_logger()
WAITING_LIMIT = 4096
"""Requests that one guest may have waiting: more than its programs have waiting threads."""


class Loop(Protocol):
    """What a session needs of its transport's event loop. Calls come in the thread of ``serve``."""

    def soon(self, call: Callable[[], None]) -> None:
        """Call once the present work is done."""

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call after a time; returns a function that cancels that (without effect after the
        call).
        """

    def in_thread(
        self, work: Callable[[], None], then: Callable[[BaseException | None], None]
    ) -> None:
        """Run ``work``, an Outcome, in a thread, then call ``then`` with its exception."""


class _Entry(NamedTuple):
    request: Request
    stop: Callable[[], None]
    interruptible: bool
    instead: Callable[[], None] | None  # of EINTR


class Waiting:
    """The waiting requests, by their number."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def check(self, request: Request) -> None:
        """Check that one more may wait. Raises OSError EAGAIN, EINVAL for a number that is in
        use.
        """
        if len(self._entries) >= WAITING_LIMIT:
            raise OSError(errno.EAGAIN, "too many requests wait")
        if request.unique in self._entries:
            raise OSError(errno.EINVAL, f"request {request.unique} waits already")

    def add(
        self,
        request: Request,
        stop: Callable[[], None],
        *,
        interruptible: bool = True,
        instead: Callable[[], None] | None = None,
    ) -> None:
        """The request waits, after ``check``; ``stop`` cancels what would answer it. ``instead`` is
        called on an INTERRUPT, instead of answering EINTR.
        """
        self._entries[request.unique] = _Entry(request, stop, interruptible, instead)

    def until(
        self, wait: Wait, request: Request, loop: Loop, serve: Callable[[Request], None]
    ) -> None:
        """Serve a request again once the changes before it are delivered, or that takes too long,
        or its process is interrupted.
        """
        try:
            self.check(request)
        except OSError as error:
            request.fail(error.errno or errno.EIO)
            return
        cancel: Callable[[], None] | None = None

        def look(seconds: float) -> None:
            nonlocal cancel
            if seconds:
                cancel = loop.later(seconds, lambda: look(wait.left()))
            else:
                again()

        def stop() -> None:
            if cancel is not None:
                cancel()
            wait.end()

        def again() -> None:
            if self.end(request):
                serve(request)

        def give_up() -> None:
            wait.cut()
            again()

        wait.begin(lambda: loop.soon(again))
        self.add(request, stop, instead=give_up)
        look(PATIENCE)

    def interrupt(self, unique: int) -> None:
        """INTERRUPT of a request that may be answered already."""
        entry = self._entries.get(unique)
        if entry is None or not entry.interruptible:
            return
        if entry.instead is None:
            self._end(entry)
        else:
            entry.instead()

    def suspend(self) -> None:
        """Answer none: all are sent again elsewhere."""
        for entry in self._entries.values():
            entry.stop()
        self._entries.clear()

    def close(self) -> None:
        """Answer all with EINTR."""
        for entry in list(self._entries.values()):
            self._end(entry)

    def _end(self, entry: _Entry) -> None:
        del self._entries[entry.request.unique]
        entry.stop()
        entry.request.fail(errno.EINTR)

    def waits(self, request: Request) -> bool:
        """Whether it is still to be answered."""
        entry = self._entries.get(request.unique)
        return entry is not None and entry.request is request

    def end(self, request: Request) -> bool:
        """It no longer waits, and is still to be answered; False if it is answered."""
        if not self.waits(request):
            return False
        self._entries.pop(request.unique).stop()
        return True

    def finish(self, request: Request, payload: Callable[[], bytes]) -> None:
        """Answer a request, unless that was done already."""
        if self.end(request):
            answer(request, payload)


def answer(request: Request, payload: Callable[[], bytes]) -> None:
    """Reply outside of ``serve``, with the same handling of exceptions."""
    try:
        request.reply(payload())
    except OSError as error:
        request.fail(error.errno or errno.EIO)
    except (OverflowError, ValueError):
        request.fail(errno.EINVAL)
    except Exception:
        log.exception("request failed", opcode=request.opcode)
        request.fail(errno.EIO)
