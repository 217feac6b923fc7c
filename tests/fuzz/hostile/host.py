"""The host's side: a user who changes the share while guests work in it.

Beacons are what the well-behaved guest waits for: files in its directory whose names are the time.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .guest import NAMES, Journal

BEACON = 0.05
"""Seconds between beacons."""
PAUSE = 0.002
"""Seconds between the host's changes."""
ROOM = 0.4
"""Part of the file system that stays free: else everything would soon be ENOSPC."""
_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


class HostUser:
    """Changes the share at random. The share is its root directory: no link leads out."""

    share = Path("/")
    volume = share / "volume"

    def __init__(self, outside: Path, rng: random.Random, journal: Journal) -> None:
        """``outside`` is where links shall lead, as the server would see it outside its sandbox."""
        self.outside, self.rng, self.journal = outside, rng, journal
        self.is_mounted = False
        self.counts: dict[str, int] = {}
        self.stuck = 0
        """Times that the mount below the share could not be taken away: something holds it."""
        self._acts: list[tuple[float, Callable[[], None]]] = [
            (10, self.write), (6, self.append), (6, self.rename), (6, self.delete),
            (3, self.mkdir), (2, self.fifo), (2, self.symlink), (2, self.swap), (2, self.chmod),
            (2, self.link), (0.3, self.volume_changes), (0.2, self.burst), (0.1, self.deep),
            (0.3, self.tidy),
        ]  # fmt: skip

    def run(self, until: float) -> None:
        """Act until then, then take the mount away."""
        weights = [weight for weight, _ in self._acts]
        acts = [act for _, act in self._acts]
        beacon = time.monotonic()
        while (now := time.monotonic()) < until:
            if now >= beacon:
                beacon = now + BEACON
                self.beacon()
            (act,) = self.rng.choices(acts, weights)
            with suppress(OSError):  # another was quicker, or it is full
                act()
            self.counts[act.__name__] = self.counts.get(act.__name__, 0) + 1
            self.journal(now, time.monotonic(), f"host {act.__name__}")
            time.sleep(PAUSE)
        if self.is_mounted:
            self.unmount()

    def beacon(self) -> None:
        """A file in the well-behaved guest's directory; the one before it goes."""
        directory = self.share / "neighbour"
        with suppress(OSError):
            for old in directory.glob("at-*"):
                old.unlink()
            (directory / f"at-{time.monotonic_ns()}").touch()

    def some(self) -> str:
        """A path of the kind that guests use."""
        parts = [self.rng.choice(NAMES) for _ in range(self.rng.choice((1, 1, 2, 3)))]
        return os.fsdecode(b"/".join((os.fsencode(self.share), *parts)))

    # What it does

    def write(self) -> None:
        fd = os.open(self.some(), os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(b"host" * self.rng.randrange(1000))

    def append(self) -> None:
        fd = os.open(self.some(), os.O_APPEND | os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(fd, "ab") as file:
            file.write(b"more")

    def rename(self) -> None:
        os.rename(self.some(), self.some())

    def delete(self) -> None:
        path = self.some()
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.unlink(path)

    def mkdir(self) -> None:
        os.mkdir(self.some())

    def fifo(self) -> None:
        os.mkfifo(self.some())

    def symlink(self) -> None:
        os.symlink(
            self.rng.choice((os.fspath(self.outside), "../outside/secret", "n1")), self.some()
        )

    def swap(self) -> None:
        """A directory, and a link out of the share, in turns at one place: for races."""
        place = self.share / "swap"
        for _ in range(self.rng.randrange(1, 20)):
            if place.is_symlink():
                place.unlink()
                place.mkdir()
                (place / "secret").touch()
            else:
                if place.is_dir():
                    shutil.rmtree(place)
                elif place.exists():
                    place.unlink()
                place.symlink_to(self.outside)

    def chmod(self) -> None:
        os.chmod(self.some(), self.rng.choice((0, 0o600, 0o777)))

    def link(self) -> None:
        os.link(self.some(), self.some(), follow_symlinks=False)

    def volume_changes(self) -> None:
        """A tmpfs comes below the share, or goes."""
        if self.is_mounted:
            self.unmount()
            return
        self.volume.mkdir(exist_ok=True)
        options = b"size=16m,nr_inodes=2000"
        if _libc.mount(b"fuzz", os.fsencode(self.volume), b"tmpfs", 0, options) == 0:
            self.is_mounted = True
            (self.volume / "n1").write_bytes(b"volume")

    def unmount(self) -> None:
        if _libc.umount2(os.fsencode(self.volume), 0) != 0:
            self.stuck += 1
            _libc.umount2(os.fsencode(self.volume), _MNT_DETACH)
        self.is_mounted = False

    def burst(self) -> None:
        """Some thousand events at once."""
        directory = Path(self.some())
        for number in range(self.rng.randrange(500)):
            path = directory / f"b{number}"
            path.touch()
            path.unlink()

    def deep(self) -> None:
        """A tree deeper than a path can name."""
        fd = os.open(self.share, os.O_RDONLY)
        try:
            for _ in range(self.rng.randrange(100, 1500)):
                with suppress(FileExistsError):
                    os.mkdir("d", dir_fd=fd)
                inner = os.open("d", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = inner
        finally:
            os.close(fd)

    def tidy(self) -> None:
        """Delete trees while the file system is too full."""
        left = os.statvfs(self.share)
        if left.f_bavail > ROOM * left.f_blocks and left.f_favail > ROOM * left.f_files:
            return
        for name in os.listdir(self.share):
            if name not in ("neighbour", "volume"):
                with suppress(OSError):
                    self.remove(name)

    def remove(self, name: str) -> None:
        """A tree of any depth: what is a directory in it comes to the top first."""
        todo = [name]
        while todo:
            path = self.share / todo[-1]
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                todo.pop()
                continue
            directories = [
                entry for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)
            ]
            for number, entry in enumerate(directories):
                aside = f"tidy-{len(todo)}-{number}"
                os.rename(entry.path, self.share / aside)
                todo.append(aside)
            if not directories:
                for inner in os.scandir(path):
                    os.unlink(inner.path)
                path.rmdir()
                todo.remove(path.name)
