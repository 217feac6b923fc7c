"""A mount on which a program watches many directories: for the cost when idle, and of memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.mounts import Mount, mounted, wait_until
from protocol.masks import EVENTS

from .readers import reading
from .usage import Usage

WATCHES = 10_000
ARM_TIMEOUT = 60.0  # seconds to look up, mark, scan and arm them all
QUIET, QUIET_CPU = 6.0, 0.02
"""Server and agent count as idle when they use no more than this in so many seconds. The agent
pauses for nine times the duration of a scan, and wakes when anything is mounted."""
SETTLE_TIMEOUT = 60.0


@dataclass
class Served:
    """The mount and its processes; starts programs that watch its directories."""

    mount: Mount
    server: int
    agent: int
    stack: ExitStack = field(repr=False)

    def processes(self) -> list[tuple[str, int]]:
        """The processes to measure."""
        return [("server", self.server), ("agent", self.agent)]

    def state(self) -> dict[str, Any]:
        """The server's status."""
        text = (self.mount.mountpoint / ".fsd" / "status").read_text()
        state: dict[str, Any] = json.loads(text)
        return state

    def watch(self, count: int, timeout: float = ARM_TIMEOUT) -> None:
        """Start an inotify program that watches ``count`` directories; returns when all are
        armed.
        """
        source, watched = self.mount.source / "tree", self.mount.mountpoint / "tree"
        self.stack.enter_context(reading(source, watched, EVENTS, recursive=True))
        wait_until(lambda: self.state()["guests"][0]["marks"] >= count, timeout, f"{count} marks")


@contextmanager
def served_tree(directories: int) -> Iterator[Served]:
    """A mount with so many directories, one of which holds the others; nothing watches it yet."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        source, mountpoint = Path(scratch, "source"), Path(scratch, "mount")
        mountpoint.mkdir()
        for index in range(directories - 1):
            (source / "tree" / f"d{index}").mkdir(parents=True)
        mount = stack.enter_context(mounted(source, mountpoint))
        served = Served(mount, mount.process.pid, 0, stack)
        served.agent = served.state()["guests"][0]["agent_pid"]
        yield served


@contextmanager
def watched_tree(directories: int) -> Iterator[Served]:
    """The same, watched."""
    with served_tree(directories) as served:
        served.watch(directories)
        yield served


def settled(served: Served) -> None:
    """Wait until server and agent sleep: the work after the marks is done."""
    since, used = time.monotonic(), 0.0

    def is_quiet() -> bool:
        nonlocal since, used
        now = sum(Usage(pid).seconds for pid in (served.server, served.agent))
        if now - used > QUIET_CPU:
            since, used = time.monotonic(), now
        return time.monotonic() - since > QUIET

    wait_until(is_quiet, SETTLE_TIMEOUT, "server and agent idle")
