"""What happens to a file in the moment after its mark, before the server has heard of the mark.

Each operation is made on the host; a watcher of the mount and a native one must see the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fsd.linux.syscalls import RENAME_EXCHANGE, renameat2
from guest_tools.watcher import notify
from harness.mounts import Mount, mounted, wait_until
from protocol.inotify import parse_events
from protocol.masks import Mask, describe

WATCHED = int(Mask.MODIFY | Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF)
DONT_FOLLOW = 0x0200_0000
Make = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("new-marks")


@pytest.fixture(scope="module")
def share(base: Path) -> Iterator[Mount]:
    for name in ("source", "mount", "outside"):
        (base / name).mkdir()
    with mounted(base / "source", base / "mount") as share:
        yield share


def exchange(one: Path, other: Path) -> None:
    renameat2(-1, os.fsencode(one), -1, os.fsencode(other), RENAME_EXCHANGE)


def file(path: Path) -> None:
    path.write_text("x")


def symlink(path: Path) -> None:
    path.symlink_to("nowhere")


class Place:
    """A directory of its own for one operation: the marked ``f`` with another link ``h``; ``t`` and
    ``g`` beside it; another directory of the share, and one outside.
    """

    def __init__(self, base: Path, name: str, make: Make, links: str) -> None:
        self.name = name
        self.make = make
        self.here = base / "source" / name
        self.there = self.here / "there"
        self.outside = base / "outside" / name
        for directory in (self.here, self.there, self.outside):
            directory.mkdir()
            make(directory / "t")
            make(directory / "g")
        self.f, self.g, self.t = (self.here / n for n in "fgt")
        make(self.f)
        self.link = getattr(self, links or "here") / "h"
        if links:
            os.link(self.f, self.link, follow_symlinks=False)


def replaced_twice(place: Place) -> None:
    os.rename(place.t, place.f)
    os.rename(place.g, place.f)


def made_again(place: Place) -> None:
    place.f.unlink()
    place.make(place.f)


def over_and_back(place: Place) -> None:
    os.rename(place.f, place.g)
    os.rename(place.g, place.f)


def over_held_open(place: Place) -> None:
    """It ends when the file is closed: the test waits for that."""
    fd = os.open(place.f, os.O_PATH | os.O_NOFOLLOW)
    os.rename(place.t, place.f)
    time.sleep(0.2)
    os.close(fd)


def link_and_unlink(place: Place) -> None:
    os.link(place.f, place.outside / "new", follow_symlinks=False)
    (place.outside / "new").unlink()


OPERATIONS: dict[str, tuple[Callable[[Place], None], str]] = {
    "over, held open": (over_held_open, ""),
    "nothing": (lambda p: None, ""),
    "over": (lambda p: os.rename(p.t, p.f), ""),
    "over from there": (lambda p: os.rename(p.there / "t", p.f), ""),
    "over from outside": (lambda p: os.rename(p.outside / "t", p.f), ""),
    "over, linked here": (lambda p: os.rename(p.t, p.f), "here"),
    "over, linked outside": (lambda p: os.rename(p.t, p.f), "outside"),
    "over from outside, linked outside": (lambda p: os.rename(p.outside / "t", p.f), "outside"),
    "over, twice": (replaced_twice, ""),
    "unlink": (lambda p: p.f.unlink(), ""),
    "unlink, linked outside": (lambda p: p.f.unlink(), "outside"),
    "made again": (made_again, ""),
    "move": (lambda p: os.rename(p.f, p.here / "new"), ""),
    "move over": (lambda p: os.rename(p.f, p.g), ""),
    "move there": (lambda p: os.rename(p.f, p.there / "new"), ""),
    "move over there": (lambda p: os.rename(p.f, p.there / "g"), ""),
    "move outside": (lambda p: os.rename(p.f, p.outside / "new"), ""),
    "over and back": (over_and_back, ""),
    "exchange": (lambda p: exchange(p.f, p.g), ""),
    "exchange, named second": (lambda p: exchange(p.g, p.f), ""),
    "exchange there": (lambda p: exchange(p.f, p.there / "g"), ""),
    "exchange there, named second": (lambda p: exchange(p.there / "g", p.f), ""),
    "exchange outside": (lambda p: exchange(p.f, p.outside / "g"), ""),
    "exchange outside, named second": (lambda p: exchange(p.outside / "g", p.f), ""),
    "link here": (lambda p: os.link(p.f, p.here / "new", follow_symlinks=False), ""),
    "link there": (lambda p: os.link(p.f, p.there / "new", follow_symlinks=False), ""),
    "link outside": (lambda p: os.link(p.f, p.outside / "new", follow_symlinks=False), ""),
    "link and unlink": (link_and_unlink, ""),
    "unlink the link here": (lambda p: p.link.unlink(), "here"),
    "unlink the link there": (lambda p: p.link.unlink(), "there"),
    "unlink the link outside": (lambda p: p.link.unlink(), "outside"),
    "over the link here": (lambda p: os.rename(p.t, p.link), "here"),
    "over the link outside": (lambda p: os.rename(p.outside / "t", p.link), "outside"),
    "move of the link": (lambda p: os.rename(p.link, p.here / "new"), "here"),
    "chown": (lambda p: os.lchown(p.f, os.geteuid(), -1), ""),
    "chown of the link": (lambda p: os.lchown(p.link, os.geteuid(), -1), "outside"),
}


class Watcher:
    """One side's marks, and what each has brought."""

    def __init__(self) -> None:
        self.fd = notify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
        self._marks: dict[int, str] = {}
        self.seen: dict[str, list[str]] = {}

    def mark(self, path: Path, what: str) -> None:
        self._marks[notify.add_watch(self.fd, str(path), WATCHED | DONT_FOLLOW)] = what
        self.seen[what] = []

    def read(self) -> dict[str, list[str]]:
        """All so far, without the repeats that the kernel may merge."""
        with suppress(BlockingIOError):
            for event in parse_events(os.read(self.fd, 1 << 20)):
                seen, text = self.seen[self._marks[event.wd]], describe(event.mask)
                if seen[-1:] != [text]:
                    seen.append(text)
        return self.seen


@pytest.fixture
def sides() -> Iterator[tuple[Watcher, Watcher]]:
    both = Watcher(), Watcher()
    yield both
    for side in both:
        os.close(side.fd)


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("make", [file, symlink])
def test_what_follows_a_mark_is_delivered(
    base: Path, share: Mount, sides: tuple[Watcher, Watcher], make: Make, gap: float
) -> None:
    """However soon it follows."""
    places = {
        what: Place(base, f"{make.__name__} {gap} {what}", make, links)
        for what, (_, links) in OPERATIONS.items()
    }
    time.sleep(0.2)  # a change from before the mark is none of its watcher's
    native, ours = sides
    for what, (operate, _) in OPERATIONS.items():
        place = places[what]
        native.mark(place.f, what)
        ours.mark(share.mountpoint / place.name / "f", what)
        time.sleep(gap)
        operate(place)
    try:
        wait_until(lambda: native.read() == ours.read(), 10, "equal streams")
        time.sleep(0.3)
        assert native.read() == ours.read()
    except AssertionError as error:
        for what, seen in native.seen.items():
            if seen != ours.seen[what]:
                error.add_note(f"{what}: natively {seen}, on the mount {ours.seen[what]}")
        raise
