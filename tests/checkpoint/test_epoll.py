"""Epoll sets: entries whose numbers have been closed, given to others, or are borne by several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .remote import Remote, guest, remote, restored, save, shown

IN, ERR, HUP, ONESHOT, ET, EXCLUSIVE = 0x1, 0x8, 0x10, 0x4000_0000, 0x8000_0000, 0x1000_0000


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Remote]:
    """With two instances, of ``a`` at 3 and of ``b`` at 4, and a set at 10."""
    with remote() as driver:
        for number, name in ((3, "a"), (4, "b")):
            (tmp_path / name).mkdir()
            driver(f"inotify({number})")
            driver(f"watch({number}, {str(tmp_path / name)!r}, 0x100)")
        driver("epoll(10)")
        yield driver


def targets(directory: Path, fd: int = 10) -> list[tuple[Any, ...]]:
    """For each entry: number, toff, data, the process and descriptor that it leads to, saved."""
    (row,) = (row for row in shown(directory)["files"] if row["fds"][0]["fd"] == fd)
    return sorted(
        (
            t["tfd"],
            t["toff"],
            t["data"],
            t["target"]["pid"],
            t["target"]["fd"],
            t["target"]["saved"],
        )
        for t in row["targets"]
    )


def wakes(driver: Remote, set_: int, directory: Path) -> list[list[int]]:
    """What the set reports after a change in a directory."""
    (directory / os.urandom(4).hex()).touch()
    found: list[list[int]] = driver(f"ready({set_})")
    return found


def test_plain(watcher: Remote, tmp_path: Path) -> None:
    watcher(f"add(10, 3, {IN}, 0xfedcba9876543210)")
    watcher(f"add(10, 4, {IN | ET}, 4)")
    before = watcher.marks(10)
    save(watcher, tmp_path / "saved")
    pid = watcher.pid
    assert targets(tmp_path / "saved") == [
        (3, 0, 0xFEDCBA9876543210, pid, 3, True), (4, 0, 4, pid, 4, True)
    ]  # fmt: skip
    with restored(tmp_path / "saved") as again:
        assert again.marks(10) == before
        assert wakes(again, 10, tmp_path / "a") == [[IN, 0xFEDCBA9876543210]]
        again("events(3)")
        assert wakes(again, 10, tmp_path / "b") == [[IN, 4]]
        assert again("ready(10, 0)") == []  # EPOLLET


def test_a_number_that_is_closed(watcher: Remote, tmp_path: Path) -> None:
    """The entry lives on while the file is open under another number."""
    watcher("os.dup2(3, 20)")
    watcher(f"add(10, 20, {IN}, 1)")
    watcher("os.close(20)")
    before = watcher.marks(10)
    save(watcher, tmp_path / "saved")
    assert targets(tmp_path / "saved") == [(20, 0, 1, watcher.pid, 3, True)]
    with restored(tmp_path / "saved") as again:
        assert again.marks(10) == before
        assert 20 not in again("descriptors()")
        assert wakes(again, 10, tmp_path / "a") == [[IN, 1]]


def test_a_number_that_is_another_file_s_by_now(watcher: Remote, tmp_path: Path) -> None:
    watcher("os.dup2(3, 20)")
    watcher(f"add(10, 20, {IN}, 1)")
    watcher("os.dup2(4, 20)")
    before = watcher.marks(10)
    save(watcher, tmp_path / "saved")
    assert targets(tmp_path / "saved") == [(20, 0, 1, watcher.pid, 3, True)]
    with restored(tmp_path / "saved") as again:
        assert again.marks(10) == before
        assert again.marks(20) == again.marks(4)
        assert wakes(again, 10, tmp_path / "a") == [[IN, 1]]
        again("events(3)")
        (tmp_path / "b" / "new").touch()
        assert again("ready(10, 0.2)") == []


def test_several_entries_with_one_number(watcher: Remote, tmp_path: Path) -> None:
    """Only toff says which is which."""
    for data, fd in enumerate((3, 4)):
        watcher(f"os.dup2({fd}, 20)")
        watcher(f"add(10, 20, {IN}, {data})")
    watcher("os.dup2(10, 20)")  # the number is even the set's own by now
    before = watcher.marks(10)
    assert len(before) == 2
    save(watcher, tmp_path / "saved")
    found = targets(tmp_path / "saved")
    assert {(tfd, data, fd) for tfd, _, data, _, fd, _ in found} == {(20, 0, 3), (20, 1, 4)}
    assert sorted(toff for _, toff, *_ in found) == [0, 1]
    with restored(tmp_path / "saved") as again:
        assert again.marks(10) == before
        assert wakes(again, 10, tmp_path / "b") == [[IN, 1]]
        again("events(4)")
        assert wakes(again, 20, tmp_path / "a") == [[IN, 0]]


def test_sets_of_sets(watcher: Remote, tmp_path: Path) -> None:
    watcher("epoll(11)")
    watcher(f"add(11, 3, {IN}, 3)")
    watcher(f"add(10, 11, {IN}, 11)")
    before = watcher.marks(10), watcher.marks(11)
    save(watcher, tmp_path / "saved")
    with restored(tmp_path / "saved") as again:
        assert (again.marks(10), again.marks(11)) == before
        assert wakes(again, 10, tmp_path / "a") == [[IN, 11]]


def test_event_bits(watcher: Remote, tmp_path: Path) -> None:
    """An entry with EPOLLONESHOT that has fired stays silent; EPOLLEXCLUSIVE can only be added."""
    watcher(f"add(10, 3, {IN | ONESHOT}, 3)")
    watcher(f"add(10, 4, {IN | EXCLUSIVE}, 4)")
    wakes(watcher, 10, tmp_path / "a")
    watcher("events(3)")
    before = watcher.marks(10)
    assert any(f"events: {ONESHOT:8x} " in line for line in before)
    save(watcher, tmp_path / "saved")
    with restored(tmp_path / "saved") as again:
        lines = again.marks(10)
        assert [line for line in lines if "tfd:        4" in line] == [
            line for line in before if "tfd:        4" in line
        ]
        (tmp_path / "a" / "new").touch()
        assert again("ready(10, 0.2)") == []
        assert wakes(again, 10, tmp_path / "b") == [[IN, 4]]


def test_a_target_that_only_another_process_has(watcher: Remote, tmp_path: Path) -> None:
    """It is named, and what cannot be restored is reported."""
    read, _ = watcher("os.pipe()")
    child = watcher(
        "(lambda pid: pid or (os.dup2(3, 30), os.close(10), select.select([], [], [])))(os.fork())"
    )
    try:
        watcher(f"add(10, 3, {IN}, 3)")
        watcher(f"add(10, {read}, {IN}, 5)")
        watcher(f"add(10, 4, {IN}, 4)")
        watcher("os.close(3)")
        save(watcher, tmp_path / "saved")
    finally:
        os.kill(child, 9)
        watcher(f"os.waitpid({child}, 0)")
    found = {row[0]: row[3:] for row in targets(tmp_path / "saved")}
    assert found[4] == (watcher.pid, 4, True)
    assert found[3][0] == child
    assert found[3][1] in (3, 30)
    assert not found[3][2]
    assert found[read] == (watcher.pid, read, False)
    text = guest("show", tmp_path / "saved").stdout
    assert f"process {child}, descriptor" in text
    with restored(tmp_path / "saved") as again:
        assert len(again.marks(10)) == 1
        assert "entry 3 of the set (anon_inode:inotify) is not restored" in again.stderr
        assert f"entry {read} of the set (pipe:[" in again.stderr
