"""What sessions need of trio: timers, and calls after the core's present work."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from fsd.pacing.turn import Turn
from fsd.transports.loop import TrioLoop


async def test_timers_fire_in_order_whatever_came_first(autojump_clock: MockClock) -> None:
    fired: list[tuple[str, float]] = []
    start = trio.current_time()

    def note(name: str) -> None:
        fired.append((name, round(trio.current_time() - start, 6)))

    async with trio.open_nursery() as nursery:
        loop = TrioLoop(nursery)
        loop.later(10, lambda: note("long"))
        await trio.sleep(1)
        loop.later(2, lambda: note("short"))
        cancel = loop.later(5, lambda: note("cancelled"))
        loop.later(5, cancel)
        await trio.sleep(3)
        cancel()
    assert fired == [("short", 3.0), ("long", 10.0)]


async def test_what_a_timer_begins_has_timers_itself(autojump_clock: MockClock) -> None:
    fired: list[float] = []
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        loop = TrioLoop(nursery)

        def again() -> None:
            fired.append(trio.current_time() - start)
            if len(fired) < 3:
                loop.later(1, again)

        loop.later(1, again)
    assert fired == [1.0, 2.0, 3.0]


async def test_cancelled_timers_are_not_kept() -> None:
    async with trio.open_nursery() as nursery:
        loop = TrioLoop(nursery)
        timers = loop._timers
        assert timers is not None
        kept = [loop.later(60, lambda: None) for _ in range(10)]
        for _ in range(10_000):
            loop.later(60, lambda: None)()
        assert len(timers._heap) < 200
        assert {number for _, number, _ in timers._heap} >= set(range(len(kept)))
        nursery.cancel_scope.cancel()


async def test_timers_end_with_their_nursery(autojump_clock: MockClock) -> None:
    fired: list[str] = []
    loop = TrioLoop()
    async with trio.open_nursery() as one:
        loop.nursery = one
        loop.later(1, lambda: fired.append("first"))
        one.cancel_scope.cancel()
    async with trio.open_nursery() as another:
        loop.nursery = another
        loop.later(3, lambda: fired.append("second"))
    assert fired == ["second"]


async def test_soon_is_after_the_turn(autojump_clock: MockClock) -> None:
    done: list[str] = []
    turn = Turn()
    async with trio.open_nursery() as nursery:
        loop = TrioLoop(nursery, turn=turn)
        with turn:
            loop.soon(lambda: done.append("answer"))
            loop.soon(lambda: loop.soon(lambda: done.append("what that began")))
            done.append("work")
        assert done == ["work", "answer", "what that began"]
        loop.soon(lambda: done.append("later"))
        assert done[-1] == "what that began"
        await trio.sleep(1)
    assert done[-1] == "later"
