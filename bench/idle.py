"""Cost when idle: processor time of server and agent while a program watches 10,000 directories."""

from __future__ import annotations

import select
import time

from .report import Report, number
from .usage import Usage
from .watching import WATCHES, settled, watched_tree

PERIOD = 20.0
"""Idle seconds that are measured."""
TRIES = 3


def measure() -> Report:
    """Run it: some 60 s."""
    report = Report("rest")
    rows = []
    with watched_tree(WATCHES) as served:
        settled(served)
        for _ in range(TRIES):
            before = {name: Usage(pid) for name, pid in served.processes()}
            changes = sleep_and_count_mounts(PERIOD)
            after = {name: Usage(pid) for name, pid in served.processes()}
            if not changes:
                break
    for name in before:
        old, new = before[name], after[name]
        ticks, seconds = new.ticks - old.ticks, new.seconds - old.seconds
        wakeups = new.wakeups - old.wakeups
        rows.append([name, number(ticks), f"{seconds * 1000:.3f}", str(wakeups)])
        report.add(f"{name}, processor time", seconds * 1000, "ms", goal=0.0)
    heads = ["process", "utime+stime, s", "on a CPU, ms", "times awake"]
    report.table(f"{WATCHES:,} watched directories, {PERIOD:.0f} s of rest", heads, rows)
    if changes:
        report.notes.append(
            f"others mounted or unmounted {changes} times meanwhile: each time the agent looks "
            "whether its own mount is still there"
        )
    return report


def sleep_and_count_mounts(seconds: float) -> int:
    """Sleep, and count the changes of the mount table."""
    changes = 0
    end = time.monotonic() + seconds
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        poll = select.poll()
        poll.register(mountinfo.fileno(), select.POLLPRI | select.POLLERR)
        while (left := end - time.monotonic()) > 0:
            changes += len(poll.poll(left * 1000))
    return changes
