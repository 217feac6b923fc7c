"""The resources that a process has used so far, as the kernel counts them."""

from __future__ import annotations

import os
from pathlib import Path


class Usage:
    """Processor time and wake-ups of all threads of a process, its memory."""

    def __init__(self, pid: int) -> None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in seconds
        self.seconds = 0.0  # the same by schedstat, which counts in ns
        self.wakeups = 0
        self.memory_kib = 0  # RssAnon: memory shared with others is not counted
        for task in Path(f"/proc/{pid}/task").iterdir():
            self.seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
            self.wakeups += _field(task / "status", "voluntary_ctxt_switches")
        self.memory_kib = _field(Path(f"/proc/{pid}/status"), "RssAnon")


def _field(status: Path, name: str) -> int:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
