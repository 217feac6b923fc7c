"""How a file was opened: tables of evidence and verdicts, and of OPENs and CLOSEs in a row."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsd.guests.openings import OPENS_LIMIT, Evidence, Need, Opens, Wait, closes_of, judge
from fsd.pacing import windows

AT = 1000.0
CLOSING = AT + windows.CLOSE_WAIT
USED = AT + windows.OPEN_WAIT
ENDED = AT + 2 * windows.OPEN_WAIT
OPENERS = AT + windows.OPENERS_WAIT
READ, WRITTEN = Opens([False]), Opens([True])
QUIET = Evidence(AT, [], unread=False)


@pytest.mark.parametrize(
    ("known", "now", "verdict"),
    [
        (Evidence(AT, [True]), AT, WRITTEN),
        (Evidence(AT, [False, True]), AT, Opens([False, True])),
        (Evidence(AT, [True] * 20), AT, Opens([True] * OPENS_LIMIT)),
        (Evidence(AT, []), AT, Wait(CLOSING)),
        (Evidence(AT, [], is_dir=True), AT, Wait(CLOSING)),
        (Evidence(AT, [], is_dir=True), CLOSING, READ),
        (Evidence(AT, []), CLOSING, Need.QUEUE),
        (Evidence(AT, [], unread=True), OPENERS, Wait(CLOSING)),  # however late it is
        (QUIET._replace(written=True), CLOSING, WRITTEN),
        (QUIET._replace(written=False), CLOSING, READ),
        (QUIET, CLOSING, Wait(USED)),
        (QUIET._replace(is_gone=True), CLOSING, Wait(USED)),
        (QUIET._replace(is_gone=True), USED, READ),
        (QUIET, USED, Need.PROC),
        (QUIET._replace(proc=(True, True)), USED, WRITTEN),
        (QUIET._replace(proc=(True, False)), USED, READ),
        (QUIET._replace(proc=(True, None)), USED, Wait(ENDED)),
        (QUIET._replace(proc=(True, None)), ENDED, READ),  # it is mapped, and open no more
        (QUIET._replace(proc=(False, None)), USED, Wait(USED + windows.OPENERS_POLL)),
        (QUIET._replace(proc=(False, None)), OPENERS, READ),
    ],
)
def test_verdicts(known: Evidence, now: float, verdict: Opens | Wait | Need) -> None:
    assert judge(known, now) == verdict


@given(
    st.lists(st.booleans(), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.tuples(st.booleans(), st.sampled_from([None, True, False])),
)
def test_each_wait_ends(
    closes: list[bool],
    is_dir: bool,
    is_gone: bool,
    written: bool | None,
    proc: tuple[bool, bool | None],
) -> None:
    """With what is looked at when it is needed, a verdict comes within bounds."""
    known, now = Evidence(AT, closes, is_dir, is_gone), AT
    for _ in itertools.count():
        verdict = judge(known, now)
        if verdict is Need.QUEUE:
            known = known._replace(unread=False, written=written)
        elif verdict is Need.PROC:
            known = known._replace(proc=proc)
        elif isinstance(verdict, Wait):
            assert verdict.until > now
            now = verdict.until
            known = known._replace(unread=None, written=None, proc=None)
        else:
            break
    assert isinstance(verdict, Opens)
    assert verdict.writing
    assert now <= OPENERS + windows.OPENERS_POLL


OPEN, W, R = None, True, False  # an OPEN, a CLOSE_WRITE, a CLOSE_NOWRITE


@pytest.mark.parametrize(
    ("later", "before", "found"),
    [
        ([], (0, 0), []),
        ([W], (0, 0), [W]),
        ([OPEN], (0, 0), []),
        ([OPEN, R], (0, 0), []),  # the last opened is closed first
        ([OPEN, R, W], (0, 0), [W]),
        ([OPEN, R, W, R], (0, 0), [W]),  # of which OPEN the last is is not known
        ([R, W], (0, 0), [R, W]),  # two OPENs were merged
        ([R, W], (0, 1), [R]),  # one was open for writing before
        ([R, W, W], (0, 1), [R, W]),
        ([R, R, OPEN], (1, 0), [R]),
    ],
)
def test_closes(later: list[bool | None], before: tuple[int, int], found: list[bool]) -> None:
    assert closes_of(later, {False: before[0], True: before[1]}) == found


@given(st.lists(st.booleans(), max_size=8), st.integers(0, 3), st.integers(0, 3))
def test_closes_are_given_out_once(closes: list[bool], reading: int, writing: int) -> None:
    """Of closes alone, all are found but those of what was open before."""
    before = {False: reading, True: writing}
    found = closes_of(closes, before)
    assert len(found) + sum(before.values()) >= len(closes)
    for kind in (False, True):
        assert found.count(kind) <= closes.count(kind)
    assert found[:1] == closes[:1]
