"""`fsd-guest watch`: events straight from the server."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, wait_until
from harness.namespace import run
from harness.overflow import fill, queue_of
from tests.cli.support import (
    GUEST,
    background,
    ended,
    established,
    line_of,
    mark,
    refused,
    server,
    status_of,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


def test_watch(share_no_agent: Mount) -> None:
    """Straight from the server: without an agent, and without an inotify watch."""
    share = share_no_agent
    (share.source / "dir").mkdir()
    with background(GUEST, "watch", share.mountpoint, "--mask", "create,delete") as watcher:
        established(watcher)
        (share.source / "with space").touch()
        (share.source / "dir/not recursive").touch()
        (share.source / "with space").unlink()
        assert line_of(watcher) == f"{share.mountpoint}/ CREATE with space"
        assert line_of(watcher) == f"{share.mountpoint}/ DELETE with space"
        fds = [
            os.readlink(f"/proc/{watcher.pid}/fd/{fd}")
            for fd in os.listdir(f"/proc/{watcher.pid}/fd")
        ]
        assert "anon_inode:inotify" not in fds
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == -signal.SIGINT
    wait_until(lambda: len(status_of(share.mountpoint)["guests"]) == 1, 10, "the observer's end")
    assert status_of(share.mountpoint)["host_watches"] == 0


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_watch_hears_of_a_loss_where_that_is_asked(tmp_path: Path, asked: bool) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    options = ["--no-agent", *["--overflow-after-loss"] * asked]
    with (
        mounted(source, mountpoint, *options) as share,
        background(GUEST, "watch", "--mask", "create", share.mountpoint) as watcher,
    ):
        established(watcher)
        share.process.send_signal(signal.SIGSTOP)
        try:
            with queue_of(share.process.pid) as queue:
                fill(queue, room=16)
            for i in range(40):  # more than there is room for
                (share.source / f"f{i}").touch()
        finally:
            share.process.send_signal(signal.SIGCONT)
        lines: list[str] = []
        while len([line for line in lines if " CREATE " in line]) < 40:
            lines.append(line_of(watcher))
        assert status_of(share.mountpoint)["counts"]["overflows"] >= 1
        assert any("Q_OVERFLOW" in line for line in lines) == asked


def test_watch_recursive_json(share_no_agent: Mount) -> None:
    share = share_no_agent
    (share.source / "a/b").mkdir(parents=True)
    with background(
        GUEST, "watch", "-r", "--json", "--mask", "create,move", share.mountpoint
    ) as watcher:
        established(watcher)
        (share.source / "a/b/x").touch()
        row = json.loads(line_of(watcher))
        assert row == {
            "path": str(share.mountpoint / "a/b"), "name": "x", "mask": ["create"], "cookie": 0
        }  # fmt: skip
        os.rename(share.source / "a/b/x", share.source / "y")
        old, new = json.loads(line_of(watcher)), json.loads(line_of(watcher))
        assert (old["mask"], new["mask"]) == (["moved_from"], ["moved_to"])
        assert old["cookie"] == new["cookie"] != 0
        (share.source / "later").mkdir()
        assert json.loads(line_of(watcher))["mask"] == ["create", "isdir"]
        path = str(share.mountpoint / "later")
        wait_until(lambda: _is_watched(share, "later"), 5, "the watch on a later directory")
        (share.source / "later/z").touch()
        assert json.loads(line_of(watcher))["path"] == path


def test_watch_recursive_loses_nothing_while_it_asks(share_no_agent: Mount) -> None:
    """Events of the root come while the answers for new directories are waited for."""
    share = share_no_agent
    with background(GUEST, "watch", "-r", "--mask", "create", share.mountpoint) as watcher:
        established(watcher)
        for number in range(100):
            (share.source / f"d{number}").mkdir()
        reported = [line_of(watcher) for _ in range(100)]
    assert reported == [f"{share.mountpoint}/ CREATE,ISDIR d{number}" for number in range(100)]


def _is_watched(share: Mount, path: str) -> bool:
    guests = status_of(share.mountpoint)["guests"]
    return any(mark["path"] == path for guest in guests for mark in guest["armed"])


def test_watch_over_the_socket(places: tuple[Path, Path], tmp_path: Path) -> None:
    source, mountpoint = places
    (source / "dir").mkdir()
    name = tmp_path / "socket"
    with mounted(source, mountpoint, "--no-agent", "--socket", str(name)):
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
        with (
            background(GUEST, "watch", "dir", "--socket", name, "--mask", "create") as one,
            background(GUEST, "watch", "-r", "--json", "/", "--socket", name) as two,
        ):
            established(one)
            established(two)
            (source / "dir/\udcff").mkdir()
            assert line_of(one) == "dir/ CREATE,ISDIR \udcff"
            row = json.loads(line_of(two))
            assert (row["name"], row["mask"]) == ("\udcff", ["create", "isdir"])
        done = run([GUEST, "watch", "missing", "--socket", name])
        refused(done, "watch missing: No such file", who="fsd-guest")
        refused(
            run([GUEST, "watch", "dir", "--socket", name, "--mask", "isdir"]), "Invalid argument",
            who="fsd-guest",
        )  # fmt: skip
        assert mark("add", "dir", "--mask", "create", "--socket", name).endswith("IN_CREATE\n")
    assert not name.exists()
    done = run([GUEST, "watch", "dir", "--socket", name])
    refused(done, "is a server started with --socket?", who="fsd-guest")


def test_watch_ends_with_the_server(places: tuple[Path, Path], tmp_path: Path) -> None:
    name = str(tmp_path / "socket")
    with server(*places, "--no-agent", "--socket", name) as process:
        with (
            background(GUEST, "watch", "/", "--socket", name, "--wait", "0") as one,
            background(GUEST, "watch", places[1]) as two,
        ):
            established(one)
            established(two)
            process.terminate()
            for watcher in (one, two):
                assert watcher.wait(20) == 1
                assert watcher.stderr is not None
                text = watcher.stderr.read().decode()
                assert len(text.splitlines()) == 1
                assert text.startswith("fsd-guest: ")
        ended(process, places[1])
