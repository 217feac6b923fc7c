"""Busy polling: by a clock that only the test moves, and with a real device."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import trio

from fsd.transports import polling
from fsd.transports.polling import BusyPolling

from .conftest import served
from .test_device import Machine

WINDOW = 400e-6


class Guest:
    """A guest that sends its next request at a time, and the clock, which advances at each look."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, window: float = WINDOW, processors: int = 2
    ) -> None:
        self.now = 1.0
        self.next = 0.0
        self.looks = 0
        self.lost = 0.0  # seconds for which another program has the processor, once
        monkeypatch.setattr(polling, "perf_counter", self._time)
        monkeypatch.setattr(polling, "PROCESSORS", processors)
        self.polling = BusyPolling(window)

    def _time(self) -> float:
        self.now += 1e-6
        return self.now

    def _is_there(self) -> bool:
        self.looks += 1
        self.now, self.lost = self.now + self.lost, 0.0
        return self.now >= self.next

    def request(self, after: float, moved: int = 0) -> bool:
        """The next request, some time after an answer; whether it was found by looking."""
        self.next = self.now + after
        if trio.run(self.polling.finds, self._is_there, moved):
            assert self.now >= self.next
            return True
        self.now = max(self.now, self.next)
        self.polling.slept()
        return False


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    return Guest(monkeypatch)


def test_two_in_time_and_the_third_is_looked_for(guest: Guest) -> None:
    assert [guest.request(150e-6) for _ in range(5)] == [False, False, True, True, True]


def test_nobody_looks_for_what_comes_late(guest: Guest) -> None:
    assert not any(guest.request(2 * WINDOW) for _ in range(10))
    assert guest.looks == 0


def test_one_late_among_many_makes_no_difference(guest: Guest) -> None:
    for _ in range(5):
        guest.request(100e-6)
    begin = guest.now
    assert not guest.request(1.0)
    assert guest.looks
    assert guest.now - begin == pytest.approx(1.0, abs=1e-4)
    assert guest.request(100e-6)


def test_after_data_there_is_more_time(guest: Guest) -> None:
    assert [guest.request(2 * WINDOW, 512 << 10) for _ in range(3)] == [False, False, True]
    assert not guest.request(4 * WINDOW, 512 << 10)


@pytest.mark.parametrize("lost", [0.9e-3, 3e-3])
def test_the_thread_that_the_answer_woke_runs_first(
    guest: Guest, lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM takes some 30 us; what takes a millisecond is another program."""
    for _ in range(3):
        guest.request(150e-6)
    looks = guest.looks

    def give_way() -> None:
        assert guest.looks == looks
        guest.now += lost
        monkeypatch.setattr(os, "sched_yield", lambda: None)

    monkeypatch.setattr(os, "sched_yield", give_way)
    assert guest.request(1e-3, 1 << 20) is (lost < 1e-3)
    assert guest.request(100e-6) is (lost < 1e-3)


def test_one_in_time_among_late_ones_is_not_looked_for(guest: Guest) -> None:
    for _ in range(5):
        assert not any(guest.request(after) for after in (300e-6, 1e-3, 1e-3))
    assert guest.looks == 0


def test_it_gives_way_to_other_programs(guest: Guest) -> None:
    for _ in range(3):
        guest.request(150e-6)
    for pause in (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.16):
        guest.lost = 3e-3
        assert not guest.request(3.5e-3)
        looks, until = guest.looks, guest.now + pause - 1e-3
        while guest.now < until:
            assert not guest.request(100e-6)
        assert guest.looks == looks
        guest.now += 1e-3
        assert guest.request(100e-6)
    guest.now += 2.0
    guest.lost = 3e-3
    assert not guest.request(3.5e-3)
    guest.now += 0.005
    assert guest.request(100e-6)


def test_others_have_their_turns(guest: Guest) -> None:
    for _ in range(3):
        guest.request(150e-6)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            guest.next = guest.now + 390e-6
            assert await guest.polling.finds(guest._is_there)
            nursery.cancel_scope.cancel()

    trio.run(both)
    assert turns >= 1


def test_no_window_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, window=0)
    assert not any(guest.request(1e-6) for _ in range(10))
    assert guest.looks == 0


def test_nobody_looks_on_a_single_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, processors=1)
    assert not any(guest.request(1e-6) for _ in range(10))
    assert guest.looks == 0


@pytest.mark.parametrize("busy_poll", [0.0, 2.0])
def test_a_request_without_a_kick(
    tmp_path: Path, busy_poll: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is seen by a device that looks, and by no other."""
    monkeypatch.setattr(polling, "PROCESSORS", 2)
    monkeypatch.setattr(polling, "_LOST", 10.0)  # it does not give way to other programs
    with served(tmp_path / "socket", busy_poll=busy_poll) as server:
        machine = Machine(server.path)
        try:
            machine.start()
            queue = machine.queues[1]
            seen = 0
            for _ in range(1 if not busy_poll else 30):  # others may have the processor
                for _ in range(4):
                    machine.echo()
                head = queue.add([b"abc"], [3])
                deadline = time.monotonic() + (1.0 if busy_poll else 0.2)
                while not queue.used_count and time.monotonic() < deadline:
                    time.sleep(0.01)
                seen = queue.used_count
                queue.kick()
                assert queue.take_data() == (head, b"cba")
                if seen:
                    break
            assert bool(seen) is bool(busy_poll)
        finally:
            machine.close()
