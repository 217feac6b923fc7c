"""Shares whose server exits under a running guest, and checks that nothing was lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.mounts import wait_until
from harness.share_server import Share, inside, shared


class Kept:
    """A share with a keeper, and the ways to restart its server."""

    def __init__(self, source: Path, share: Share) -> None:
        self.source = source
        self.share = share

    @property
    def pid(self) -> int:
        """The process that guests reach."""
        return inside(inside(self.share.keeper))

    def again(self, way: str) -> None:
        """End the server, and wait for the next one."""
        before = self.pid
        if way == "kill":
            os.kill(before, signal.SIGKILL)
        else:
            os.kill(self.share.keeper, signal.SIGUSR2)
        taken = (before, inside(self.share.keeper), self.share.keeper)
        wait_until(lambda: self.pid not in (*taken, inside(self.share.keeper)), 20, "another")


@contextmanager
def kept(source: Path, *options: str) -> Iterator[Kept]:
    source.mkdir()
    with shared(source, 1, "--keep", *options) as server:
        yield Kept(source, server)


NAMES = ["-e", "create", "-e", "delete", "-e", "move"]
"""Events of names: each change makes its own, and none are merged."""


@contextmanager
def native_watcher(folder: Path) -> Iterator[Path]:
    """A watcher on the host; yields the file that it writes to."""
    output = folder.parents[1] / f"{folder.name}.native"
    with output.open("w") as stdout, subprocess.Popen(
        ["inotifywait", "-m", *NAMES, "--format", "%e %f", folder],
        stdout=stdout, stderr=subprocess.PIPE, text=True,
    ) as watcher:  # fmt: skip
        assert watcher.stderr is not None
        while "established" not in watcher.stderr.readline():
            assert watcher.poll() is None
        yield output
        watcher.terminate()


class Stop(threading.Event):
    """Set at the end of its block."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.set()


def storm(folder: Path, stop: Stop) -> int:
    """Change names on the host without a pause. Returns the number of steps."""
    count = 0
    while not stop.is_set():
        count += 1
        one, two = folder / f"one{count}", folder / f"two{count}"
        one.touch()
        one.rename(two)
        if count % 3:
            two.unlink()
        time.sleep(0.02)  # some 150 events a second, which a guest under TCG just replays
    return count
