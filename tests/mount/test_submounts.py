"""What the host mounts below a share, and what it puts in a file's place, on a real mount."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from guest_tools.watcher import notify
from harness.mounts import Mount, wait_until
from protocol.inotify import parse_events
from protocol.masks import SELF, STRUCTURE, describe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts take root")

REPLACE = """
import os, sys, time
os.chdir(sys.argv[1])
number = 0
while not os.path.exists("stop"):
    number += 1
    with open("new", "w") as file:
        file.write(str(number))
    os.rename("new", "f")
"""


@pytest.fixture
def small(share: Mount) -> Iterator[Path]:
    """A file system of its own in the share: on the host."""
    path = share.source / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=False, capture_output=True)


def test_programs_open_a_file_that_is_replaced_all_the_while(share: Mount) -> None:
    """As natively: each finds the file that is there, or was a moment ago."""
    path = share.mountpoint / "f"
    (share.source / "f").write_text("0")
    command = [sys.executable, "-c", REPLACE, str(share.source)]
    with subprocess.Popen(command) as replacing:
        wait_until(lambda: (share.source / "f").read_text() not in ("", "0"), 30)
        try:
            until = time.monotonic() + 1
            opened, last = 0, 0
            while time.monotonic() < until or not opened:
                number = int(path.read_text())
                assert number >= last
                opened, last = opened + 1, number
                os.stat(path)
                os.chmod(path, 0o644)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT))
        finally:
            (share.source / "stop").touch()
    assert replacing.returncode == 0


def test_the_host_unmounts_what_was_seen(share: Mount, small: Path) -> None:
    (small / "d").mkdir()
    (small / "d/f").write_text("text")
    there = share.mountpoint / "small"
    assert [path.name for path in there.rglob("*")] == ["d", "f"]
    assert (there / "d/f").read_text() == "text"
    assert os.statvfs(there).f_blocks == os.statvfs(small).f_blocks
    # At once, but for what the agent, or a look-up's event, may have open for a moment.
    wait_until(lambda: not subprocess.run(["umount", small], check=False).returncode, 10)
    assert os.listdir(there) == []


def test_a_read_only_mount_is_read_only(share: Mount, small: Path) -> None:
    (small / "f").write_text("text")
    file = share.mountpoint / "small/f"
    file.write_text("other")
    remount: list[str | Path] = [
        "mount",
        "-o",
        "remount,bind,ro",
        small,
    ]  # the server closes after the program
    wait_until(lambda: not subprocess.run(remount, check=False).returncode, 10, "the remount")
    for change in (
        lambda: file.write_text("x"), lambda: file.unlink(), lambda: file.chmod(0o600),
        lambda: os.utime(file), lambda: (file.parent / "d").mkdir(),
        lambda: file.rename(file.parent / "g"),
    ):  # fmt: skip
        with pytest.raises(OSError, match="Read-only") as error:
            change()
        assert error.value.errno == errno.EROFS
    assert file.read_text() == "other"


class Watcher:
    """An inotify instance of a program in the guest."""

    def __init__(self) -> None:
        self.fd = notify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
        self._paths: dict[int, str] = {}
        self.events: list[tuple[str, str, bytes]] = []

    def add(self, share: Mount, path: str) -> None:
        mask = int(STRUCTURE | SELF)
        self._paths[notify.add_watch(self.fd, str(share.mountpoint / path), mask)] = path

    def saw(self, *event: object) -> bool:
        with suppress(BlockingIOError):
            for raw in parse_events(os.read(self.fd, 1 << 16)):
                mask = describe(raw.mask)
                self.events.append((self._paths.get(raw.wd, "?"), mask, raw.name))
        return event in self.events

    def expect(self, *event: object) -> None:
        with suppress(AssertionError):
            wait_until(lambda: self.saw(*event), 30)
        assert event in self.events, (self.events, notify.fdinfo(self.fd))


def test_the_end_of_a_file_system_ends_its_watches(share: Mount, small: Path) -> None:
    """Natively IN_UNMOUNT and IN_IGNORED: no system call of a guest makes the former."""
    (small / "d").mkdir()
    watcher = Watcher()
    try:
        for path in ("", "small", "small/d"):
            watcher.add(share, path)
        (small / "d/x").mkdir()
        watcher.expect("small/d", "IN_CREATE|IN_ISDIR", b"x")
        wait_until(lambda: not subprocess.run(["umount", small], check=False).returncode, 10)
        for path in ("small", "small/d"):
            watcher.expect(path, "IN_IGNORED", b"")
            assert watcher.saw(path, "IN_DELETE_SELF", b"")
        watcher.add(share, "small")
        (small / "y").mkdir()
        watcher.expect("small", "IN_CREATE|IN_ISDIR", b"y")
        assert not [event for event in watcher.events if not event[0]]  # nothing left the root
    finally:
        os.close(watcher.fd)
