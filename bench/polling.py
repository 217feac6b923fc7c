"""Watchers that poll, as used without fsd: on the mount, with their default intervals."""

from __future__ import annotations

import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.mounts import Mount

from .usage import Usage

HERE = Path(__file__).parent
NODE_MODULES = HERE.parent / "tests" / "clients" / "node_modules"
FILES = 1000
SAMPLES = 12
PATIENCE = 30.0


@dataclass(frozen=True)
class Poller:
    """A program that prints READY, then "CLOCK_MONOTONIC-in-ns path" for each event."""

    name: str
    command: tuple[str, ...]
    needs: Path | str  # a file, or a program in PATH

    @property
    def is_there(self) -> bool:
        """Whether it can be run here."""
        needs = self.needs
        return needs.exists() if isinstance(needs, Path) else bool(shutil.which(needs))


POLLERS = [
    Poller(
        "chokidar, usePolling",
        ("node", str(HERE / "poll_chokidar.js"), str(NODE_MODULES / "chokidar")),
        NODE_MODULES / "chokidar",
    ),
    Poller(
        "watchdog, PollingObserver",
        (sys.executable, str(HERE / "poll_watchdog.py")),
        sys.executable,
    ),
]


def poll_latencies(poller: Poller, mount: Mount, notes: list[str]) -> list[float]:
    """Milliseconds from a host's write to the poller's event, with FILES files to poll."""
    if not poller.is_there:
        notes.append(f"{poller.name}: not measured, {poller.needs} is not there")
        return []
    host = mount.source / "polled"
    host.mkdir(exist_ok=True)
    for index in range(FILES):
        (host / f"p{index}").write_text("0\n")
    command = [*poller.command, str(mount.mountpoint / "polled")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            assert process.stdout is not None
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_collect, args=(process.stdout, lines), daemon=True).start()
            assert lines.get(timeout=PATIENCE) == "READY", f"{poller.name} did not start"
            begun, cpu = time.monotonic(), Usage(process.pid).ticks
            values = [_sample(host / f"p{index}", index, lines) for index in range(SAMPLES)]
            share = (Usage(process.pid).ticks - cpu) / (time.monotonic() - begun)
            notes.append(
                f"{poller.name}: {FILES} files, {share:.0%} of a core of its own while polling"
            )
            return values
        finally:
            process.kill()


def _collect(stdout: IO[str], lines: queue.Queue[str]) -> None:
    for line in stdout:
        lines.put(line.rstrip("\n"))


def _sample(path: Path, index: int, lines: queue.Queue[str]) -> float:
    time.sleep(random.Random(index).uniform(0.3, 1.0))  # at any phase of its interval
    start = time.monotonic_ns()
    with path.open("a") as file:
        file.write(f"{index} more\n")
    while True:
        when, _, name = lines.get(timeout=PATIENCE).partition(" ")
        if os.path.basename(name) == path.name and int(when) > start:
            return (int(when) - start) / 1e6
