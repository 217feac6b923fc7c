"""The rows of ``bench local``: what a program does in a directory, and how it is timed.

Apart from the sides (sides.py), which know nothing of rows, and from the page.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .tree import fill

KIB, MIB = 1 << 10, 1 << 20
SMALL = 4 * KIB


@dataclass(frozen=True)
class Scale:
    """How much a row does."""

    directories: int = 50
    files_each: int = 40
    created: int = 500
    stream: int = 64 * MIB  # bytes
    random: int = 2000
    enough: float = 0.2  # seconds; a row is repeated until then: natively one run takes some ms
    settle: float = 8.0  # seconds of rest that are not measured
    rest: float = 5.0  # seconds that are

    @property
    def files(self) -> int:
        """In the tree."""
        return self.directories * self.files_each


QUICK = Scale(
    directories=3, files_each=5, created=5, stream=MIB, random=20, enough=0, settle=0.5, rest=0.5
)
"""For a test of the command: its figures mean nothing."""


@dataclass(frozen=True)
class Place:
    """Where a row runs: ``root`` is the mount, ``source`` the same directory on the host.

    ``origin`` is outside of both, and the same for all sides: what is unpacked and cloned.
    """

    root: Path
    source: Path
    origin: Path
    scale: Scale

    def files(self) -> list[Path]:
        """The tree's files: known, not read from the file system."""
        return tree_files(self.root, self.scale)

    def drop(self, fd: int) -> None:
        """Drop the pages of the mount, not those of the host: its page cache stays warm."""
        if self.root != self.source:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Row:
    """``run`` is timed, ``before`` is not; ``amount`` in ``unit`` is what one run does."""

    title: str
    unit: str
    amount: Callable[[Scale], float]
    run: Callable[[Place], object]
    before: Callable[[Place], object] = lambda place: None
    once: bool = False  # a second run would find the mount in another state
    data: bool = False  # file contents rather than names and attributes


def rate(row: Row, place: Place) -> float:
    """Units a second, of ``run`` alone."""
    runs, seconds = 0, 0.0
    while not runs or (seconds < place.scale.enough and not row.once):
        row.before(place)
        start = time.perf_counter()
        row.run(place)
        seconds += time.perf_counter() - start
        runs += 1
    return runs * row.amount(place.scale) / seconds


def fill_origin(origin: Path, scale: Scale) -> None:
    """The tree, a git repository of it, and its archive."""
    fill(origin, tree_files(origin, scale))


def fill_source(source: Path, origin: Path, scale: Scale) -> None:
    """A side's own copy of what the rows need."""
    shutil.copytree(origin / "tree", source / "tree", symlinks=True)
    (source / "stream").write_bytes(os.urandom(scale.stream))
    (source / "unpacked").mkdir()


def clean(source: Path) -> None:
    """What a round leaves, removed on the host, without a mount."""
    for name in ("unpacked", "cloned"):
        shutil.rmtree(source / name, ignore_errors=True)
    (source / "unpacked").mkdir()


def tree_files(root: Path, scale: Scale) -> list[Path]:
    """The paths of the tree's files below ``root``."""
    return [
        root / "tree" / f"d{directory}" / f"f{file}"
        for directory in range(scale.directories)
        for file in range(scale.files_each)
    ]


def stat_tree(place: Place) -> None:
    """stat every file."""
    for path in place.files():
        os.stat(path)


def find(place: Place) -> None:
    """find, with its usual options."""
    command = ["find", str(place.root / "tree"), "-type", "f"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def git_refresh(place: Place) -> None:
    """git status that may write its index: where the mount's inode numbers are others, it does."""
    _git("-C", str(place.root / "tree"), "status", "--porcelain")


def git_status(place: Place) -> None:
    """git status, which stats every file."""
    _git("--no-optional-locks", "-C", str(place.root / "tree"), "status", "--porcelain")


def git_clone(place: Place) -> None:
    """Clone the repository into the directory, by copying."""
    _git("clone", "-q", "--no-hardlinks", str(place.origin / "tree"), str(place.root / "cloned"))


def open_and_read(place: Place) -> None:
    """Read every file of the tree."""
    for path in place.files():
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, SMALL)
        os.close(fd)


