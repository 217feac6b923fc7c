"""The scanner's timetable, on a clock that the test turns."""

from __future__ import annotations

from itertools import pairwise
from math import inf
from typing import Any

import pytest

from guest_tools.agent import schedule
from guest_tools.agent.schedule import Look, Schedule
from protocol.frames import ALL_PROCESSES

START = 1000.0


class Clock:
    """Looks when the schedule says so; a look takes ``cost`` seconds a process."""

    def __init__(self, *, cost: float = 0.0001, **options: bool) -> None:
        self.now = START
        self.cost = cost
        self.schedule = Schedule(START, **options)
        self.looks: list[tuple[float, Look]] = []
        self.answers: list[tuple[float, int]] = []
        self.ended: set[int] = set()
        self.took = 0.0
        self._number = 0

    def hint(self, *pids: int) -> int:
        """The server gives its next hint."""
        self._number += 1
        self.schedule.hint(self._number, pids, self.now)
        return self._number

    def turn(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while (due := max(self.schedule.next(), self.now)) <= end:
            self.now = due
            look = self.schedule.take(self.now)
            if look is not None:
                began = self.now
                self.looks.append((began, look))
                took = self.cost * (10 if look.full else max(1, len(look.pids)))
                self.took += took
                self.now += took
                self.schedule.done(look, self.ended, began, self.now, complete=True)
            answered = self.schedule.answer(self.now)
            if answered and answered != (self.answers[-1][1] if self.answers else 0):
                self.answers.append((self.now, answered))
            self.now += 1e-6
        self.now = max(self.now, end)

    def looked_at(self, pid: int) -> list[float]:
        """When that process was."""
        return [at for at, look in self.looks if pid in look.pids or look.full]


def test_at_rest_nothing_is_looked_at() -> None:
    clock = Clock()
    assert clock.schedule.next() == inf
    clock.hint(7)
    clock.turn(10)
    assert clock.schedule.next() == inf
    assert clock.schedule.hot == 0
    looks = len(clock.looks)
    assert len(schedule.STEPS) - 4 <= looks <= len(schedule.STEPS)
    clock.turn(1000)
    assert len(clock.looks) == looks


def test_a_process_that_keeps_looking_things_up_is_never_late() -> None:
    """Its mark may come at any moment: each is found within the spacing, after hours, too."""
    clock = Clock()
    for _ in range(5000):
        clock.hint(7)
        clock.turn(0.01)
    times = clock.looked_at(7)[-1000:]
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) < 2 * schedule.SPACING
    assert clock.took < 0.05 * (clock.now - START)


def test_another_process_is_looked_at_at_once_beside_it() -> None:
    clock = Clock()
    for _ in range(500):
        clock.hint(7)
        clock.turn(0.01)
    clock.hint(8)
    began = clock.now
    clock.turn(0.1)
    first = [at for at in clock.looked_at(8) if at >= began]
    assert first[0] < began + 0.001
    assert len([at for at in first if at < began + 0.012]) >= 3


@pytest.mark.parametrize("cost", [0.0001, 0.01, 0.3])
def test_looking_takes_a_small_part_of_the_time(cost: float) -> None:
    clock = Clock(cost=cost)
    for _ in range(1000):
        clock.hint(7)
        clock.turn(0.05)
    assert clock.took < 0.15 * (clock.now - START)


def test_a_hint_is_answered_when_no_mark_can_be_on_its_way() -> None:
    clock = Clock()
    number = clock.hint(7)
    clock.turn(schedule.SETTLE * 0.99)
    assert clock.looks
    assert not clock.answers
    clock.turn(0.01)
    assert [answer for _, answer in clock.answers] == [number]


def test_answers_are_spaced_while_hints_keep_coming() -> None:
    clock = Clock()
    for _ in range(2000):
        clock.hint(7)
        clock.turn(0.005)
    assert len(clock.answers) < 1.1 * (clock.now - START) / schedule.ANSWERS
    clock.turn(1)
    assert clock.answers[-1][1] == 2000


def test_a_process_that_has_ended_is_not_looked_at_again() -> None:
    clock = Clock()
    clock.ended.add(7)
    number = clock.hint(7)
    clock.turn(1)
    assert len(clock.looked_at(7)) == 1
    assert clock.answers[-1][1] == number


def test_a_hint_of_all_processes_is_answered_by_a_full_look() -> None:
    clock = Clock()
    number = clock.hint(ALL_PROCESSES)
    clock.turn(1)
    assert [look.full for _, look in clock.looks] == [True]
    assert clock.looks[0][0] >= START + schedule.SETTLE
    assert clock.answers[-1][1] == number


def test_more_processes_than_are_distinguished() -> None:
    clock = Clock()
    for first in range(0, 3 * schedule.HOT_LIMIT, 1000):
        number = clock.hint(*range(first + 1, first + 1001))
    assert clock.schedule.hot <= schedule.HOT_LIMIT
    clock.turn(20)
    assert clock.answers[-1][1] == number


