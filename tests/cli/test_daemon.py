"""`fsd mount --daemon`, and service managers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, mounts_at, wait_until
from tests.cli.support import FSD, background, daemon_of, line_of, status_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


def test_daemon_returns_when_all_is_usable(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    with daemon_of(source, mountpoint) as pid:
        state = status_of(mountpoint)
        (guest,) = state["guests"]
        assert guest["agent"] is True
        assert (mountpoint / "file").read_text() == "content"
        assert os.getsid(pid) == pid
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        with background("inotifywait", "-m", "-q", mountpoint) as watcher:
            Mount(source, mountpoint, watcher).wait_armed(mountpoint, pid=watcher.pid)
            (source / "x").mkdir()
            assert line_of(watcher) == f"{mountpoint}/ CREATE,ISDIR x"
    assert not Path(f"/proc/{guest['agent_pid']}").exists()


def test_daemon_without_an_agent(places: tuple[Path, Path]) -> None:
    with daemon_of(*places, "--no-agent"):
        assert status_of(places[1])["guests"][0]["agent"] is False


def test_relative_paths_of_a_daemon(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    done = subprocess.run(
        [FSD, "mount", "--daemon", "source", "mount"], cwd=source.parent, check=False, timeout=60
    )
    assert done.returncode == 0
    state = status_of(mountpoint)
    assert state["source"] == str(source)
    os.kill(state["pid"], signal.SIGTERM)
    wait_until(lambda: not mounts_at(mountpoint), 20, "the unmount")


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_systemd_is_notified(places: tuple[Path, Path], tmp_path: Path, abstract: bool) -> None:
    address = f"\0fsd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(20)
        os.environ["NOTIFY_SOCKET"] = address.replace("\0", "@")
        try:
            with mounted(*places):
                assert b"READY=1" in manager.recv(4096).split(b"\n")
        finally:
            del os.environ["NOTIFY_SOCKET"]


def test_a_manager_that_is_gone_does_not_matter(places: tuple[Path, Path], tmp_path: Path) -> None:
    os.environ["NOTIFY_SOCKET"] = str(tmp_path / "nobody")
    try:
        with mounted(*places):
            assert (places[1] / "file").exists()
    finally:
        del os.environ["NOTIFY_SOCKET"]
