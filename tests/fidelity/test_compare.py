"""The comparison itself: it is blind to what the kernel may merge, and to nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.fidelity import compare
from tests.fidelity.compare import CONTROL, Event, Stream
from tests.fidelity.run import Case, Outcome

ACCESS, MODIFY, ATTRIB, OPEN = 0x1, 0x2, 0x4, 0x20
MOVED_FROM, MOVED_TO, CREATE, DELETE, MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x800
DELETE_SELF, OVERFLOW, IGNORED, ISDIR = 0x400, 0x4000, 0x8000, 0x40000000


def event(mask: int, name: bytes = b"", cookie: int = 0, watch: str = "d") -> Event:
    return Event(watch, mask, name, cookie)


STREAM: Stream = [
    event(CREATE, b"f"),
    event(MODIFY, b"f"),
    event(MODIFY, b"f"),
    event(MODIFY, b"f"),
    event(MODIFY, watch="d/f"),
    event(MOVED_FROM, b"f", 70),
    event(MOVED_TO, b"g", 70),
    event(MOVE_SELF, watch="d/f"),
    event(MOVED_FROM, b"out", 71),
    event(MOVED_TO, b"in", 72),
    event(CREATE | ISDIR, b"dir\xff"),
    event(DELETE, b"g"),
    event(DELETE_SELF, watch="d/f"),
    event(IGNORED, watch="d/f"),
    event(DELETE, b"in"),
]


def without(stream: Stream, *indexes: int) -> Stream:
    return [event for index, event in enumerate(stream) if index not in indexes]


def test_equal_whatever_the_cookies_are() -> None:
    other = [e._replace(cookie=e.cookie * 3 + 5) if e.cookie else e for e in STREAM]
    assert compare.first_difference(STREAM, other) is None


@pytest.mark.parametrize("merged", [(2,), (3,), (2, 3), (1, 2)])
def test_equal_whatever_the_kernel_merged(merged: tuple[int, ...]) -> None:
    assert compare.first_difference(STREAM, without(STREAM, *merged)) is None
    assert compare.first_difference(without(STREAM, *merged), STREAM) is None


def test_a_merged_event_uses_up_no_cookie() -> None:
    moved = [event(MOVED_FROM, b"a", 5), event(MOVED_FROM, b"a", 6), event(MOVED_FROM, b"b", 7)]
    assert compare.first_difference(moved, without(moved, 1)) is None
    assert [e.cookie for e in compare.normalise(moved)] == [1, 2]


def mutations() -> dict[str, Stream]:
    swapped = [*STREAM]
    swapped[10], swapped[11] = swapped[11], swapped[10]
    changed: dict[str, tuple[int, dict[str, Any]]] = {
        "name": (0, {"name": b"F"}),
        "mask": (4, {"mask": ATTRIB}),
        "is not a directory": (10, {"mask": CREATE}),
        "watch": (7, {"watch": "d/g"}),
        "pair broken": (6, {"cookie": 99}),
        "pair where none is": (9, {"cookie": 71}),
        "no cookie": (8, {"cookie": 0}),
    }
    return {
        "swapped": swapped,
        "surplus at the end": [*STREAM, event(CREATE, b"late")],
        "repeated, but not at once": [*STREAM[:5], STREAM[3], *STREAM[5:]],
        "all repeats lost": without(STREAM, 1, 2, 3),
        "empty": [],
        **{
            label: [e._replace(**how) if i == index else e for i, e in enumerate(STREAM)]
            for label, (index, how) in changed.items()
        },
        **{f"{i} lost": without(STREAM, i) for i in range(len(STREAM)) if i not in {1, 2, 3}},
    }


@pytest.mark.parametrize("label", list(mutations()))
def test_different(label: str) -> None:
    assert compare.first_difference(STREAM, mutations()[label])
    assert compare.first_difference(mutations()[label], STREAM)


def test_lost_events_are_never_equal() -> None:
    lost = [*STREAM, event(OVERFLOW, watch="(queue)")]
    assert compare.first_difference(lost, lost)


def test_random_merges_are_equal_and_random_losses_are_not() -> None:
    rng = random.Random(1)
    for _ in range(200):
        stream = [
            event(rng.choice([CREATE, MODIFY, DELETE]), rng.choice([b"a", b"b"]))
            for _ in range(rng.randint(1, 40))
        ]
        merged: Stream = []
        for one in stream:
            if not merged or merged[-1] != one or rng.random() < 0.5:
                merged.append(one)
        assert compare.first_difference(stream, merged) is None
        runs = compare.collapse(stream)
        lost = rng.randrange(len(runs))
        assert compare.first_difference(stream, without(runs, lost))


def test_deaths_may_be_late_but_not_absent() -> None:
    late = [*without(STREAM, 12, 13), *STREAM[12:14]]
    assert compare.first_difference(STREAM, late)
    assert compare.first_difference_but_deaths(STREAM, late) is None
    swapped = [*late[:-2], late[-1], late[-2]]
    for broken in (without(STREAM, 12), without(STREAM, 13), swapped, without(late, 0)):
        assert compare.first_difference_but_deaths(STREAM, broken)


def test_a_watch_may_end_late_but_only_after_its_death() -> None:
    other = [event(DELETE_SELF, watch="d/g"), event(IGNORED, watch="d/g")]
    two = [*STREAM[:13], other[0], *STREAM[13:], other[1]]
    assert compare.first_difference([*STREAM[:14], *other, *STREAM[14:]], two) is None
    late = [*without(STREAM, 13), STREAM[13]]
    assert compare.first_difference(STREAM, late) is None
    before = [*without(STREAM, 13)]
    before.insert(12, STREAM[13])
    lived = [*STREAM[:13], event(ATTRIB, watch="d/f"), *STREAM[13:]]
    for broken in (before, lived, without(STREAM, 13), without(late, 11)):
        assert compare.first_difference(STREAM, broken)


def test_a_report_shows_the_place() -> None:
    difference = compare.first_difference(STREAM, mutations()["pair broken"])
    assert difference is not None
    text = str(difference)
    assert "-'d': IN_MOVED_TO b'g' #1" in text
    assert "+'d': IN_MOVED_TO b'g' #2" in text
    difference = compare.first_difference(STREAM, without(STREAM, 11))
    assert "missing {'IN_DELETE': 1}, extra none" in str(difference)


def test_a_report_names_the_operations_before_the_difference() -> None:
    case = Case(seed=1, steps=9)
    marks = [event(CREATE | ISDIR, b"mark-%d" % i, watch=CONTROL) for i in range(1, 9)]
    outcome = Outcome(case, case.plans(), [*marks, STREAM[0]], [*marks, STREAM[4]])
    report = outcome.report()
    assert "--seed 1 --ops 9 --mode paced" in report
    assert "  8: " in report
    assert "  1: " not in report
    assert Outcome(case, case.plans(), STREAM, STREAM).report() == ""
    assert "lost" in Outcome(case, case.plans(), STREAM, STREAM, ["lost"]).report()


def test_concurrent_writers_are_compared_one_by_one() -> None:
    one = [event(CREATE, b"a", 3, "w0"), event(DELETE, b"a", 0, "w0")]
    two = [event(MOVED_FROM, b"a", 9, "w1/sub"), event(MOVED_TO, b"b", 9, "w1/sub")]
    case = Case(seed=1, steps=1, writers=2)
    woven = [one[0], two[0], one[1], two[1]]
    assert Outcome(case, [], one + two, woven).difference() is None
    for broken in (woven[:3], woven[1:], woven[::-1]):
        assert Outcome(case, [], one + two, broken).difference()


def test_loading_keeps_every_byte() -> None:
    name = bytes(range(1, 256)).replace(b"/", b"")
    text = json.dumps({"events": [["d", CREATE, name.decode("latin-1"), 7]]})
    assert compare.load(text) == [event(CREATE, name, 7)]


def test_since() -> None:
    noise = event(OPEN | ISDIR, watch=".")
    marker = event(CREATE | ISDIR, b"mark-start", watch=CONTROL)
    assert compare.since([noise, marker, *STREAM], b"mark-start") == STREAM
    with pytest.raises(ValueError, match="mark-start"):
        compare.since([noise], b"mark-start")


def test_masks_are_written_as_the_kernel_does() -> None:
    assert compare.describe(CREATE | ISDIR) == "IN_CREATE|IN_ISDIR"
    assert compare.describe(0x100000) == "0x100000"
    assert compare.describe(0) == "0"
