"""Marks that the server looks for itself, in the real /proc of a process with real inotify."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyinotify
import pytest

from fsd.export import newmarks
from fsd.export.newmarks import NewMarks
from protocol.handles import NodeKey

MARKS = 50


@pytest.fixture
def device(tmp_path: Path) -> Iterator[int]:
    """Where this process watches MARKS directories."""
    manager = pyinotify.WatchManager()
    try:
        for number in range(MARKS):
            (tmp_path / str(number)).mkdir()
            manager.add_watch(str(tmp_path / str(number)), pyinotify.IN_CREATE)
        yield tmp_path.stat().st_dev
    finally:
        manager.close()


def known(_key: NodeKey, _bits: int) -> bool:
    return True


def test_reported_marks_are_not_new(device: int) -> None:
    elsewhere = os.makedev(0, 999_999)
    assert not NewMarks().may_be([os.getpid()], elsewhere, lambda _key, _bits: False)
    assert NewMarks().may_be([os.getpid()], device, lambda _key, _bits: False)


@pytest.mark.parametrize("limit", ["TEXT_LIMIT", "DESCRIPTORS_LIMIT"])
def test_a_process_with_very_many_is_left_to_the_agent(
    device: int, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    elsewhere = os.makedev(0, 999_999)
    monkeypatch.setattr(newmarks, limit, 3)
    assert NewMarks().may_be([os.getpid()], elsewhere, known)


def test_a_thread_that_has_ended_may_have_any() -> None:
    assert NewMarks().may_be([1 << 30], 1, known)


def test_requests_have_a_few_looks_at_once_and_then_a_share_of_the_time(device: int) -> None:
    elsewhere, marks = os.makedev(0, 999_999), NewMarks()
    assert not marks.may_be([os.getpid()], elsewhere, known)
    assert marks.rest_of_requests < time.monotonic()
    looks = 0
    while marks.rest_of_requests < time.monotonic() and looks < 10_000:
        marks.may_be([os.getpid()], elsewhere, known)
        looks += 1
    assert 1 < looks < 10_000


def test_the_programs_that_hold_a_mark(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[NodeKey] = set()

    def decode(_kind: int, handle: bytes) -> NodeKey:
        """Of this file system's handles, which are no FUSE mount's."""
        return NodeKey(int.from_bytes(handle[:4], "little"), 1)

    def note(key: NodeKey, _bits: int) -> bool:
        keys.add(key)
        return True

    monkeypatch.setattr(newmarks, "decode_fh", decode)
    NewMarks().may_be([os.getpid()], device, note)
    assert len(keys) == MARKS
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            threads = [other.pid, os.getpid(), 1 << 30]
            assert NewMarks().holders(threads, device, keys) == [os.getpid()]
            assert NewMarks().holders(threads, device, {NodeKey(0, 1)}) == []
            assert NewMarks().holders(threads, os.makedev(0, 999_999), keys) == []
            marks = NewMarks()
            marks.rest = time.monotonic() + 60
            assert marks.holders(threads, device, keys) == []
        finally:
            other.kill()
