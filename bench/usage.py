"""The resources that a process has used so far, as the kernel counts them."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h


class Usage:
    """Processor time and wake-ups of all threads of a process, its memory."""

    def __init__(self, pid: int) -> None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in seconds
        # The same in ns, by the clock that clock_getcpuclockid(3) gives for a process.
        self.seconds = time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
        self.wakeups = 0
        self.memory_kib = 0  # RssAnon: memory shared with others is not counted
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                self.wakeups += _field(task / "status", "voluntary_ctxt_switches")
        self.memory_kib = _field(Path(f"/proc/{pid}/status"), "RssAnon")


def _field(status: Path, name: str) -> int:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
