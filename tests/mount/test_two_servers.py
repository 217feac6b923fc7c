"""Two servers of one directory, and a server that ends while a request waits for the host's
changes before it.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, mounts_at, wait_until
from protocol.masks import Mask

from .observing import the_mount
from .test_history import NATURAL, Told, Watch, change
from .test_loss import agent_of, injected

PATIENT = "from fsd.guests import history\nhistory.PATIENCE = history.LONGEST = 60.0"
PROGRAM = """
import os, sys
print("ready", flush=True)
sys.stdin.readline()
try:
    os.mkdir(sys.argv[1])
except OSError as error:
    print(error.errno, flush=True)
else:
    print(0, flush=True)
"""


@pytest.fixture
def shares(tmp_path: Path) -> Iterator[list[Mount]]:
    """The same source, mounted by two servers."""
    (tmp_path / "source/d").mkdir(parents=True)
    with ExitStack() as stack:
        both = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            both.append(stack.enter_context(mounted(tmp_path / "source", tmp_path / name)))
        yield both


@pytest.fixture
def watches(shares: list[Mount]) -> Iterator[list[Watch]]:
    """A watcher on each mount."""
    both = [Watch(share, share.mountpoint / "d") for share in shares]
    yield both
    for watch in both:
        watch.close()


def test_each_change_is_told_once_on_both(shares: list[Mount], watches: list[Watch]) -> None:
    """Whoever makes it: the host, a program of one mount, or of the other."""
    sides = [shares[0].source, shares[0].mountpoint, shares[1].mountpoint]
    expected = []
    for round_ in range(20):
        for side in sides:
            name = f"{round_} {side.name}"
            (side / "d" / name).touch()
            (side / "d" / name).rename(side / "d" / f"{name}~")
            (side / "d" / f"{name}~").unlink()
            expected += [
                Told(Mask.CREATE, name), Told(Mask.MOVED_FROM, name),
                Told(Mask.MOVED_TO, f"{name}~"), Told(Mask.DELETE, f"{name}~"),
            ]  # fmt: skip
    for watch in watches:
        told = watch.settled()
        assert Counter(told) == Counter(expected)
        for round_ in range(20):
            for side in sides:
                prefix = f"{round_} {side.name}"
                mine = [event for event in told if event.name.rstrip("~") == prefix]
                assert mine == [e for e in expected if e.name.rstrip("~") == prefix]


def test_a_storm_of_the_host_and_both(shares: list[Mount], watches: list[Watch]) -> None:
    """What the watchers of either believe in the end is what is there."""
    sides = [shares[0].source, shares[0].mountpoint, shares[1].mountpoint]
    strange: Counter[str] = Counter()
    end = time.monotonic() + 5

    def run(side: Path, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            try:
                change(chance, str(side / "d"))
            except OSError as error:
                if error.errno not in NATURAL | {errno.ESTALE}:
                    strange[f"{side.name}: {error.strerror}"] += 1
            time.sleep(chance.random() * 0.002)

    threads = [threading.Thread(target=run, args=(side, i)) for i, side in enumerate(sides)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for watch in watches:
        believed: dict[str, bool] = {}
        for event in watch.settled():
            believed.pop(event.name, None)
            if event.comes:
                believed[event.name] = bool(event.mask & Mask.ISDIR)
        there = {
            path.name: path.is_dir() and not path.is_symlink()
            for path in (shares[0].source / "d").iterdir()
        }
        assert believed == there
    assert not strange


@pytest.mark.parametrize("transport", ["devfuse", "libfuse"])
def test_a_server_ends_while_a_request_waits(tmp_path: Path, transport: str) -> None:
    """The agent hangs, so the host's change before the request is never delivered: the request
    succeeds all the same, and the server ends as always.
    """
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    (source / "d").mkdir(parents=True)
    mountpoint.mkdir()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mountpoint / "d/x"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    agent = 0
    try:
        with injected(tmp_path, PATIENT):
            server = mounted(source, mountpoint, f"--transport={transport}")
            share = server.__enter__()
        try:
            watch = Watch(share, mountpoint / "d")
            agent = agent_of(share)
            os.kill(agent, signal.SIGSTOP)
            (source / "d/x").mkdir()
            (source / "d/x").rmdir()
            program.stdin.write(b"\n")
            program.stdin.flush()
            wait_until(lambda: the_mount(mountpoint)["waited"], 20, "a request that waits")
            assert program.poll() is None
        finally:
            server.__exit__(None, None, None)  # checks that the server ends well
        program.wait(20)
        assert int(program.stdout.read()) == 0
        assert not mounts_at(mountpoint)
        assert (source / "d/x").is_dir()
        watch.close()
    finally:
        program.kill()
        program.communicate()
        if agent:
            with suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
