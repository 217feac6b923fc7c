"""fanotify groups: marks on files, mounts and file systems."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .remote import Remote, remote, restored, save, shown

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="fanotify's marks take CAP_SYS_ADMIN")

NONBLOCK, CLASS_CONTENT, UNLIMITED_MARKS = 0x2, 0x4, 0x20
REPORT_DFID_NAME, REPORT_FID = 0xC00, 0x200
MARK_MOUNT, MARK_FILESYSTEM = 0x10, 0x100
IGNORED, SURVIVES, EVICTABLE, IGNORE = 0x20, 0x40, 0x200, 0x400
MODIFY, CREATE, OPEN, OPEN_PERM = 0x2, 0x100, 0x20, 0x1_0000
ON_CHILD, ON_DIR = 0x0800_0000, 0x4000_0000


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own: marks on all of it hear nobody else."""
    path = tmp_path / "top"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    try:
        (path / "directory").mkdir()
        (path / "file").touch()
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def watcher(top: Path) -> Iterator[Remote]:
    """Ends before the file system is unmounted."""
    with remote() as driver:
        yield driver


def test_marks_of_every_kind(watcher: Remote, top: Path, tmp_path: Path) -> None:
    flags = NONBLOCK | CLASS_CONTENT | UNLIMITED_MARKS
    watcher(f"fanotify(3, {flags}, os.O_RDWR | os.O_LARGEFILE)")
    watcher(f"fanotify(4, {REPORT_DFID_NAME | REPORT_FID})")
    file, directory, root = (repr(str(path)) for path in (top / "file", top / "directory", top))
    watcher(f"mark(3, 0, {MODIFY}, {file})")
    watcher(f"mark(3, {IGNORED | SURVIVES}, {OPEN}, {file})")
    watcher(f"mark(3, 0, {OPEN | ON_CHILD | ON_DIR}, {directory})")
    watcher(f"mark(3, {MARK_MOUNT}, {OPEN}, {root})")
    watcher(f"mark(4, 0, {CREATE | ON_DIR}, {directory})")
    watcher(f"mark(4, {EVICTABLE}, {MODIFY}, {file})")
    watcher(f"mark(4, {MARK_FILESYSTEM}, {MODIFY}, {root})")
    watcher(f"mark(4, {MARK_FILESYSTEM | IGNORE | SURVIVES}, {OPEN | ON_DIR}, {root})")
    before = watcher.marks(3), watcher.marks(4)
    assert [len(lines) for lines in before] == [4, 4]  # each with a line of the group itself
    assert save(watcher, tmp_path / "saved") == ""
    kinds = [[mark["on"] for mark in row["marks"]] for row in shown(tmp_path / "saved")["files"]]
    assert sorted(kinds[0]) == ["file", "file", "mount"]
    assert sorted(kinds[1]) == ["file", "file", "file system"]
    with restored(tmp_path / "saved") as again:
        assert "0 problems" in again.stderr
        assert (again.marks(3), again.marks(4)) == before
        assert again("fcntl.fcntl(3, fcntl.F_GETFL)") & os.O_NONBLOCK
        (top / "directory" / "new").touch()
        assert again("select.select([4], [], [], 10)[0]") == [4]


def test_marks_that_decide_are_not_restored(watcher: Remote, top: Path, tmp_path: Path) -> None:
    """The command itself could not be started: nobody would answer for it."""
    watcher(f"fanotify(3, {NONBLOCK | CLASS_CONTENT})")
    watcher(f"mark(3, 0, {OPEN_PERM}, {str(top / 'file')!r})")
    save(watcher, tmp_path / "saved")
    with restored(tmp_path / "saved") as again:
        assert len(again.marks(3)) == 1  # that of the group
        assert f"mark on {top}/file" in again.stderr
        assert "it decides on accesses" in again.stderr


def test_what_is_not_there_is_reported(watcher: Remote, top: Path, tmp_path: Path) -> None:
    watcher(f"fanotify(3, {NONBLOCK})")
    watcher(f"mark(3, 0, {MODIFY}, {str(top / 'file')!r})")
    watcher(f"mark(3, {MARK_MOUNT}, {OPEN}, {str(top)!r})")
    (top / "file").write_text("an event in the queue")
    said = save(watcher, tmp_path / "saved")
    assert "bytes of events are queued and not saved" in said
    watcher("os.close(3)")
    subprocess.run(["umount", top], check=True)
    try:
        with restored(tmp_path / "saved") as again:
            assert len(again.marks(3)) == 1
            assert f"mark on {top}/file" in again.stderr
            assert f"mark on mount {top}: it is not mounted" in again.stderr
            assert "bytes of events were queued, and are lost" in again.stderr
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "none", top], check=True)
