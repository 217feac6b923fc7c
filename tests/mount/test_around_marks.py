"""Around a new mark everything is as natively: the same steps in a directory of this machine and
through a mount give the same events, whatever was looked at, or happened, just before.

Each case is given the watched directory and the one in which the host makes its changes, which is
the same one natively.
"""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsd.pacing.windows import KEEP
from harness.mounts import Mount, mounted
from protocol.inotify import parse_events
from protocol.masks import Mask, names

Case = Callable[[Path, Path], list[str]]
NAMES = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO
ALL, ONESHOT, EXCL_UNLINK = 0xFFF, 0x8000_0000, 0x0400_0000
_libc = ctypes.CDLL(None, use_errno=True)
QUIET = 0.4
"""Seconds without an event after which no more are expected."""
BUSY = """
import os, sys, time
print("looking", flush=True)
while True:
    os.stat(sys.argv[1])
    time.sleep(0.02)
"""


class Watch:
    """An inotify instance of this process."""

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._labels: dict[int, str] = {}

    def add(self, path: Path | str, mask: int, label: str = "") -> None:
        """Set a mark."""
        wd = _libc.inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(mask))
        if wd < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
        self._labels[wd] = label

    def read(self, until: str = "", quiet: float = QUIET) -> list[str]:
        """Events until one of that text has come, or until none comes for a while."""
        events: list[str] = []
        while True:
            wait = 20.0 if until and until not in events else quiet
            if (until and until in events) or not select.select([self._fd], [], [], wait)[0]:
                return events
            for raw in parse_events(os.read(self._fd, 1 << 20)):
                label = self._labels.get(raw.wd, "")
                kinds = "|".join(names(raw.mask)).upper() or hex(raw.mask)
                events.append(f"{label} {kinds} {os.fsdecode(raw.name)}".strip())

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


@contextmanager
def watch() -> Iterator[Watch]:
    instance = Watch()
    try:
        yield instance
    finally:
        instance.close()


@pytest.fixture(scope="module", params=["devfuse", "libfuse"])
def share(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    top = tmp_path_factory.mktemp("marks")
    source, mountpoint = top / "source", top / "mount"
    source.mkdir()
    mountpoint.mkdir()
    # With --cache=coherent some events of the last millisecond are (test_coherent.py).
    with mounted(source, mountpoint, f"--transport={request.param}", "--cache=never") as mount:
        yield mount


def compare(case: Case, share: Mount, tmp_path: Path) -> list[str]:
    """Both give the same events, which are returned. At the same time, as most of it is waiting."""
    name = f"{case.__name__}{time.monotonic_ns()}"
    native = tmp_path / name
    native.mkdir()
    (share.source / name).mkdir()
    with ThreadPoolExecutor(1) as other:
        natively = other.submit(case, native, native)
        events = case(share.mountpoint / name, share.source / name)
        expected = natively.result()
    assert events == expected
    return expected


# What was before


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2])
def test_events_before_the_mark_are_not_delivered(
    share: Mount, tmp_path: Path, delay: float
) -> None:
    """The process has looked at the directory before, and it was changed since."""

    def case(watched: Path, changed: Path) -> list[str]:
        os.listdir(watched)
        time.sleep(0.3)
        os.stat(watched)
        (changed / "old").touch()
        time.sleep(delay)
        with watch() as marks:
            marks.add(watched, NAMES)
            early = marks.read()
            (changed / "new").touch()
            return early + marks.read(until="CREATE new")

    assert compare(case, share, tmp_path) == ["CREATE new"]


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.5])
def test_nor_where_another_process_is_always_looking(
    share: Mount, tmp_path: Path, delay: float
) -> None:
    def case(watched: Path, changed: Path) -> list[str]:
        with subprocess.Popen(
            [sys.executable, "-c", BUSY, watched], stdout=subprocess.PIPE
        ) as busy:
            assert busy.stdout is not None
            assert busy.stdout.readline() == b"looking\n"
            try:
                time.sleep(0.3)
                (changed / "old").touch()
                time.sleep(delay)
                with watch() as marks:
                    marks.add(watched, NAMES)
                    early = marks.read()
                    (changed / "new").touch()
                    return early + marks.read(until="CREATE new")
            finally:
                busy.kill()

    assert compare(case, share, tmp_path) == ["CREATE new"]


