"""File-system workloads on fsd, bindfs, libfuse's passthrough_ll and the native directory.

Each side has a source directory of its own, and a fresh mount in each round; the sides take turns.
passthrough_ll runs with its default, which lets the kernel cache names and attributes for a second,
and with `cache=never`, which like fsd does not: then every look-up is a request.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from harness.mounts import mounted

from .others import bindfs, passthrough_ll, served_by
from .report import Report, median, number
from .tree import fill

ROUNDS = 3
DIRECTORIES, FILES_EACH = 40, 25
CREATED = 300
STREAM = 64 << 20
BLOCK = 1 << 20
RANDOM = 2000
SMALL = 4096


@dataclass(frozen=True)
class Workload:
    """A workload in a directory: ``units`` per run; ``unit`` is their name."""

    title: str
    run: Callable[[Path], object]
    units: float
    unit: str


def files(root: Path) -> list[Path]:
    """The names of the tree's files: known, not read from the file system."""
    return [
        root / "tree" / f"d{directory}" / f"f{file}"
        for directory in range(DIRECTORIES)
        for file in range(FILES_EACH)
    ]


def stat_tree(root: Path) -> None:
    """stat every file."""
    for path in files(root):
        os.stat(path)


def find(root: Path) -> None:
    """find, with its usual options."""
    subprocess.run(
        ["find", str(root / "tree"), "-type", "f"], stdout=subprocess.DEVNULL, check=True
    )


def create_and_unlink(root: Path) -> None:
    """Make, close and remove a file, again and again."""
    for index in range(CREATED):
        path = root / f"new{index}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
        os.unlink(path)


def untar(root: Path) -> None:
    """Unpack the tree once more."""
    command = ["tar", "-xf", str(root / "tree.tar"), "-C", str(root / "unpacked")]
    subprocess.run(command, check=True)


def git_status(root: Path) -> None:
    """git status, which stats every file; it does not write its index."""
    command = ["git", "--no-optional-locks", "-C", str(root / "tree"), "status", "--porcelain"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def write_stream(root: Path) -> None:
    """Write a file from start to end."""
    block = os.urandom(BLOCK)
    fd = os.open(root / "stream", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range(STREAM // BLOCK):
        os.write(fd, block)
    os.close(fd)


def read_stream(root: Path) -> None:
    """Read it again, bypassing the cache of the mount."""
    fd = _uncached(root, os.O_RDONLY)
    while os.read(fd, BLOCK):
        pass
    os.close(fd)


def read_random(root: Path) -> None:
    """Read small blocks anywhere in it."""
    fd = _uncached(root, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    dice = random.Random(1)
    for _ in range(RANDOM):
        os.pread(fd, SMALL, dice.randrange(STREAM // SMALL) * SMALL)
    os.close(fd)


def write_random(root: Path) -> None:
    """Write small blocks anywhere in it."""
    fd = _uncached(root, os.O_WRONLY)
    dice = random.Random(2)
    block = os.urandom(SMALL)
    for _ in range(RANDOM):
        os.pwrite(fd, block, dice.randrange(STREAM // SMALL) * SMALL)
    os.close(fd)


def _uncached(root: Path, flags: int) -> int:
    fd = os.open(root / "stream", flags)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


_FILES = DIRECTORIES * FILES_EACH
WORKLOADS = [
    Workload("stat a tree, fresh mount", stat_tree, _FILES, "files/s"),
    Workload("stat it again", stat_tree, _FILES, "files/s"),
    Workload("find", find, _FILES, "files/s"),
    Workload("git status", git_status, _FILES, "files/s"),
    Workload("untar", untar, _FILES, "files/s"),
    Workload("create, close, unlink", create_and_unlink, CREATED, "files/s"),
    Workload("write 1 MiB blocks", write_stream, STREAM / 1e6, "MB/s"),
    Workload("read 1 MiB blocks", read_stream, STREAM / 1e6, "MB/s"),
    Workload("read 4 KiB, random", read_random, RANDOM, "reads/s"),
    Workload("write 4 KiB, random", write_random, RANDOM, "writes/s"),
]


def measure() -> Report:
    """Run it: some 90 s."""
    report = Report("workloads")
    with tempfile.TemporaryDirectory() as scratch:
        sides = _sides(Path(scratch), report.notes)
        rates: dict[str, dict[str, list[float]]] = {
            workload.title: {name: [] for name in sides} for workload in WORKLOADS
        }
        for _ in range(ROUNDS):
            for name, side in sides.items():
                with side() as root:
                    for workload in WORKLOADS:
                        rates[workload.title][name].append(_rate(workload, root))
                    shutil.rmtree(root / "unpacked")
                    (root / "unpacked").mkdir()
    rows = []
    for workload in WORKLOADS:
        medians = {name: median(values) for name, values in rates[workload.title].items()}
        rows.append([f"{workload.title}, {workload.unit}", *map(number, medians.values())])
        report.add(f"{workload.title}, fsd", medians["fsd"], workload.unit)
    report.table(f"medians of {ROUNDS}; more is better", ["", *sides], rows)
    return report


def _rate(workload: Workload, root: Path) -> float:
    start = time.perf_counter()
    workload.run(root)
    return workload.units / (time.perf_counter() - start)


Side = Callable[[], AbstractContextManager[Path]]


def _sides(scratch: Path, notes: list[str]) -> dict[str, Side]:
    """Each side as a function that gives a directory to work in."""

    def places(name: str) -> tuple[Path, Path]:
        source, mountpoint = scratch / name, scratch / f"{name}-mount"
        fill(source, files(source))
        mountpoint.mkdir()
        return source, mountpoint

    def of_fsd(source: Path, mountpoint: Path, transport: str) -> Side:
        @contextmanager
        def side() -> Iterator[Path]:
            with mounted(source, mountpoint, f"--transport={transport}"):
                yield mountpoint

        return side

    def of_other(command: list[str], mountpoint: Path) -> Side:
        @contextmanager
        def side() -> Iterator[Path]:
            with served_by(command, mountpoint):
                yield mountpoint

        return side

    native, _ = places("native")
    sides: dict[str, Side] = {"native": lambda: nullcontext(native)}
    for name, transport in (("fsd", "devfuse"), ("libfuse", "libfuse")):
        sides[name] = of_fsd(*places(name), transport)
    source, mountpoint = places("bindfs")
    if command := bindfs(source, mountpoint):
        sides["bindfs"] = of_other(command, mountpoint)
    else:
        notes.append("bindfs is not there")
    notes.append("fsd: over /dev/fuse; libfuse: fsd with --transport=libfuse")
    notes.append("ll: libfuse's passthrough_ll, which caches for 1 s; ll-0: with cache=never")
    for name, cache in (("ll", ""), ("ll-0", ",cache=never")):
        source, mountpoint = places(name)
        command = [str(passthrough_ll()), "-f", "-o", f"source={source}{cache}", str(mountpoint)]
        sides[name] = of_other(command, mountpoint)
    return sides
