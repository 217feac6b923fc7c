"""File-system workloads in a guest: one program, standard library only.

Reads lines "WORKLOAD DIRECTORY" and answers each with the rate of that workload there.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable

DIRECTORIES, FILES_EACH = 20, 25
FILES = DIRECTORIES * FILES_EACH
CREATED = 150
STREAM = 128 << 20
BLOCK = 1 << 20
RANDOM = 800
SMALL = 4096


def tree(root: str) -> list[str]:
    """The paths of the tree's files: known, not read from the file system."""
    return [
        f"{root}/tree/d{directory}/f{file}"
        for directory in range(DIRECTORIES)
        for file in range(FILES_EACH)
    ]


def drop_caches() -> None:
    """Drop unused pages, names and attributes; dirty pages are written first."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def stat_tree(root: str) -> float:
    """stat every file."""
    for path in tree(root):
        os.stat(path)
    return FILES


def stat_again(root: str) -> float:
    """stat a few files that were just looked up, again and again."""
    paths = tree(root)[:20]
    for _ in range(20):
        for path in paths:
            os.stat(path)
    return 20 * 20


def find(root: str) -> float:
    """find, with its usual options."""
    command = ["find", f"{root}/tree", "-type", "f", "-size", "+0"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return FILES


def create_and_unlink(root: str) -> float:
    """Make, close and remove a file, again and again."""
    for index in range(CREATED):
        path = f"{root}/new{index}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
        os.unlink(path)
    return CREATED


def untar(root: str) -> float:
    """Unpack the tree once more."""
    subprocess.run(["tar", "-xf", f"{root}/tree.tar", "-C", f"{root}/unpacked"], check=True)
    return FILES


def git_status(root: str) -> float:
    """git status, which stats every file; it does not write its index."""
    command = ["/tmp/git/git", "--no-optional-locks", "-C", f"{root}/tree", "status", "--porcelain"]
    environment = {**os.environ, "LD_LIBRARY_PATH": "/tmp/git"}
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    return FILES


def write_stream(root: str) -> float:
    """Write a file from start to end."""
    block = bytes(BLOCK)
    fd = os.open(f"{root}/stream", os.O_WRONLY | os.O_CREAT)
    for _ in range(STREAM // BLOCK):
        os.write(fd, block)
    os.close(fd)
    return STREAM / 1e6


def read_stream(root: str) -> float:
    """Read a file from start to end."""
    buffer = bytearray(BLOCK)
    fd = os.open(f"{root}/stream", os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
    return STREAM / 1e6


def read_random(root: str) -> float:
    """Read small blocks anywhere in a file."""
    fd = os.open(f"{root}/stream", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    dice = random.Random(1)
    for _ in range(RANDOM):
        os.pread(fd, SMALL, dice.randrange(STREAM // SMALL) * SMALL)
    os.close(fd)
    return RANDOM


def write_random(root: str) -> float:
    """Write small blocks anywhere in a file."""
    fd = os.open(f"{root}/stream", os.O_WRONLY)
    dice = random.Random(2)
    block = bytes(SMALL)
    for _ in range(RANDOM):
        os.pwrite(fd, block, dice.randrange(STREAM // SMALL) * SMALL)
    os.close(fd)
    return RANDOM


WORKLOADS: dict[str, tuple[Callable[[str], float], str, bool]] = {
    "cold stat": (stat_tree, "files/s", True),
    "warm stat": (stat_again, "files/s", False),
    "find": (find, "files/s", True),
    "git status": (git_status, "files/s", True),
    "create, close, unlink": (create_and_unlink, "files/s", False),
    "untar": (untar, "files/s", False),
    "sequential write, 1 MiB": (write_stream, "MB/s", False),
    "sequential read, 1 MiB": (read_stream, "MB/s", True),
    "random read, 4 KiB": (read_random, "reads/s", True),
    "random write, 4 KiB": (write_random, "writes/s", False),
}
"""Title -> the work (it returns its amount), the unit, whether caches are dropped before."""


def main() -> None:
    """Until the input ends."""
    for line in sys.stdin:
        title, _, root = line.rstrip("\n").rpartition(" ")
        run, _unit, cold = WORKLOADS[title]
        if cold:
            drop_caches()
        elif run is stat_again:
            run(root)
        start = time.perf_counter()
        amount = run(root)
        rate = amount / (time.perf_counter() - start)
        if run is untar:
            subprocess.run(["rm", "-rf", f"{root}/unpacked/tree"], check=True)
        print(rate, flush=True)


if __name__ == "__main__":
    main()
