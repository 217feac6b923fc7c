"""Measures one-way latency into a virtual machine: from the host's call to the wake-up of an
unmodified inotify program in a guest. For comparison: the guest's own inotify, and polling there.

The clocks of the two machines differ by an offset, and run at slightly different speeds. So before
each sample the host asks a program in the guest for its time. The answer was given between the
question and its arrival, which bounds the offset from both sides. The speeds come from a line
through the quickest answers; the offset is the middle of the interval that all bounds leave. Half
of that interval is the error of each figure (a note gives it); it is the same for all samples.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

from harness.guest_node import ENVIRONMENT, NODE, node_guest
from harness.vm import Guest, GuestProcess
from protocol.masks import EVENTS

from . import reader
from .latency import FILES, PAUSE, TYPICAL, Lane
from .polling import FILES as POLLED_FILES
from .polling import SAMPLES as POLLED_SAMPLES
from .readers import Seen
from .report import Report, number, percentile

SAMPLES = 250
SLICES = 10  # of the time; the quickest answer in each is used for the speeds
PATIENCE = 60.0
CLOCK = """
import sys, time
for line in sys.stdin:
    print(time.monotonic_ns(), flush=True)
"""
WRITER = f"""
import os, random, sys, time
dice = random.Random(1)
for index in range({SAMPLES}):
    time.sleep(dice.uniform(*{PAUSE}))
    name, flags = (f"c{{index}}", os.O_CREAT) if index % 2 else (f"w{{index // 2 % {FILES}}}", 0)
    start = time.monotonic_ns()
    fd = os.open(f"/tmp/own/{{name}}", os.O_WRONLY | flags)
    if not index % 2:
        start = time.monotonic_ns()
        os.write(fd, b"x")
    os.close(fd)
    print(name, 0x100 if index % 2 else 2, start)
os.mknod("/tmp/own/~end")
"""
"""Changes in the guest itself, like Lane's on the host."""
CHOKIDAR = """
const chokidar = require('/clients/node_modules/chokidar');
chokidar.watch('/mnt/polled', { usePolling: true, ignoreInitial: true })
  .on('ready', () => console.log('READY'))
  .on('change', (path) => console.log(`${process.hrtime.bigint()} ${path}`));
"""


