"""How long a program that reads in the mount again and again, and watches nothing, still sees what
the host has changed: with `fsd mount --cache=coherent`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fsd.export.stats import percentile
from harness.mounts import mounted

from .report import Report, number

SAMPLES = 200
PAUSE = 0.01
"""Seconds between two changes, in which the reader sleeps: the server has to be woken."""
LONGEST = 5.0
"""Seconds after which a change counts as never seen."""
GOAL = 1.0
"""Milliseconds in which a change is to be seen on an idle machine."""
Change = tuple[Callable[[int], object], Callable[[int], bool]]
"""Makes the change of that number on the host; whether the mount shows it."""


def prepare(host: Path) -> None:
    """Make the files that are changed."""
    (host / "file").write_bytes(bytes(4096))
    (host / "d").mkdir()
    for number_ in range(SAMPLES):
        (host / f"goes{number_}").write_bytes(b"")


def changes(host: Path, seen: Path, opened: int) -> dict[str, Change]:
    """What is measured. ``opened``: a descriptor of the file in the mount."""

    def write(number_: int) -> None:
        fd = os.open(host / "file", os.O_WRONLY)
        os.pwrite(fd, bytes([number_ % 251]), 0)
        os.close(fd)

    return {
        "size": (
            lambda n: os.truncate(host / "file", 4096 + n),
            lambda n: os.stat(seen / "file").st_size == 4096 + n,
        ),
        "mode": (
            lambda n: os.chmod(host / "file", 0o600 + n % 8),
            lambda n: os.stat(seen / "file").st_mode & 0o7 == n % 8,
        ),
        "data of an open file": (write, lambda n: os.pread(opened, 1, 0)[0] == n % 251),
        "a name comes": (
            lambda n: (host / f"comes{n}").write_bytes(b""),
            lambda n: os.path.exists(seen / f"comes{n}"),
        ),
        "a name goes": (
            lambda n: os.unlink(host / f"goes{n}"),
            lambda n: not os.path.exists(seen / f"goes{n}"),
        ),
        "a listing": (
            lambda n: (host / "d" / f"{n}").write_bytes(b""),
            lambda n: f"{n}" in os.listdir(seen / "d"),
        ),
    }


def delays(change: Change) -> list[float]:
    """Milliseconds from the end of each change until the mount shows it."""
    found = []
    for number_ in range(SAMPLES):
        change[1](number_)  # the kernel keeps what was
        time.sleep(PAUSE)
        change[0](number_)
        begun = time.perf_counter()
        while not change[1](number_):
            if time.perf_counter() - begun > LONGEST:
                raise RuntimeError(f"change {number_} is not seen within {LONGEST} s")
        found.append((time.perf_counter() - begun) * 1000)
    return sorted(found)


def measure() -> Report:
    """Run it: some 30 s."""
    report = Report("coherence")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fsd-bench-") as folder:
        host, seen = Path(folder, "source"), Path(folder, "mount")
        host.mkdir()
        seen.mkdir()
        prepare(host)
        with mounted(host, seen, "--cache=coherent"), open(seen / "file", "rb") as file:
            for name, change in changes(host, seen, file.fileno()).items():
                found = delays(change)
                shares = [percentile(found, share) or 0.0 for share in (0.5, 0.9, 0.99)]
                rows.append([name, *map(number, shares), number(found[-1])])
                report.add(f"p50, {name}", shares[0], "ms", goal=GOAL)
    report.table(
        f"ms until a reader sees a change, {SAMPLES} of each kind",
        ["change", "p50", "p90", "p99", "longest"],
        rows,
    )
    return report