@pytest.mark.parametrize("beside", ["watcher", "watcher that has ended", "reader that has ended"])
@pytest.mark.parametrize("delay", [0.0, 0.002, 0.02])
def test_nor_beside_another_program(
    share: Mount, tmp_path: Path, beside: str, delay: float
) -> None:
    """The change is to be delivered to the other one's mark, or would be if it had set one; it does
    not reach the new mark.
    """

    def case(watched: Path, changed: Path) -> list[str]:
        events = []
        (changed / "log").touch()
        for _ in range(5):
            time.sleep(0.1)
            other = Watch()
            if "reader" in beside:
                subprocess.run(["ls", watched], stdout=subprocess.DEVNULL, check=True)
            else:
                other.add(watched, NAMES)
                if watched.is_relative_to(share.mountpoint):
                    share.wait_armed(watched)
                time.sleep(0.1)
            if "ended" in beside:
                other.close()
            (changed / "log").unlink()
            (changed / "log").touch()
            time.sleep(delay)
            with watch() as marks:
                marks.add(watched, NAMES | ONESHOT)
                events += marks.read(quiet=0.2)
            if "ended" not in beside:
                events += other.read(until="CREATE log")
                other.close()
        return events

    both = ["DELETE log", "CREATE log"] * 5
    assert compare(case, share, tmp_path) == ([] if "ended" in beside else both)


def test_nor_of_a_file(share: Mount, tmp_path: Path) -> None:
    """As of a program that reads what was reported to it, and watches it from then on."""

    def case(watched: Path, changed: Path) -> list[str]:
        events = []
        for number in range(5):
            os.stat(watched)
            (changed / f"file{number}").write_text("text")
            assert (watched / f"file{number}").read_text() == "text"
            with watch() as marks:
                marks.add(watched / f"file{number}", Mask.MODIFY | Mask.CLOSE_WRITE)
                events += marks.read()
        return events

    assert compare(case, share, tmp_path) == []


def test_what_comes_right_after_the_mark_is_delivered(share: Mount, tmp_path: Path) -> None:
    """The counterpart, after look-ups that were in vain."""

    def case(watched: Path, changed: Path) -> list[str]:
        events = []
        for number in range(10):
            (changed / str(number)).mkdir()
            os.listdir(watched / str(number))
            (changed / f"{number}/old").touch()
            time.sleep(0.003 * number)
            with watch() as marks:
                marks.add(watched / str(number), NAMES)
                (changed / f"{number}/new").touch()
                events += marks.read(until="CREATE new")
        return events

    assert compare(case, share, tmp_path) == ["CREATE new"] * 10


# Order


def test_a_directory_that_is_marked_when_it_is_heard_of(share: Mount, tmp_path: Path) -> None:
    """As recursive watchers do: what happens in it comes before what happens elsewhere later."""

    def case(watched: Path, changed: Path) -> list[str]:
        events = []
        for number in range(5):
            (changed / f"finished{number}").touch()
        time.sleep(0.3)
        with watch() as marks:
            marks.add(watched, NAMES, "top")
            time.sleep(0.3)
            for number in range(5):
                sub = f"sub{number}"
                (changed / sub).mkdir()
                events += marks.read(until=f"top CREATE|ISDIR {sub}")
                marks.add(watched / sub, NAMES, sub)
                (changed / sub / "a").touch()
                (changed / sub / "a").rename(changed / sub / "b")
                (changed / sub / "b").unlink()
                (changed / f"finished{number}").unlink()
                events += marks.read(until=f"top DELETE finished{number}")
        return events

    assert len(compare(case, share, tmp_path)) == 5 * 6


# Cut off


def test_a_storm_right_after_the_mark(share: Mount, tmp_path: Path) -> None:
    def case(watched: Path, changed: Path) -> list[str]:
        os.listdir(watched)
        with watch() as marks:
            marks.add(watched, Mask.DELETE)
            for number in range(6000):
                path = changed / str(number)
                path.write_text("1")
                path.unlink()
            return marks.read(until="DELETE 5999")

    assert len(compare(case, share, tmp_path)) == 6000


def test_a_directory_that_is_emptied_and_removed_right_after_its_mark(
    share: Mount, tmp_path: Path
) -> None:
    def case(watched: Path, changed: Path) -> list[str]:
        events = []
        for number in range(8):
            (changed / "d").mkdir()
            (changed / "d/x").touch()
            (changed / "d/y").touch()
            time.sleep(0.05)
            with watch() as marks:
                marks.add(watched / "d", ALL & ~(Mask.OPEN | Mask.ACCESS | Mask.CLOSE_NOWRITE))
                (changed / "d/x").unlink()
                (changed / "d/y").rename(changed / "y")
                time.sleep(0.002 * number)
                (changed / "d").rmdir()
                events += marks.read(until="IGNORED")
        return events

    assert len(compare(case, share, tmp_path)) == 8 * 4


# Never found


OPEN_BEFORE = {
    "for writing": os.O_WRONLY,
    "for reading": os.O_RDONLY,
    "a directory": os.O_RDONLY | os.O_DIRECTORY,
    "without a name": os.O_RDWR,
}


