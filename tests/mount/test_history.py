"""A guest's own requests and what the host has just done are one history: what is in use
keeps its name, and of a name that both have changed the last event agrees with what is there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from guest_tools.watcher import notify
from harness.mounts import Mount, mounted, wait_until
from protocol.inotify import parse_events
from protocol.masks import STRUCTURE, Mask
from tests.mount.observing import status

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
NAMES = [f"n{i}" for i in range(8)]
NATURAL = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EPERM,
    errno.ELOOP,
}  # fmt: skip
"""What an operation meets where another has just done something with the same names."""


@pytest.fixture(params=["devfuse", "libfuse"])
def share(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mount]:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, f"--transport={request.param}") as share:
        yield share


class Told(NamedTuple):
    """An event of the watched directory."""

    mask: Mask
    name: str

    @property
    def comes(self) -> bool:
        return bool(self.mask & (Mask.CREATE | Mask.MOVED_TO))


class Watch:
    """An inotify watch on one directory, armed by the server."""

    def __init__(self, share: Mount, path: Path) -> None:
        self._fd = notify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
        notify.add_watch(self._fd, str(path), int(STRUCTURE))
        share.wait_armed(path, pid=os.getpid(), timeout=30)
        self._share = share
        self.events: list[Told] = []

    def close(self) -> None:
        os.close(self._fd)

    def read(self) -> list[Told]:
        """All events up to now."""
        with suppress(BlockingIOError):
            while data := os.read(self._fd, 1 << 16):
                for event in parse_events(data):
                    assert not event.mask & Mask.Q_OVERFLOW
                    self.events.append(Told(Mask(event.mask), os.fsdecode(event.name)))
        return self.events

    def settled(self) -> list[Told]:
        """The events since the last time, once all that the host has done is delivered."""
        self._share.source.joinpath("d/end").touch()
        self._share.source.joinpath("d/end").unlink()
        end = Told(Mask.DELETE, "end")
        wait_until(lambda: end in self.read(), 60, "the last event")
        reported, self.events = self.events, []
        return [event for event in reported if event.name != "end"]


@contextmanager
def watching(share: Mount) -> Iterator[Watch]:
    (share.source / "d").mkdir()
    watch = Watch(share, share.mountpoint / "d")
    try:
        yield watch
    finally:
        watch.close()


# -- what is in use --------------------------------------------------------------------------------


def test_a_working_directory_that_the_host_has_just_made(share: Mount) -> None:
    """Before its CREATE is delivered, and meanwhile."""
    before = Path.cwd()
    with watching(share) as watch:
        try:
            for i in range(60):
                (share.source / f"d/{i}").mkdir()
                os.chdir(share.mountpoint / f"d/{i}")
                for _ in range(20):
                    assert Path.cwd() == share.mountpoint / f"d/{i}"
                    time.sleep(0.0002)
        finally:
            os.chdir(before)
        made = [event.name for event in watch.settled()]
    assert made == [str(i) for i in range(60)]


@root_only
def test_what_is_mounted_on_a_directory_that_the_host_has_just_made(share: Mount) -> None:
    """mount(2) asks for nothing after the look-up."""
    libc = ctypes.CDLL(None, use_errno=True)
    points = [share.mountpoint / f"d/{i}" for i in range(30)]
    with watching(share) as watch:
        for point in points:
            (share.source / "d" / point.name).mkdir()
            assert not libc.mount(b"none", bytes(point), b"tmpfs", 0, None)
        reported = [event.name for event in watch.settled()]
        held = [point for point in points if point in map(Path, mounts())]
        for point in held:
            assert not libc.umount2(bytes(point), 0)
    assert held == points
    assert reported == [point.name for point in points]


def mounts() -> list[str]:
    """Where something is mounted."""
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def test_an_open_file_that_the_host_has_just_made_or_renamed(share: Mount) -> None:
    files = {}
    with watching(share) as watch:
        for i in range(100):
            name = share.source / f"d/{i}"
            if i % 2:
                name.touch()
            else:
                name.with_suffix(".tmp").touch()
                name.with_suffix(".tmp").rename(name)
            guest = share.mountpoint / f"d/{i}"
            files[guest] = os.open(guest, os.O_RDONLY)
        reported = watch.settled()
    names = {guest: Path(os.readlink(f"/proc/self/fd/{fd}")) for guest, fd in files.items()}
    for fd in files.values():
        os.close(fd)
    assert names == {guest: guest for guest in files}
    assert Counter(event.comes for event in reported) == {True: 150, False: 50}


def test_a_program_that_the_host_has_just_replaced(share: Mount) -> None:
    with watching(share):
        for i in range(5):
            shutil.copy("/bin/sleep", share.source / "new")
            (share.source / "new").rename(share.source / "d/program")
            guest = share.mountpoint / "d/program"
            with subprocess.Popen([guest, "60"]) as running:
                time.sleep(0.2)
                name = os.readlink(f"/proc/{running.pid}/exe")
                running.kill()
            assert name == str(guest), f"of program {i}"


def test_a_file_used_by_its_name_alone_before_its_create(share: Mount) -> None:
    """What no request shows. A test that fails here means that README's row has to go."""
    gone, i = False, 0
    with watching(share):
        while not gone and i < 1000:  # of 100 some 10, and few on a busy machine
            i += 1
            (share.source / f"d/{i}").touch()
            fd = os.open(share.mountpoint / f"d/{i}", os.O_PATH)
            time.sleep(0.02)
            gone = os.readlink(f"/proc/self/fd/{fd}").endswith(" (deleted)")
            os.close(fd)
    assert gone


