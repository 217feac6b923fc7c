"""Measures one-way latency: from the host's call to the wake-up of an unmodified inotify program.

Native inotify on the source and on the mount take turns, each with a typical mask and with all
events, so that noise of the machine affects all alike. Pollers, which use a whole core, come last.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from harness.mounts import Mount, mounted
from protocol.masks import EVENTS, Mask

from .polling import POLLERS, poll_latencies
from .readers import Watching, reading
from .report import Report, number, percentile

TYPICAL = Mask.MODIFY | Mask.CLOSE_WRITE | Mask.CREATE
SAMPLES = 250  # of each lane
FILES = 16  # written in turn, so that their events cannot merge
PAUSE = (0.02, 0.05)  # seconds between two samples, so that they cannot queue up
TRANSPORTS = {"fsd": "devfuse", "fsd over libfuse": "libfuse"}
RARE_SAMPLES = 15
RARE_PAUSE = 1.3  # seconds; by then the agent has gone from its long poll to sleep


@dataclass
class Lane:
    """A directory with its own reader, and the samples made there: (name, kind, start in ns)."""

    title: str
    reader: Watching
    samples: list[tuple[str, Mask, int]] = field(default_factory=list)

    def write(self) -> None:
        """A host program opens an existing file, writes and closes it."""
        name = f"w{len(self.samples) // 2 % FILES}"
        fd = os.open(self.reader.host / name, os.O_WRONLY)
        start = time.monotonic_ns()
        os.write(fd, b"x")
        os.close(fd)
        self.samples.append((name, Mask.MODIFY, start))

    def create(self) -> None:
        """A host program makes a file."""
        name = f"c{len(self.samples)}"
        start = time.monotonic_ns()
        os.close(os.open(self.reader.host / name, os.O_WRONLY | os.O_CREAT))
        self.samples.append((name, Mask.CREATE, start))

    def latencies(self) -> dict[Mask, list[float]]:
        """Milliseconds by kind; asserts that every event arrived."""
        seen: dict[tuple[str, int], deque[int]] = {}
        for event in self.reader.finish():
            seen.setdefault((event.name, event.mask & int(EVENTS)), deque()).append(event.when)
        result: dict[Mask, list[float]] = {Mask.MODIFY: [], Mask.CREATE: []}
        for name, kind, start in self.samples:
            times = seen.get((name, int(kind)))
            assert times, f"{self.title}: {kind.name} of {name} did not arrive"
            result[kind].append((times.popleft() - start) / 1e6)
        return result


def measure() -> Report:
    """Run it: some 90 s."""
    report = Report("latency")
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        source = Path(scratch, "source")
        titles = [
            (f"{side}, {mask_name}{pace}", side, mask)
            for mask_name, mask in (("typical mask", TYPICAL), ("all events", EVENTS))
            for side in ("native", *TRANSPORTS)
            for pace in ("", ", after a rest")
        ]
        for index in range(len(titles)):
            directory = source / str(index)
            directory.mkdir(parents=True)
            for file in range(FILES):
                (directory / f"w{file}").touch()
        mounts: dict[str, Mount] = {}
        for side, transport in TRANSPORTS.items():
            mountpoint = Path(scratch, transport)
            mountpoint.mkdir()
            options = (f"--transport={transport}",)
            mounts[side] = stack.enter_context(mounted(source, mountpoint, *options))
        lanes: list[Lane] = []
        for index, (title, side, mask) in enumerate(titles):
            host = source / str(index)
            watched = mounts[side].mountpoint / str(index) if side in mounts else host
            reader = stack.enter_context(reading(host, watched, mask))
            lanes.append(Lane(title, reader))
            if side in mounts:
                mounts[side].wait_armed(watched, pid=reader.process.pid)
        run([lane for lane in lanes if "rest" not in lane.title], SAMPLES, 0.0)
        run([lane for lane in lanes if "rest" in lane.title], RARE_SAMPLES, RARE_PAUSE)
        for lane in lanes:
            kinds = lane.latencies()
            both = [value for values in kinds.values() for value in values]
            p50s = [number(percentile(kinds[kind], 0.5)) for kind in kinds]
            p50, p99 = percentile(both, 0.5), percentile(both, 0.99)
            p10 = percentile(both, 0.1)
            shown = [*p50s, number(p10), number(p50), number(p99), str(len(both))]
            rows.append([lane.title, *shown])
            if lane.title.startswith("fsd,"):
                for kind, values in kinds.items():
                    title = f"{kind.name}, {lane.title.removeprefix('fsd, ')}"
                    report.add(f"p50 {title}", percentile(values, 0.5), "ms", goal=1.0)
                    report.add(f"p99 {title}", percentile(values, 0.99), "ms")
        for poller in POLLERS:
            values = poll_latencies(poller, mounts["fsd"], report.notes)
            if values:
                p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
                p10 = percentile(values, 0.1)
                shown = ["-", number(p10), number(p50), number(p99), str(len(values))]
                rows.append([f"{poller.name}, on the mount", number(p50), *shown])
    heads = ["milliseconds", "MODIFY p50", "CREATE p50", "p10", "p50", "p99", "samples"]
    report.table("from the host's call to the program's wake-up", heads, rows)
    return report


def run(lanes: list[Lane], samples: int, rest: float) -> None:
    """Make the samples: the lanes in a new order each round, a write and a creation in turn."""
    dice = random.Random(1)
    for index in range(samples):
        for lane in dice.sample(lanes, len(lanes)):
            if lane.title.startswith("fsd"):
                time.sleep(rest)
            time.sleep(dice.uniform(*PAUSE))
            if index % 2:
                lane.create()
            else:
                lane.write()
