"""How `fsd mount` ends: signals, unmounts, mounts of the same source."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from harness.mounts import mounted, mounts_at, wait_until
from harness.namespace import run
from tests.cli.support import FSD, background, ended, line_of, server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("agent", [[], ["--no-agent"]], ids=["agent", "no-agent"])
def test_signals_end_it(
    places: tuple[Path, Path], number: signal.Signals, agent: list[str]
) -> None:
    source, mountpoint = places
    with server(source, mountpoint, *agent) as process:
        process.send_signal(number)
        ended(process, mountpoint)
    assert (source / "file").read_text() == "content"


def test_ctrl_c_to_the_whole_group(places: tuple[Path, Path]) -> None:
    """As a terminal sends it: the agent must not die of it first and be missed."""
    source, mountpoint = places
    with background(FSD, "mount", source, mountpoint, start_new_session=True) as process:
        line_of(process)
        os.killpg(process.pid, signal.SIGINT)
        ended(process, mountpoint)
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_signal_while_the_mount_is_in_use(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    with (
        server(source, mountpoint) as process,
        background("inotifywait", "-m", "-r", mountpoint),
        background("sleep", "100", cwd=mountpoint),
    ):
        fd = os.open(mountpoint / "file", os.O_RDONLY)
        assert os.read(fd, 100) == b"content"
        process.terminate()
        ended(process, mountpoint)
        with suppress(OSError):  # its server is gone
            os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.2])
def test_a_signal_during_the_start(
    places: tuple[Path, Path], number: signal.Signals, pause: float
) -> None:
    """After the mount, before or while the agent starts: wherever the pause happens to end."""
    source, mountpoint = places
    with background(FSD, "mount", source, mountpoint) as process:
        wait_until(lambda: mounts_at(mountpoint), 20, "the mount")
        time.sleep(pause)
        process.send_signal(number)
        assert process.wait(20) == 0
        wait_until(lambda: not mounts_at(mountpoint), 5, "the unmount")
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("tool", [["umount"], ["fusermount3", "-u"]], ids=" ".join)
@pytest.mark.parametrize("agent", [[], ["--no-agent"]], ids=["agent", "no-agent"])
def test_unmounting_from_outside_ends_it(
    places: tuple[Path, Path], tool: list[str], agent: list[str]
) -> None:
    source, mountpoint = places
    with server(source, mountpoint, *agent) as process:
        done = run([*tool, mountpoint])
        assert done.returncode == 0, done.stderr
        ended(process, mountpoint)


def test_a_lazy_unmount_ends_it(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    with server(source, mountpoint) as process:
        assert run(["umount", "-l", mountpoint]).returncode == 0
        ended(process, mountpoint)


def test_it_can_be_mounted_again_at_once(places: tuple[Path, Path]) -> None:
    for _ in range(3):
        with mounted(*places):
            assert (places[1] / "file").read_text() == "content"


def test_two_mounts_of_one_source(places: tuple[Path, Path], tmp_path: Path) -> None:
    source, first = places
    second = tmp_path / "second"
    second.mkdir()
    with mounted(source, first) as one, mounted(source, second) as two:
        with (
            background("inotifywait", "-m", "-q", "-e", "create", first) as a,
            background("inotifywait", "-m", "-q", "-e", "create", second) as b,
        ):
            one.wait_armed(first, pid=a.pid)
            two.wait_armed(second, pid=b.pid)
            (second / "by second").mkdir()
            assert line_of(a) == f"{first}/ CREATE,ISDIR by second"
            assert line_of(b) == f"{second}/ CREATE,ISDIR by second"
        listed = json.loads(run([FSD, "status", "--json"]).stdout)
        assert {str(first), str(second)} <= set(listed)
