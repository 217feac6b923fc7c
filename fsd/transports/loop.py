"""The event loop of FUSE sessions, made with trio: timers and threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from ..files.slowcalls import THREADS, Outcome
from ..pacing.guard import Guard


class TrioLoop:
    """The ``Loop`` of a FUSE session, in a nursery: another one if the session outlives it."""

    def __init__(self, nursery: trio.Nursery | None = None, threads: int = THREADS) -> None:
        """Without a nursery, nothing is called until there is one. ``threads`` may wait for the
        share's file system, and as many for each other one.
        """
        self.nursery = nursery
        self._most = threads
        self.threads = 0  # that are at work
        self._limiters: dict[int, trio.CapacityLimiter] = {}  # by what they wait for
        self._token = trio.lowlevel.current_trio_token()

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call after a time; returns a function that cancels that."""
        scope = trio.CancelScope()
        assert self.nursery is not None
        self.nursery.start_soon(self._sleep, scope, seconds, call)
        return scope.cancel

    @staticmethod
    async def _sleep(scope: trio.CancelScope, seconds: float, call: Callable[[], None]) -> None:
        with scope:
            await trio.sleep(seconds)
            _guarded(call)

    def soon(self, call: Callable[[], None]) -> None:
        """Call once the present work is done."""
        self._token.run_sync_soon(_guarded, call)

    def in_thread(
        self, work: Callable[[], None], then: Callable[[BaseException | None], None]
    ) -> None:
        """Run ``work``, an Outcome, in a thread, then call ``then`` with its exception; at once
        with Cancelled if the nursery ends.
        """
        assert self.nursery is not None
        self.nursery.start_soon(self._work, work, then)
        self.threads += 1

    async def _work(
        self, work: Callable[[], None], then: Callable[[BaseException | None], None]
    ) -> None:
        place = work.call.mount if isinstance(work, Outcome) else 0
        limiter = self._limiters.setdefault(place, trio.CapacityLimiter(self._most))
        error: BaseException | None = None
        try:
            # An ending nursery does not wait for it: the thread ends when it can, unnoticed.
            await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        except trio.Cancelled as cancelled:
            _guarded(partial(then, cancelled))
            raise
        except Exception as caught:
            error = caught
        finally:
            self.threads -= 1
        _guarded(partial(then, error))


def _guarded(call: Callable[[], None]) -> None:
    with Guard("a late answer"):
        call()
