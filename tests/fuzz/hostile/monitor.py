"""Looks at the server from outside: is it there, what does it hold, what has it logged."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20


_PEER = 'event="VMM dropped"'
"""An error, but the VMM's: it sent what no VMM sends."""


class Held(NamedTuple):
    """What a process holds. ``rss`` in bytes, the rest by number."""

    rss: int
    fds: int
    watches: int
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.rss / MIB:.1f} MiB, {self.fds} descriptors, {self.watches} inotify watches, "
            f"{self.threads} threads"
        )


def held(pid: int) -> Held:
    """What a process holds now. Raises OSError where it is gone."""
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    fds = os.listdir(process / "fd")
    watches = 0
    for fd in fds:
        with suppress(OSError):  # closed meanwhile
            if os.readlink(process / "fd" / fd) == "anon_inode:inotify":
                text = (process / "fdinfo" / fd).read_text()
                watches += sum(line.startswith("inotify ") for line in text.splitlines())
    return Held(int(status["VmRSS"].split()[0]) * 1024, len(fds), watches, int(status["Threads"]))


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process are."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return sorted(found)


def busy_with(pid: int) -> str:
    """What the main thread of a process does at this moment, as the kernel sees it."""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        wchan = Path(f"/proc/{pid}/wchan").read_text()
        call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
        return f"{state} {wchan} syscall {call}"
    return "gone"


class Oversleep:
    """The control: a process that sleeps for a moment and notes when it woke too late.

    It has nothing to do with the server; what delays it delays everybody.
    """

    NAP = 0.005
    LATE = 0.02

    def __init__(self) -> None:
        self.late: list[tuple[float, float]] = []
        self.worst = 0.0

    def run(self, until: float) -> None:
        """Sleep and wake until then."""
        while (begun := time.monotonic()) < until:
            time.sleep(self.NAP)
            over = time.monotonic() - begun - self.NAP
            self.worst = max(self.worst, over)
            if over > self.LATE:
                self.late.append((begun + self.NAP, over))


def complaints(log: str) -> list[str]:
    """Lines of the server's log that must not be there."""
    words = ("level=error", "level=critical", "Traceback", "MemoryError")
    return [
        line
        for line in log.splitlines()
        if any(word in line for word in words) and _PEER not in line
    ]
