"""What a guest can write into the log is bounded, and nothing is left out in silence."""

from __future__ import annotations

import io

import pytest
import structlog

from fsd.pacing.ratelimit import BURST, KINDS_LIMIT, PERIOD, RateLimit
from fsd.process import logs

from .fuse_guest import GuestKernel


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(limit: RateLimit, count: int, **fields: object) -> list[dict[str, object]]:
    written = []
    for _ in range(count):
        try:
            written.append(limit(None, "warning", dict(fields)))
        except structlog.DropEvent:
            continue
    return written


def test_a_kind_gets_a_few_lines_and_the_next_minute_says_how_many_more_there_were() -> None:
    clock = Clock()
    limit = RateLimit(clock)
    written = lines(limit, 100, event="bad", guest="a")
    assert len(written) == BURST
    assert "only counted" in str(written[-1]["note"])
    clock.now = PERIOD
    assert lines(limit, 1, event="bad", guest="a")[0]["left_out"] == 100 - BURST
    assert "left_out" not in lines(limit, 1, event="bad", guest="a")[0]


def test_kinds_and_guests_do_not_take_each_others_lines() -> None:
    limit = RateLimit(Clock())
    lines(limit, 100, event="bad", guest="a")
    assert len(lines(limit, 1, event="bad", guest="b")) == 1
    assert len(lines(limit, 1, event="worse", guest="a")) == 1


def test_texts_without_end_share_one_count() -> None:
    limit = RateLimit(Clock())
    written = sum(len(lines(limit, 1, event=f"text {n}")) for n in range(2 * KINDS_LIMIT))
    assert written == KINDS_LIMIT + BURST


def test_bad_requests_of_a_guest_do_not_fill_the_log(
    guest: GuestKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    before = structlog.get_config()
    try:
        logs.log_to_stderr("warning")
        for _ in range(1000):
            guest.session.serve([memoryview(b"no header")], [], lambda _length: None)
    finally:
        structlog.configure(**before)
    assert 0 < stream.getvalue().count("\n") <= 2 * BURST
