"""The libfuse transport: the POSIX map with its exclusions, and that events come."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, wait_until
from tests.mount.exclusions import LIBFUSE as EXCLUDED
from tests.mount.observing import status
from tests.mount.posix_cases import CASES, run_case
from tests.mount.posix_parameters import PARAMETERS
from tests.mount.posix_support import User
from tests.mount.sides import Sides, two_sides


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    with two_sides("--transport=libfuse") as both:
        yield both


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Mount]:
    """A mount of its own, with an agent."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--transport=libfuse") as made:
        yield made


@pytest.mark.parametrize(("name", "user"), PARAMETERS)
def test_posix(name: str, user: User | None, sides: Sides) -> None:
    d, host = sides.mount.mountpoint / name, sides.mount.source / name
    try:
        if name in EXCLUDED:
            with pytest.raises((AssertionError, OSError)):  # it passes now? take it off the list
                run_case(CASES[name], d, host, user)
        else:
            run_case(CASES[name], d, host, user)
    finally:
        sides.check_alive()
        shutil.rmtree(d)
    assert not host.exists()


def test_exclusions_name_cases() -> None:
    assert set(EXCLUDED) <= set(CASES)


def test_inotifywait_sees_the_host(share: Mount) -> None:
    (share.source / "d").mkdir()
    with subprocess.Popen(
        ["inotifywait", "-m", "-r", "--format", "%w%f %e", share.mountpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        try:
            share.wait_armed(share.mountpoint / "d", pid=watcher.pid)
            (share.source / "d" / "f").write_bytes(b"x")
            (share.source / "d" / "f").rename(share.source / "g")
            (share.source / "g").unlink()
            lines = [watcher.stdout.readline() for _ in range(7)]
        finally:
            watcher.terminate()
    root = share.mountpoint
    assert lines == [
        f"{root}/d/f CREATE\n",
        f"{root}/d/f OPEN\n",
        f"{root}/d/f MODIFY\n",
        f"{root}/d/f CLOSE_WRITE,CLOSE\n",
        f"{root}/d/f MOVED_FROM\n",
        f"{root}/g MOVED_TO\n",
        f"{root}/g DELETE\n",
    ]


def test_a_killed_agent_is_replaced(share: Mount) -> None:
    agents = _agents(share)
    os.kill(agents[0], signal.SIGKILL)
    wait_until(lambda: set(_agents(share)) - set(agents), 10, "another agent")
    with subprocess.Popen(
        ["inotifywait", "-q", "-e", "create", share.mountpoint],
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "new").touch()
        assert watcher.communicate(timeout=10)[0] == f"{share.mountpoint}/ CREATE new\n"


def _agents(share: Mount) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"agent" in words and os.fsencode(share.mountpoint) in words:
                found.append(int(path.parent.name))
    return found


def test_status(share: Mount) -> None:
    assert [guest["transport"] for guest in status(share.mountpoint)["guests"]] == ["libfuse"]