@pytest.mark.parametrize("how", OPEN_BEFORE)
def test_what_was_open_before_the_mark_has_a_close_only(
    share: Mount, tmp_path: Path, how: str
) -> None:
    """And what was not has its OPEN, also while the other is open."""

    def case(watched: Path, changed: Path) -> list[str]:
        path = changed / "f"
        path.mkdir() if "directory" in how else path.touch()
        fd = os.open(path, OPEN_BEFORE[how])
        with watch() as marks:
            excluding = EXCL_UNLINK if how == "without a name" else 0
            marks.add(watched, ALL | excluding)
            if excluding:
                path.unlink()
            else:
                os.close(os.open(path, OPEN_BEFORE[how]))
                (changed / "between").mkdir()  # else the kernel merges the two closes
            time.sleep(0.2)
            os.close(fd)
            time.sleep(0.2)
            (changed / "last").mkdir()
            return marks.read(until="CREATE|ISDIR last")

    events = compare(case, share, tmp_path)
    assert len(events) == (2 if how == "without a name" else 5)


def test_what_was_open_before_the_mark_is_written_without_a_name(
    share: Mount, tmp_path: Path
) -> None:
    """Its MODIFY is replayed by the name that it had, which the guest's kernel then knows again."""

    def case(watched: Path, changed: Path) -> list[str]:
        with open(changed / "f", "wb", buffering=0) as file, watch() as marks:
            marks.add(watched, ALL)
            time.sleep(0.2)
            (changed / "f").unlink()
            time.sleep(0.2)
            file.write(b"x")
            time.sleep(0.2)
            file.close()
            (changed / "last").mkdir()
            return marks.read(until="CREATE|ISDIR last")

    assert len(compare(case, share, tmp_path)) == 4


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY], ids=["for reading", "for writing"])
def test_a_marked_file_that_moves_into_sight_while_it_is_open(
    share: Mount, tmp_path: Path, flags: int, links: int
) -> None:
    """Its OPEN was the file's own; its CLOSE is reported by the new name, too."""

    def case(watched: Path, changed: Path) -> list[str]:
        for name in ("d", "away"):
            (changed / name).mkdir()
        (changed / "away/f").touch()
        if links > 1:
            (changed / "away/link").hardlink_to(changed / "away/f")
        with watch() as marks:
            marks.add(watched / "d", ALL, "d")
            marks.add(watched / "away/f", ALL, "f")
            time.sleep(0.2)
            fd = os.open(changed / "away/f", flags)
            time.sleep(0.2)
            (changed / "away/f").rename(changed / "d/g")
            time.sleep(0.2)
            os.close(fd)
            (changed / "d/last").mkdir()
            return marks.read(until="d CREATE|ISDIR last")

    events = compare(case, share, tmp_path)
    assert [event.split()[0] for event in events if "CLOSE" in event] == ["d", "f"]


def test_a_file_that_a_program_has_open_keeps_its_name(share: Mount) -> None:
    """What stands in for a file takes its name: then its CLOSE comes with an OPEN instead."""
    (share.source / "held").touch()
    with open(share.source / "held", "a") as file, open(share.mountpoint / "held") as ours:
        with watch() as marks:
            marks.add(share.mountpoint, Mask.OPEN | Mask.CLOSE_WRITE)
            time.sleep(0.2)
            file.close()
            assert marks.read(until="CLOSE_WRITE held") == ["OPEN held", "CLOSE_WRITE held"]
        assert os.readlink(f"/proc/self/fd/{ours.fileno()}") == str(share.mountpoint / "held")


@pytest.mark.parametrize("what", ["directory", "file", "file by path"])
def test_a_mark_set_by_a_descriptor_that_was_open_long_before(
    share: Mount, tmp_path: Path, what: str
) -> None:
    """There is no look-up by which the server could learn of it."""
    flags = os.O_PATH if "path" in what else os.O_RDONLY

    def case(watched: Path, changed: Path) -> list[str]:
        (changed / "d").mkdir()
        (changed / "d/file").write_text("text")
        fd = os.open(watched / ("d" if what == "directory" else "d/file"), flags)
        try:
            with open(changed / "d/file", "a") as file, watch() as marks:
                time.sleep(KEEP + 0.5)
                marks.add(f"/proc/self/fd/{fd}", Mask.CREATE | Mask.MODIFY)
                time.sleep(0.2)
                if what == "directory":
                    (changed / "d/new").touch()
                else:
                    file.write("more")
                    file.flush()
                return marks.read(until="CREATE new" if what == "directory" else "MODIFY")
        finally:
            os.close(fd)

    assert len(compare(case, share, tmp_path)) == 1


@pytest.mark.parametrize("life", [0.01, 0.03, 0.1])
def test_directories_that_do_not_live_long(share: Mount, tmp_path: Path, life: float) -> None:
    """Each is made under the same name, marked, changed and removed."""

    def case(watched: Path, changed: Path) -> list[str]:
        with watch() as marks:
            for number in range(15):
                (changed / "d").mkdir()
                marks.add(watched / "d", int(NAMES | Mask.DELETE_SELF), f"{number}")
                (changed / "d/x").touch()
                time.sleep(life)
                (changed / "d/x").unlink()
                (changed / "d").rmdir()
            return sorted(marks.read(until="14 IGNORED"))

    assert len(compare(case, share, tmp_path)) == 15 * 4