def create_write_unlink(place: Place) -> None:
    """Make, write, close and remove a file, again and again."""
    block = bytes(SMALL)
    for index in range(place.scale.created):
        path = place.root / f"new{index}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, block)
        os.close(fd)
        os.unlink(path)


def untar(place: Place) -> None:
    """Unpack the archive."""
    archive, target = place.origin / "tree.tar", place.root / "unpacked"
    subprocess.run(["tar", "-xf", str(archive), "-C", str(target)], check=True)


def unpack(place: Place) -> None:
    """The same unless it has been done."""
    if not (place.root / "unpacked" / "tree").exists():
        untar(place)


def remove(place: Place) -> None:
    """rm -rf of what was unpacked."""
    subprocess.run(["rm", "-rf", str(place.root / "unpacked" / "tree")], check=True)


def drop_pages(place: Place) -> None:
    """Make the mount's kernel forget the content of the stream."""
    fd = os.open(place.root / "stream", os.O_RDONLY)
    place.drop(fd)
    os.close(fd)


def read_stream(block: int) -> Callable[[Place], None]:
    """Read the file from start to end."""

    def run(place: Place) -> None:
        buffer = bytearray(block)
        fd = os.open(place.root / "stream", os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)

    return run


def write_stream(block: int) -> Callable[[Place], None]:
    """Write it from start to end, over what it holds; close(2) is in the time."""

    def run(place: Place) -> None:
        data = bytes(block)
        fd = os.open(place.root / "stream", os.O_WRONLY)
        for _ in range(place.scale.stream // block):
            os.write(fd, data)
        os.close(fd)

    return run


@cache
def _offsets(scale: Scale) -> list[int]:
    dice = random.Random(1)
    return [dice.randrange(scale.stream // SMALL) * SMALL for _ in range(scale.random)]


def read_random(place: Place) -> None:
    """Read small blocks anywhere in it, without read-ahead."""
    buffer = [bytearray(SMALL)]
    fd = os.open(place.root / "stream", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for offset in _offsets(place.scale):
        os.preadv(fd, buffer, offset)
    os.close(fd)


def write_random(place: Place) -> None:
    """Write small blocks anywhere in it; close(2) is in the time."""
    data = bytes(SMALL)
    fd = os.open(place.root / "stream", os.O_WRONLY)
    for offset in _offsets(place.scale):
        os.pwrite(fd, data, offset)
    os.close(fd)


def _git(*arguments: str) -> None:
    """git without the user's and the machine's settings."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *arguments], stdout=subprocess.DEVNULL, env=environment, check=True)


def _names(title: str, run: Callable[[Place], object], **options: object) -> Row:
    return Row(title, "files/s", lambda scale: scale.files, run, **options)  # type: ignore[arg-type]


def _stream(title: str, run: Callable[[Place], object], before: Callable[[Place], object]) -> Row:
    return Row(title, "MB/s", lambda scale: scale.stream / 1e6, run, before, data=True)


def _blocks(title: str, run: Callable[[Place], object], before: Callable[[Place], object]) -> Row:
    return Row(title, "blocks/s", lambda scale: scale.random, run, before, data=True)


ROWS = {
    "stat-cold": _names("stat, fresh mount", stat_tree, once=True),
    "stat-warm": _names("stat again", stat_tree, before=stat_tree),
    "find": _names("find again", find, before=find),
    "git-status": _names("git status again", git_status, before=git_refresh),
    "open-read": _names("open, read, close", open_and_read, before=stat_tree, once=True),
    "read-128k": _stream("read 128 KiB blocks", read_stream(128 * KIB), drop_pages),
    "read-1m": _stream("read 1 MiB blocks", read_stream(MIB), drop_pages),
    "write-128k": _stream("write 128 KiB blocks", write_stream(128 * KIB), drop_pages),
    "write-1m": _stream("write 1 MiB blocks", write_stream(MIB), drop_pages),
    "read-random": _blocks("random 4 KiB reads", read_random, drop_pages),
    "write-random": _blocks("random 4 KiB writes", write_random, drop_pages),
    "create": Row(
        "create, write, unlink", "files/s", lambda scale: scale.created, create_write_unlink
    ),
    "untar": _names("untar", untar, once=True),
    "clone": _names("git clone", git_clone, once=True),
    "rm": _names("rm -rf", remove, before=unpack, once=True),
}
"""In the order in which they run: the first one needs the fresh mount, `rm` what `untar` makes."""