def test_what_was_not_complete_is_looked_at_again_before_it_is_answered() -> None:
    clock = Clock()
    number = clock.hint(7)
    clock.now += 0.01
    look = clock.schedule.take(clock.now)
    assert look is not None
    clock.schedule.done(look, (), clock.now, clock.now, complete=False)
    assert clock.schedule.answer(clock.now + 0.001) < number
    clock.turn(2)
    assert clock.answers[-1][1] == number
    assert any(look.full for _, look in clock.looks)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        ({"changed": {9}, "read": {7, 8, 9}}, 2),  # 7 and 8 have no mark yet
        ({"changed": {9}, "read": {8, 9}}, 0),  # nobody knows about 7
        ({"changed": {9}, "read": {8, 9}, "settled": {7}}, 2),
        ({"changed": {8, 9}, "read": {7, 8, 9}}, 1),  # 8 may have set its mark after hint 2
        ({"changed": {7, 9}, "read": {7, 8, 9}, "settled": {7}}, 0),  # 7 has set one since
        ({"changed": {9}, "read": {7, 8, 9}, "early": 1e-3}, 0),  # a mark may be on its way
        ({"changed": {9}, "read": {9}, "settled": {7, 8}, "early": 1e-3}, 2),
    ],
)
def test_what_is_answered_before_new_marks_are_sent(reading: dict[str, Any], expected: int) -> None:
    """The hints that these marks cannot come from, or old events would be delivered to them."""
    clock = Clock()
    for pid in (7, 8):
        clock.hint(pid)
    began = clock.now + schedule.SETTLE - reading.pop("early", 0.0)
    clock.now = began
    clock.hint(9)
    assert clock.schedule.unanswered() == {7, 8, 9}
    answered = clock.schedule.answer_without(**{"settled": set(), "began": began} | reading)
    assert answered == expected


def test_where_calls_are_traced_a_hint_costs_one_late_look() -> None:
    """For the calls of 32-bit programs, which are not traced."""
    clock = Clock(is_traced=True)
    number = clock.hint(7)
    clock.turn(schedule.TRACED_STEPS[0] * 0.9)
    assert not clock.looks
    assert clock.answers[-1][1] == number
    clock.turn(10)
    assert len(clock.looks) == 1
    for _ in range(1000):
        clock.hint(7)
        clock.turn(0.01)
    assert len(clock.looks) < 100
    clock.schedule.call([7])
    began = clock.now
    clock.turn(0.001)
    assert clock.looked_at(7)[-1] <= began + 0.001


def test_a_process_with_many_marks_delays_no_other() -> None:
    """It sets marks all the time, and takes long to read: the others are read at once."""
    clock = Clock(is_traced=True)
    heavy, light = 1, 2
    long = 0.3
    for number in range(900):
        clock.schedule.call({heavy})
        if number % 10 == 5:
            clock.schedule.call({light})
        called = clock.now
        while (look := clock.schedule.take(clock.now)) is not None:
            began = clock.now
            took = long if heavy in look.pids else 0.0001
            clock.looks.append((began, look))
            clock.now += took
            seconds = {heavy: long} if heavy in look.pids else {}
            clock.schedule.done(look, (), began, clock.now, complete=True, heavy=seconds)
        if number % 10 == 5:
            assert called <= clock.looked_at(light)[-1] < called + 0.001
            assert heavy not in next(
                look.pids for _, look in clock.looks[::-1] if light in look.pids
            )
        clock.now += 0.01
    times = clock.looked_at(heavy)
    assert len(times) > 1  # but it is read, too
    assert min(b - a for a, b in pairwise(times)) >= 9 * long


def test_a_hint_waits_for_the_calls_of_its_process_alone() -> None:
    schedule = Schedule(START, is_traced=True)
    look = Look(frozenset({1}))
    schedule.call({1})
    schedule.done(look, (), START, START + 1, complete=True, heavy={1: 1.0})
    schedule.call({1})  # which has to rest now
    now = START + 2
    schedule.hint(1, [2], now)
    assert schedule.answer(now + 0.1) == 1
    schedule.hint(2, [1], now + 0.1)
    assert schedule.answer(now + 0.3) == 1
    schedule.done(look, (), now + 0.3, now + 0.4, complete=True)
    assert schedule.answer(now + 0.5) == 2


def test_full_looks_come_now_and_then_while_something_happens() -> None:
    clock = Clock()
    for _ in range(100):
        clock.hint(7)
        clock.turn(1)
    fulls = [at for at, look in clock.looks if look.full]
    assert 2 <= len(fulls) <= 4


def test_known_watchers_are_seen_again_while_events_flow() -> None:
    clock = Clock()
    clock.schedule.events_flow(clock.now)
    clock.turn(1)
    clock.schedule.events_flow(clock.now)
    clock.turn(10)
    assert [round(at - START, 3) for at, look in clock.looks if look.watchers] == [schedule.RECHECK]
