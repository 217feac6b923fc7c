"""`fsd status`, and names of any bytes in what commands print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, wait_until
from harness.namespace import private, run
from tests.cli.support import (
    FSD,
    GUEST,
    background,
    daemon_of,
    established,
    line_of,
    mark,
    refused,
    status_of,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


@pytest.mark.parametrize("columns", ["80", "200"])
def test_status_table(share: Mount, columns: str) -> None:
    with background("inotifywait", "-m", "-q", share.mountpoint) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "x").mkdir()
        line_of(watcher)
        os.environ["COLUMNS"] = columns
        try:
            done = run([FSD, "status", share.mountpoint])
        finally:
            del os.environ["COLUMNS"]
    assert done.returncode == 0
    assert done.stderr == ""
    for word in (
        str(share.mountpoint), str(share.source), str(share.process.pid), "host watches",
        "guest", "agent", "yes", "marks", "forwarded", "echo", "coalesced", "replayed", "failed",
        "overflows", "resyncs", "p50", "p99", "events", "create",
    ):  # fmt: skip
        assert word in done.stdout, word


def test_status_json(share: Mount) -> None:
    with background("inotifywait", "-m", "-q", share.mountpoint) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "x").mkdir()
        line_of(watcher)
        wait_until(lambda: status_of(share.mountpoint)["guests"][0]["replayed"], 5, "a replay")
    state = status_of(share.mountpoint)
    assert state["source"] == str(share.source)
    assert state["pid"] == share.process.pid
    assert state["host_watches"] >= 1
    assert state["unwatched"] == []
    assert state["counts"]["in"] >= 1
    (guest,) = state["guests"]
    assert state["by_kind"]["create"]["in"] == 1
    assert guest["by_kind"]["create"] == {"forwarded": 1, "replayed": 1}
    assert guest["failed"] == guest["overflows"] == guest["depth"] == 0
    assert 0 < guest["latency_ms"]["p50"] <= guest["latency_ms"]["p99"] < 900  # of no long poll


def test_status_of_what_is_no_mount(tmp_path: Path) -> None:
    refused(run([FSD, "status", tmp_path]), "not an fsd mount")
    refused(run([FSD, "status", tmp_path / "missing"]), "not an fsd mount")


def test_status_of_nothing(tmp_path: Path) -> None:
    done = run(private("umount -a -l -t fuse.fsd || true", FSD, "status"))
    assert (done.returncode, done.stdout) == (0, "fsd: nothing is mounted\n")
    done = run(private("umount -a -l -t fuse.fsd || true", FSD, "status", "--json"))
    assert (done.returncode, json.loads(done.stdout)) == (0, {})


def test_status_of_odd_names(tmp_path: Path) -> None:
    """Blanks and brackets in paths, which mountinfo and the table's markup would change."""
    source, mountpoint = tmp_path / "a [red]source,x", tmp_path / "b [bold] mount\\ \u00fc"
    source, mountpoint = source / ("long" * 30), mountpoint / ("long" * 30)
    source.mkdir(parents=True)
    mountpoint.mkdir(parents=True)
    with mounted(source, mountpoint, "--no-agent"):
        os.environ["COLUMNS"] = "80"
        try:
            done = run([FSD, "status", mountpoint])
        finally:
            del os.environ["COLUMNS"]
        assert done.returncode == 0, done.stderr
        assert str(mountpoint) in done.stdout
        assert str(source) in done.stdout
        assert str(mountpoint) in json.loads(run([FSD, "status", "--json"]).stdout)


def test_names_of_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the locale's encoding has no place for them, as in most: shown as they are."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    source, mountpoint = tmp_path / "s\udcff", tmp_path / "m\udcfe"
    source.mkdir()
    mountpoint.mkdir()
    refused(run([FSD, "mount", source, mountpoint / "no\udcfd"]), "no\udcfd does not exist")
    with daemon_of(source, mountpoint):
        (source / "d\udcfc").mkdir()
        path = mountpoint / "d\udcfc"
        shown = run([FSD, "status", mountpoint])
        assert f"{mountpoint} shares {source}\n" in shown.stdout, shown.stderr
        assert str(mountpoint) in json.loads(run([FSD, "status", "--json"]).stdout)
        assert mark("add", path, "--mask", "create").startswith(f"{path} (nodeid ")
        with (
            background("inotifywait", "-m", "-q", path) as inotifywait,
            background(GUEST, "watch", path) as watcher,
        ):
            established(watcher)
            share = Mount(source, mountpoint, inotifywait)
            share.wait_armed(path, pid=inotifywait.pid)
            assert str(path) in run([GUEST, "marks", mountpoint]).stdout
            (source / "d\udcfc/x\udcfb").mkdir()
            assert line_of(inotifywait) == f"{path}/ CREATE,ISDIR x\udcfb"
            assert line_of(watcher) == f"{path}/ CREATE,ISDIR x\udcfb"


def test_other_users_get_no_status(share: Mount) -> None:
    """The hidden directory is there for root and the mount's owner alone."""
    os.chmod(share.mountpoint.parent, 0o755)
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "for name in ('.fsd', '.fsd/status', '.fsd/control', '.fsd/session'):\n"
        "    try: os.stat(name)\n"
        "    except FileNotFoundError: continue\n"
        "    sys.exit('seen: ' + name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=share.mountpoint, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ".fsd" not in os.listdir(share.mountpoint)
