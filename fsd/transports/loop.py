"""The event loop of FUSE sessions, made with trio: timers and threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count

import trio

from ..files.slowcalls import THREADS, Outcome
from ..pacing.guard import Guard
from ..pacing.turn import Turn

_CANCELLED = 64
"""Timers that were cancelled and are kept, at least: with more than half of all, they go."""


class TrioLoop:
    """The ``Loop`` of a FUSE session, in a nursery: another one if the session outlives it."""

    def __init__(
        self,
        nursery: trio.Nursery | None = None,
        threads: int = THREADS,
        turn: Turn | None = None,
    ) -> None:
        """Without a nursery, nothing is called until there is one. ``threads`` may wait for the
        share's file system, and as many for each other one. ``turn``: the core's work.
        """
        self.turn = Turn() if turn is None else turn
        self.nursery = nursery
        self._most = threads
        self.threads = 0  # that are at work
        self._limiters: dict[int, trio.CapacityLimiter] = {}  # by what they wait for
        self._token = trio.lowlevel.current_trio_token()

    @property
    def nursery(self) -> trio.Nursery | None:
        """Where all of it runs. Timers end with their nursery."""
        return self._nursery

    @nursery.setter
    def nursery(self, nursery: trio.Nursery | None) -> None:
        self._nursery = nursery
        self._timers = None if nursery is None else _Timers(nursery)

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call after a time; returns a function that cancels that."""
        assert self._timers is not None
        return self._timers.add(seconds, call)

    def soon(self, call: Callable[[], None]) -> None:
        """Call once the present work is done."""
        if not self.turn.after(call):
            self._token.run_sync_soon(_guarded, call)

    def in_thread(
        self, work: Callable[[], None], then: Callable[[BaseException | None], None]
    ) -> None:
        """Run ``work``, an Outcome, in a thread, then call ``then`` with its exception; at once
        with Cancelled if the nursery ends.
        """
        assert self._nursery is not None
        self._nursery.start_soon(self._work, work, then)
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
        except Exception as caught:  # noqa: BLE001 - raised below
            error = caught
        finally:
            self.threads -= 1
        _guarded(partial(then, error))


class _Timers:
    """Of one nursery, with one task for all while there are some: most are cancelled, and a task of
    each one's own would cost each order 100 us.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._is_running = False
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._pending: set[int] = set()
        self._wake_at = 0.0  # of the task, which sleeps until then
        self._earlier = trio.Event()

    def add(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call after a time; returns what cancels that."""
        number = next(self._numbers)
        when = trio.current_time() + seconds
        self._pending.add(number)
        heappush(self._heap, (when, number, call))
        if not self._is_running:
            self._is_running = True
            self._nursery.start_soon(self._run)
        elif when < self._wake_at:
            self._earlier.set()
        return partial(self._cancel, number)

    def _cancel(self, number: int) -> None:
        self._pending.discard(number)
        if len(self._heap) > 2 * len(self._pending) + _CANCELLED:
            self._heap = [timer for timer in self._heap if timer[1] in self._pending]
            heapify(self._heap)

    async def _run(self) -> None:
        while self._heap:
            self._earlier = trio.Event()
            self._wake_at = self._heap[0][0]
            with trio.move_on_at(self._wake_at):
                await self._earlier.wait()
            now = trio.current_time()
            while self._heap and self._heap[0][0] <= now:
                _when, number, call = heappop(self._heap)
                if number in self._pending:
                    self._pending.remove(number)
                    _guarded(call)
        self._is_running = False


def _guarded(call: Callable[[], None]) -> None:
    with Guard("a late answer"):
        call()
