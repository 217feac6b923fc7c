"""Change files in HOST and show what a stock inotifywait on MOUNT, its guest side, prints for it.

Usage: demo.py HOST MOUNT (script/demo makes both). Ends with 1 if an event did not arrive.
"""

from __future__ import annotations

import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

PATIENCE = 5.0  # seconds that an event may take before it counts as lost
EVENTS = "create,modify,attrib,close_write,move,delete"


@dataclass(frozen=True)
class Line:
    """A line that inotifywait printed, and when we read it (CLOCK_MONOTONIC, ns)."""

    when: int
    event: str
    path: str


@dataclass(frozen=True)
class Step:
    """A change on the host; ``last`` is the last event (and its path) that it should cause."""

    what: str
    change: Callable[[], object]
    last: tuple[str, str]


def steps(host: Path) -> list[Step]:
    """What the demo does; a step a line, as one would type it in a shell."""
    notes, moved, new, app = host / "notes.txt", host / "src/notes.txt", host / "new", "src/app.js"

    def append() -> None:
        with notes.open("a") as file:
            file.write("more\n")

    def save_as_editors_do() -> None:
        draft = host / "src/.app.js.swp"
        draft.write_text('console.log("saved");\n')
        draft.replace(host / app)

    return [
        Step(
            "echo hello > notes.txt",
            lambda: notes.write_text("hello\n"),
            ("CLOSE_WRITE,CLOSE", "notes.txt"),
        ),
        Step("echo more >> notes.txt", append, ("CLOSE_WRITE,CLOSE", "notes.txt")),
        Step("chmod 600 notes.txt", lambda: notes.chmod(0o600), ("ATTRIB", "notes.txt")),
        Step("mv notes.txt src/", lambda: notes.rename(moved), ("MOVED_TO", "src/notes.txt")),
        Step("save src/app.js (draft, then rename)", save_as_editors_do, ("MOVED_TO", app)),
        Step("mkdir new", new.mkdir, ("CREATE,ISDIR", "new")),
        Step("rmdir new", new.rmdir, ("DELETE,ISDIR", "new")),
        Step("rm src/notes.txt", moved.unlink, ("DELETE", "src/notes.txt")),
    ]


def read_lines(stdout: IO[str], mount: Path, lines: queue.Queue[Line]) -> None:
    """Put each line with its time; a thread of its own, so that times are those of arrival."""
    for text in stdout:
        when = time.monotonic_ns()
        event, _, path = text.rstrip("\n").partition("|")
        lines.put(Line(when, event, Path(path).relative_to(mount).as_posix()))


def run_step(step: Step, lines: queue.Queue[Line]) -> tuple[int, list[Line]]:
    """Make the change; its start, and the lines up to its last event, or none after PATIENCE."""
    start = time.monotonic_ns()
    step.change()
    seen: list[Line] = []
    while not seen or (seen[-1].event, seen[-1].path) != step.last:
        try:
            seen.append(lines.get(timeout=PATIENCE))
        except queue.Empty:
            break
    return start, seen


def main() -> int:
    """Run the demo on the two directories that the command line names."""
    host, mount = (Path(argument) for argument in sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is reached
    console = Console()
    table = Table(title="changed on the host -> printed by inotifywait in the mount")
    table.add_column("on the host")
    table.add_column("event in the mount", style="green")
    table.add_column("path")
    table.add_column("after", justify="right")

    command = ["inotifywait", "-m", "-r", "-e", EVENTS, "--format", "%e|%w%f", str(mount)]
    watcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert watcher.stdout is not None
    assert watcher.stderr is not None
    lost = 0
    latencies: list[float] = []
    try:
        # From this line of inotifywait on, no change may be missed.
        if not any("Watches established" in text for text in watcher.stderr):
            console.print(f"[red]{' '.join(command)} ended without watching")
            return 1
        lines: queue.Queue[Line] = queue.Queue()
        threading.Thread(
            target=read_lines, args=(watcher.stdout, mount, lines), daemon=True
        ).start()
        for step in steps(host):
            start, seen = run_step(step, lines)
            what = step.what
            for line in seen:
                latencies.append((line.when - start) / 1e6)
                table.add_row(what, line.event, line.path, f"{latencies[-1]:.1f} ms")
                what = ""
            if not seen or (seen[-1].event, seen[-1].path) != step.last:
                lost += 1
                table.add_row(what, f"[red]{step.last[0]} did not come", step.last[1], "")
            table.add_section()
    finally:
        watcher.terminate()
        watcher.wait()
    console.print(table)
    if lost:
        console.print(f"[red]{lost} of {len(steps(host))} changes did not arrive in {PATIENCE} s")
        return 1
    console.print(
        f"every change arrived: median {statistics.median(latencies):.1f} ms, "
        f"worst {max(latencies):.1f} ms from the host's call to inotifywait's line",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
