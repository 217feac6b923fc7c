"""Measures sustained replay: from a burst of host operations until the mount's inotify reader has
the last event.

The same burst is also read natively: events lost or merged there are not the mount's fault.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from harness.mounts import Mount, mounted, wait_until
from protocol.masks import EVENTS, Mask

from .readers import Seen, reading
from .report import Report, median, number
from .usage import Usage

ROUNDS = 3
Burst = Callable[[Path, int], None]


def create(host: Path, count: int) -> None:
    """CREATE each."""
    for index in range(count):
        os.mknod(host / f"n{index}")


def modify(host: Path, count: int) -> None:
    """MODIFY each; the files exist."""
    for index in range(count):
        os.truncate(host / f"f{index}", 1)


def delete(host: Path, count: int) -> None:
    """DELETE each; the files exist."""
    for index in range(count):
        os.unlink(host / f"f{index}")


def mixed(host: Path, count: int) -> None:
    """CREATE, MODIFY, DELETE of files that exist for microseconds, like a compiler's."""
    for index in range(count // 3):
        path = host / f"m{index}"
        with path.open("w") as file:
            file.write("x")
        path.unlink()


def save(host: Path, count: int) -> None:
    """CREATE, MODIFY, CLOSE_WRITE, DELETE of files that exist for microseconds."""
    for index in range(count // 4):
        path = host / f"s{index}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x")
        os.close(fd)
        path.unlink()


def rewrite(host: Path, count: int) -> None:
    """MODIFY and CLOSE_WRITE each; the files exist."""
    for index in range(count // 2):
        fd = os.open(host / f"f{index}", os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)


def rename(host: Path, count: int) -> None:
    """MOVED_FROM and MOVED_TO each; the files exist."""
    for index in range(count // 2):
        (host / f"f{index}").rename(host / f"r{index}")


class Case(NamedTuple):
    """A burst of ``events`` events under a mask; ``files`` files exist before."""

    title: str
    burst: Burst
    mask: Mask
    events: int
    files: int


# Bursts stay below 16,384 events, the kernel's default of fs.inotify.max_queued_events.
NAMES = Mask.CREATE | Mask.DELETE | Mask.MODIFY
TYPICAL = NAMES | Mask.CLOSE_WRITE | Mask.MOVED_FROM | Mask.MOVED_TO
GOAL, GOAL_OF_ALL = 20_000.0, 10_000.0
CASES = [
    Case("CREATE", create, NAMES, 6000, 0),
    Case("MODIFY", modify, NAMES, 6000, 6000),
    Case("DELETE", delete, NAMES, 6000, 6000),
    Case("CREATE, MODIFY, DELETE mixed", mixed, NAMES, 6000, 0),
    Case("files saved, typical mask", save, TYPICAL, 6000, 0),
    Case("files rewritten, typical mask", rewrite, TYPICAL, 6000, 3000),
    Case("renames", rename, Mask.MOVED_FROM | Mask.MOVED_TO, 6000, 3000),
    Case("mixed, all events", mixed, EVENTS, 6000, 0),
]


class Result(NamedTuple):
    """One burst: when the host was done and when the reader had the last event, in seconds."""

    host: float
    reader: float
    cpu: float  # of server and agent, in seconds
    seen: list[Seen]


def measure() -> Report:
    """Run it: some 130 s."""
    report = Report("throughput")
    rows = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        sides = [
            stack.enter_context(_mounted(Path(scratch), name)) for name in ("devfuse", "libfuse")
        ]
        mount = sides[0]
        for index, case in enumerate(CASES):
            natives: list[Result] = []
            rounds: list[list[Result]] = [[] for _ in sides]
            for number_ in range(ROUNDS):
                natives.append(_round(case, mount, f"{index}.{number_}n", native=True))
                for side, results in zip(sides, rounds, strict=True):
                    results.append(_round(case, side, f"{index}.{number_}", native=False))
            mounts = rounds[0]
            rates = [median([len(r.seen) / r.reader for r in results]) for results in rounds]
            cpus = [median([r.cpu / len(r.seen) * 1e6 for r in results]) for results in rounds]
            native = median([len(result.seen) / result.reader for result in natives])
            host = median([len(result.seen) / result.host for result in mounts])
            pairs = zip(natives, mounts, strict=True)
            lost = sum(len(_kinds(one.seen) - _kinds(other.seen)) for one, other in pairs)
            values = (host, native, rates[0], cpus[0], rates[1], cpus[1])
            rows.append([case.title, *map(number, values), str(lost)])
            goal = GOAL_OF_ALL if case.mask == EVENTS else GOAL
            report.add(f"replayed, {case.title}", rates[0], "events/s", goal=goal, at_least=True)
        state = _state(mount)
    overflows = sum(guest["overflows"] for guest in state["guests"])
    overflows += state["counts"].get("overflows", 0)
    report.table(
        f"a burst, from its first call to the reader's last wake-up (medians of {ROUNDS})",
        ["burst", "host makes/s", "native/s", "fsd/s", "us CPU", "libfuse/s", "us CPU", "lost"],
        rows,
    )
    failed = sum(guest["failed"] for guest in state["guests"])
    report.notes.append(f"overflows: {overflows}, orders that failed: {failed}")
    return report


@contextmanager
def _mounted(scratch: Path, transport: str) -> Iterator[Mount]:
    source, mountpoint = scratch / f"source-{transport}", scratch / transport
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, f"--transport={transport}") as mount:
        yield mount


def _round(case: Case, mount: Mount, name: str, *, native: bool) -> Result:
    mask = case.mask | Mask.CREATE  # for ~end
    with _directory(mount, name, case.files) as host:
        watched = host if native else mount.mountpoint / name
        with reading(host, watched, mask) as reader:
            if not native:
                mount.wait_armed(watched, pid=reader.process.pid)
            cpu = _cpu(mount)
            start = time.monotonic_ns()
            case.burst(host, case.events)
            done = time.monotonic_ns()
            events = [event for event in reader.finish() if event.name != "~end"]
            cpu = _cpu(mount) - cpu
    seen = [event for event in events if event.mask & int(case.mask)]
    return Result((done - start) / 1e9, (seen[-1].when - start) / 1e9, cpu, seen)


def _kinds(events: list[Seen]) -> set[tuple[str, int]]:
    """Without counts, because merging repeats depends on how fast they are read."""
    return {(event.name, event.mask) for event in events}


def _cpu(mount: Mount) -> float:
    agent = _state(mount)["guests"][0]["agent_pid"]
    return sum(Usage(pid).seconds for pid in (mount.process.pid, agent))


@contextmanager
def _directory(mount: Mount, name: str, files: int) -> Iterator[Path]:
    """A new directory on the host; waits until the server is idle again."""
    host = mount.source / name
    host.mkdir()
    for index in range(files):
        (host / f"f{index}").write_text("some text")
    yield host
    wait_until(lambda: not _depth(mount), 30, "the queues are empty")


def _depth(mount: Mount) -> int:
    state = _state(mount)
    return int(state["backlog"] + sum(guest["depth"] for guest in state["guests"]))


def _state(mount: Mount) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((mount.mountpoint / ".fsd" / "status").read_text())
    return state