# -- names that both change ------------------------------------------------------------------------


class Case(NamedTuple):
    """What the host does with the name x in the end, then the guest; and the events of x."""

    before: Callable[[], object]
    host: Callable[[], object]
    guest: Callable[[], object]
    events: list[Mask]


def made(*names: str) -> None:
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def nothing() -> None:
    """There is nothing to prepare."""


def cases(d: str) -> dict[str, Case]:
    """By name; the guest is in its directory, the host's is ``d``."""
    x, other = f"{d}/x", f"{d}/other"
    anew = [Mask.DELETE, Mask.CREATE]
    return {
        "create": Case(lambda: made(x), lambda: os.unlink(x), lambda: made("x"), anew),
        "mkdir": Case(lambda: os.mkdir(x), lambda: os.rmdir(x), lambda: os.mkdir("x"), anew),
        "symlink": Case(
            lambda: os.mkdir(x), lambda: os.rmdir(x), lambda: os.symlink("t", "x"), anew
        ),
        "mknod": Case(lambda: made(x), lambda: os.unlink(x), lambda: os.mkfifo("x"), anew),
        "link": Case(
            lambda: made(x, other),
            lambda: os.unlink(x),
            lambda: os.link("other", "x"),
            anew,
        ),
        "unlink": Case(
            nothing, lambda: made(x), lambda: os.unlink("x"), [Mask.CREATE, Mask.DELETE]
        ),
        "rmdir": Case(
            nothing, lambda: os.mkdir(x), lambda: os.rmdir("x"), [Mask.CREATE, Mask.DELETE]
        ),
        "rename": Case(
            nothing,
            lambda: made(x),
            lambda: os.rename("x", "y"),
            [Mask.CREATE, Mask.MOVED_FROM],
        ),
        "rename to it": Case(
            lambda: made(x, other),
            lambda: os.unlink(x),
            lambda: os.rename("other", "x"),
            [Mask.DELETE, Mask.MOVED_TO],
        ),
        "rename over it": Case(
            lambda: made(other),
            lambda: made(x),
            lambda: os.rename("other", "x"),
            [Mask.CREATE, Mask.MOVED_TO],
        ),
    }


def test_the_guest_changes_what_the_host_has_just_changed(share: Mount) -> None:
    """At the end of a storm, relative to the directory, so that no look-up of another name comes
    before the kernel's lock.
    """
    before = Path.cwd()
    bad = {}
    with watching(share) as watch:
        os.chdir(share.mountpoint / "d")
        try:
            for what, case in cases(str(share.source / "d")).items():
                case.before()
                watch.settled()
                for i in range(300):
                    (share.source / f"d/s{i}").touch()
                case.host()
                case.guest()
                reported = watch.settled()
                found = [event.mask & STRUCTURE for event in reported if event.name == "x"]
                if found != case.events:
                    bad[what] = found
                for path in (share.source / "d").iterdir():
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        finally:
            os.chdir(before)
    assert not bad


def test_a_storm_in_which_both_change_the_same_names(share: Mount) -> None:
    """What a watcher believes in the end is what is there. Of some 5,000 calls, one or the
    other fails with ESTALE (README), as a call is begun anew no more than once.
    """
    strange: Counter[str] = Counter()
    seldom: list[OSError] = []
    sides = [share.source / "d"] + [share.mountpoint / "d"] * 2
    end = time.monotonic() + 5

    def run(directory: Path, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            try:
                change(chance, str(directory))
            except OSError as error:
                if error.errno == errno.ESTALE and directory != sides[0]:
                    seldom.append(error)
                elif error.errno not in NATURAL:
                    strange[f"{directory.parent.name}: {error.strerror}"] += 1
            time.sleep(chance.random() * 0.002)

    with watching(share) as watch:
        threads = [threading.Thread(target=run, args=(d, i)) for i, d in enumerate(sides)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reported = watch.settled()
        believed: dict[str, bool] = {}
        for event in reported:
            believed.pop(event.name, None)
            if event.comes:
                believed[event.name] = bool(event.mask & Mask.ISDIR)
        there = {
            path.name: path.is_dir() and not path.is_symlink()
            for path in (share.source / "d").iterdir()
        }
    assert not strange
    assert len(seldom) <= 3, seldom
    wrong = {name for name, _ in believed.items() ^ there.items()}
    assert not wrong, {name: [e.mask for e in reported if e.name == name][-9:] for name in wrong}
    state = next(g for g in status(share.mountpoint)["guests"] if g["kind"] == "mount")
    assert state["waited"], "nothing was put to the test"


def change(chance: random.Random, d: str) -> None:
    """Change something by chance. Raises OSError."""
    a, b = (f"{d}/{chance.choice(NAMES)}" for _ in range(2))
    flags = os.O_CREAT | os.O_WRONLY | chance.choice((0, os.O_EXCL))
    calls: list[Callable[[], object]] = [
        lambda: os.close(os.open(a, flags, 0o644)),
        lambda: os.unlink(a),
        lambda: os.mkdir(a),
        lambda: os.rmdir(a),
        lambda: os.rename(a, b),
        lambda: os.link(a, b, follow_symlinks=False),
        lambda: os.symlink("t", a),
        lambda: os.lstat(a),
    ]
    chance.choice(calls)()
