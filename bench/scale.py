"""Time and memory of very many marks, guests and inodes, each at a tenth of the size and in full: a
cost that grows more than linearly shows as a larger cost of each.

The inodes and the guests are simulated in a process of their own, without a kernel's requests:

    python -m bench.scale inodes|guests COUNT FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsd.export.export import Export
from fsd.files.caller import Caller
from fsd.files.inode import Inode
from fsd.fuse.operations import Operations
from fsd.guests.guest import Guest, Observer
from harness.mounts import mounted
from protocol import frames
from protocol.masks import Mask

from .report import Report, median, number
from .usage import Usage
from .watching import served_tree

WATCHED, GUESTS, INODES = 100_000, 1_000, 1_000_000
MARKS_EACH, MARKED = 100, 10_000
"""Marks of each guest, and the directories that they are on."""
IN_A_FOLDER = 1_000
EVENTS = 20
"""How many events all guests get."""
CALLER = Caller(0, 0, 1)


def measure() -> Report:
    """Run it: some 8 minutes."""
    report = Report("scale")
    with _many_watches():
        rows = [*_watched(), *_inodes(report), *_guests()]
    heads = ["what", "count", "seconds", "us each", "MiB", "bytes each"]
    report.table("in full and a tenth of it", heads, rows)
    return report


def _row(what: str, count: int, seconds: float, memory: float | None = None) -> list[str]:
    row = [what, number(count), number(seconds), number(seconds / count * 1e6)]
    return row + (["", ""] if memory is None else [number(memory / 2**20), number(memory / count)])


@contextmanager
def _many_watches() -> Iterator[None]:
    """Room for the program's watches and the server's, which are of one user. Takes root."""
    limit = Path("/proc/sys/fs/inotify/max_user_watches")
    before = limit.read_text()
    limit.write_text(str(max(int(before), 4 * WATCHED)))
    try:
        yield
    finally:
        limit.write_text(before)


def _watched() -> Iterator[list[str]]:
    """A program watches that many directories of a mount."""
    for count in (WATCHED // 10, WATCHED):
        with served_tree(count) as served:
            before = _memory(served.processes())
            begun = time.monotonic()
            served.watch(count, timeout=600)
            yield _row(
                "directories watched: look-ups to host watches, server and agent",
                count,
                time.monotonic() - begun,
                _memory(served.processes()) - before,
            )
            begun = time.monotonic()
            served.state()
            yield _row("the same: status read", count, time.monotonic() - begun)


def _memory(processes: list[tuple[str, int]]) -> int:
    """Bytes of their own."""
    return 1024 * sum(Usage(pid).memory_kib for _, pid in processes)


def _inodes(report: Report) -> Iterator[list[str]]:
    """A guest looks up that many files, and forgets them; then the tree is mounted."""
    with tempfile.TemporaryDirectory() as scratch:
        source, mountpoint = Path(scratch, "source"), Path(scratch, "mount")
        source.mkdir()
        mountpoint.mkdir()
        for count in (INODES // 10, INODES):
            for folder in range(count // IN_A_FOLDER):
                _fill(source / f"d{folder}")
            found = _child("inodes", count, source)
            yield _row("inodes looked up", count, found["look-ups"], found["memory"])
            yield _row("inodes forgotten", count, found["forgets"], found["memory left"])
        begun = time.monotonic()
        with mounted(source, mountpoint):
            took = time.monotonic() - begun
        report.add("a tree of 1,000,000 files mounts", took, "s", goal=1.0)


def _fill(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir()
        fd = os.open(folder, os.O_RDONLY)
        for index in range(IN_A_FOLDER):
            os.mknod(f"f{index}", dir_fd=fd)
        os.close(fd)


def _guests() -> Iterator[list[str]]:
    """Simulated guests with marks, which all get the same events."""
    for count in (GUESTS // 10, GUESTS):
        with tempfile.TemporaryDirectory() as source:
            for index in range(MARKED):
                Path(source, f"d{index}").mkdir()
            found = _child("guests", count, Path(source))
        marks = count * MARKS_EACH
        yield _row("marks of guests", marks, found["marks"], found["memory"])
        yield _row("guests that get an event", count, found["event"])


def _child(what: str, count: int, source: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.scale", what, str(count), str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


# In a process of its own


def simulate_inodes(count: int, source: Path) -> dict[str, float]:
    """Look-ups and FORGETs of one guest, with an agent's work left out."""
    with _export(source) as export:
        operations = Operations(export, export.add_mount_guest("guest", is_local=False))
        hello = frames.Hello(frames.VERSION, frames.Role.REPLAYER, 0)
        operations.guest.connect(os.getpid(), hello)
        before = _own_memory()
        begun = time.process_time()
        given = array("Q")  # with objects of its own it would keep the arenas of those forgotten
        for folder in range(count // IN_A_FOLDER):
            above = operations.lookup(CALLER, 1, b"d%d" % folder).inode.nodeid
            given.append(above)
            for index in range(IN_A_FOLDER):
                given.append(operations.lookup(CALLER, above, b"f%d" % index).inode.nodeid)
            export.process(1 << 20)
        looked_up, peak = time.process_time(), _own_memory()
        for nodeid in given:
            operations.forget(nodeid, 1)
        forgotten = time.process_time()
        return {
            "look-ups": looked_up - begun,
            "memory": peak - before,
            "forgets": forgotten - looked_up,
            "memory left": _own_memory() - before,
        }


def simulate_guests(count: int, source: Path) -> dict[str, float]:
    """Observers with MARKS_EACH marks, and one directory that all of them watch."""
    with _export(source) as export:
        inodes = [export.fs.lookup(export.table.root, b"d%d" % n).inode for n in range(MARKED)]
        before = _own_memory()
        begun = time.process_time()
        guests: list[Observer] = [export.add_observer(f"guest{n}") for n in range(count)]
        for index, guest in enumerate(guests):
            _mark(export, guest, inodes, index)
        marking = time.process_time() - begun
        memory = _own_memory() - before
        times = []
        for event in range(EVENTS):
            (source / f"d0/e{event}").mkdir()
            begun = time.process_time()
            export.watcher.drain()
            while export.is_busy:
                export.process(1 << 20)
            got = [guest.take(1 << 20) for guest in guests]
            times.append(time.process_time() - begun)
            assert all(len(messages) == 1 for messages in got)
        return {"marks": marking, "memory": memory, "event": median(times)}


def _mark(export: Export, guest: Guest, inodes: list[Inode], index: int) -> None:
    for mark in range(MARKS_EACH):
        inode = inodes[(index * (MARKS_EACH - 1) + mark) % MARKED if mark else 0]
        export.update(guest, inode.key, int(Mask.CREATE | Mask.DELETE))


@contextmanager
def _export(source: Path) -> Iterator[Export]:
    export = Export(str(source), read_only=False, on_work=lambda: None)
    try:
        yield export
    finally:
        export.close()


def _own_memory() -> int:
    return Usage(os.getpid()).memory_kib * 1024


if __name__ == "__main__":
    simulate = {"inodes": simulate_inodes, "guests": simulate_guests}[sys.argv[1]]
    print(json.dumps(simulate(int(sys.argv[2]), Path(sys.argv[3]))))