class Clock:
    """Converts the guest's CLOCK_MONOTONIC to the host's. All times in ns."""

    def __init__(self, vm: Guest) -> None:
        self._program = vm.start(["python3", "-c", CLOCK])
        self._answers: list[tuple[int, int, int]] = []  # sent, the guest's time, received

    def ask(self) -> None:
        """Compare once."""
        sent = time.monotonic_ns()
        self._program.write(b"\n")
        guest_time = int(self._program.line())
        self._answers.append((sent, guest_time, time.monotonic_ns()))

    def line(self) -> tuple[float, float, float]:
        """(slope, offset, error): the host's time is the guest's * slope + offset, within error."""
        size = max(1, len(self._answers) // SLICES)
        slices = [self._answers[at : at + size] for at in range(0, len(self._answers), size)]
        quick = [min(part, key=lambda answer: answer[2] - answer[0]) for part in slices]
        slope, _ = linear_regression([a[1] for a in quick], [(a[0] + a[2]) / 2 for a in quick])
        lowest = max(sent - guest_time * slope for sent, guest_time, _ in self._answers)
        highest = min(received - guest_time * slope for _, guest_time, received in self._answers)
        return slope, (lowest + highest) / 2, abs(highest - lowest) / 2

    def to_host(self, guest_time: int) -> int:
        """The host's time at that moment."""
        slope, offset, _ = self.line()
        return round(guest_time * slope + offset)


@dataclass(frozen=True)
class GuestReader:
    """bench/reader.py in the guest."""

    host: Path
    process: GuestProcess
    clock: Clock | None = None
    """None: times stay the guest's"""

    def finish(self) -> list[Seen]:
        """All events that it saw, in order. Creates the file ~end in the host's directory."""
        if self.clock is not None:
            (self.host / "~end").touch()
        events = json.loads(self.process.wait(PATIENCE).stdout.partition("\n")[2])
        slope, offset, _ = self.clock.line() if self.clock is not None else (1, 0, 0)
        return [Seen(round(when * slope + offset), mask, name) for when, mask, name in events]


def measure() -> Report:
    """Run it: takes a minute or two."""
    report = Report("guest-latency")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fsd-bench-") as scratch:
        source = Path(scratch)
        for name in ("typical mask", "all events", "polled"):
            (source / name).mkdir()
        for index in range(POLLED_FILES):
            (source / "polled" / f"p{index}").write_text("0\n")
        with node_guest(source) as vm:
            clock = Clock(vm)
            agent = vm.start(["/fsd-guest.pyz", "agent", "/mnt"])
            agent.wait_output("ready", PATIENCE)
            lanes = []
            for name, mask in (("typical mask", TYPICAL), ("all events", EVENTS)):
                for index in range(FILES):
                    (source / name / f"w{index}").touch()
                process = _reader(vm, f"/mnt/{name}", int(mask))
                lanes.append(Lane(f"fsd, {name}", GuestReader(source / name, process, clock)))
            _wait_armed(vm, len(lanes))
            _sample(lanes, clock)
            for title, values in [(lane.title, _values(lane)) for lane in lanes]:
                rows.append(_row(title, values))
                report.add(f"p50 {title}", percentile(values, 0.5), "ms")
                report.add(f"p99 {title}", percentile(values, 0.99), "ms")
            rows.append(_row("the guest's own inotify, typical mask", _own(vm)))
            rows.append(
                _row(f"chokidar, usePolling, {POLLED_FILES} files", _polled(vm, source, clock))
            )
            slope, _, error = clock.line()
            report.notes.append(
                f"clocks: known to {error / 1e6:.2f} ms; the guest's runs "
                f"{(1 / slope - 1) * 1e6:+.0f} ppm"
            )
            report.notes.append(f"guest: {vm.release}, 1 processor, emulated (QEMU TCG)")
            vm.power_off()
    heads = ["milliseconds", "p10", "p50", "p99", "samples"]
    report.table("from the call to the wake-up of the program in the guest", heads, rows)
    return report


def _reader(vm: Guest, directory: str, mask: int) -> GuestProcess:
    code = Path(reader.__file__).read_text()
    process = vm.start(["python3", "-c", code, str(mask), directory])
    process.wait_output("READY", PATIENCE)
    return process


def _wait_armed(vm: Guest, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        marks = json.loads(vm.run(["/fsd-guest.pyz", "marks", "/mnt", "--json"]).stdout)
        if sum(mark["armed"] for mark in marks) >= count:
            return
    raise AssertionError("the marks did not reach the server")


def _sample(lanes: list[Lane], clock: Clock) -> None:
    dice = random.Random(1)
    for index in range(SAMPLES):
        for lane in dice.sample(lanes, len(lanes)):
            clock.ask()
            time.sleep(dice.uniform(*PAUSE))
            if index % 2:
                lane.create()
            else:
                lane.write()


def _values(lane: Lane) -> list[float]:
    return [value for values in lane.latencies().values() for value in values]


def _row(title: str, values: list[float]) -> list[str]:
    shown = [number(percentile(values, share)) for share in (0.1, 0.5, 0.99)]
    return [title, *shown, str(len(values))]


def _own(vm: Guest) -> list[float]:
    """The guest's own changes, on its own file system and clock."""
    vm.run(f"mkdir /tmp/own; for n in $(seq 0 {FILES - 1}); do : > /tmp/own/w$n; done")
    watcher = GuestReader(Path("/"), _reader(vm, "/tmp/own", int(TYPICAL)))
    made = vm.python(WRITER, timeout=PATIENCE).splitlines()
    seen: dict[tuple[str, int], list[int]] = {}
    for event in watcher.finish():
        seen.setdefault((event.name, event.mask), []).append(event.when)
    values = []
    for name, mask, start in (line.split() for line in made):
        values.append((seen[name, int(mask)].pop(0) - int(start)) / 1e6)
    return values


def _polled(vm: Guest, source: Path, clock: Clock) -> list[float]:
    """A poller in the guest, with its default interval."""
    program = vm.start([NODE, "-e", CHOKIDAR], env=ENVIRONMENT)
    assert program.line(PATIENCE) == "READY"
    dice = random.Random(1)
    samples = []
    for index in range(POLLED_SAMPLES):
        clock.ask()
        time.sleep(dice.uniform(0.3, 1.0))  # at any phase of its interval
        start = time.monotonic_ns()
        with (source / "polled" / f"p{index}").open("a") as file:
            file.write(f"{index} more\n")
        when, _, path = program.line(PATIENCE).partition(" ")
        assert path.endswith(f"/p{index}"), path
        samples.append((start, int(when)))
    program.signal()
    return [(clock.to_host(when) - start) / 1e6 for start, when in samples]
