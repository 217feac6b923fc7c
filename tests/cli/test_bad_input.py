"""`fsd mount` and `fsd-guest` on what is wrong: one line, and nothing left behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, mounts_at
from harness.namespace import (
    UID,
    as_user,
    device_of_everybody,
    private,
    python_of_everybody,
    run,
    without_device,
)
from tests.cli.support import FSD, GUEST, background, ended, line_of, refused, world_readable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


def test_source_missing(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    refused(run([FSD, "mount", source / "no", mountpoint]), "no does not exist", mountpoint)


def test_source_is_a_file(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    refused(run([FSD, "mount", source / "file", mountpoint]), "is not a directory", mountpoint)


def test_source_unreadable(tmp_path: Path) -> None:
    with world_readable() as top:
        source, mountpoint = top / "source", top / "mount"
        source.mkdir(mode=0o700)
        mountpoint.mkdir()
        os.chown(mountpoint, UID, UID)
        setup = f"{device_of_everybody(tmp_path)}\n{python_of_everybody(tmp_path)}"
        done = run(private(setup, *as_user(), FSD, "mount", source, mountpoint))
        refused(done, "no permission to read", mountpoint)


def test_mountpoint_missing(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    refused(run([FSD, "mount", source, mountpoint / "no"]), "no does not exist")


def test_mountpoint_is_a_file(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    (mountpoint / "file").touch()
    refused(run([FSD, "mount", source, mountpoint / "file"]), "is not a directory")


def test_mountpoint_not_empty(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    (mountpoint / "mine").touch()
    refused(run([FSD, "mount", source, mountpoint]), "is not empty", mountpoint)
    assert os.listdir(mountpoint) == ["mine"]


def test_mountpoint_busy(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    with mounted(source, mountpoint, "--no-agent"):
        refused(run([FSD, "mount", source, mountpoint]), "is busy")
        assert len(mounts_at(mountpoint)) == 1
        assert (mountpoint / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("source", "mountpoint"),
    [("source", "source/in"), ("source", "source"), ("m/in", "m"), ("link", "source/in")],
)
def test_one_inside_the_other(tmp_path: Path, source: str, mountpoint: str) -> None:
    for name in ("source/in", "m/in"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("source")
    done = run([FSD, "mount", tmp_path / source, tmp_path / mountpoint])
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "must not contain one another" in done.stderr or "is not empty" in done.stderr
    assert mounts_at(tmp_path / mountpoint) == []


@pytest.mark.parametrize("daemon", [[], ["--daemon"]], ids=["foreground", "daemon"])
def test_no_dev_fuse(places: tuple[Path, Path], tmp_path: Path, daemon: list[str]) -> None:
    source, mountpoint = places
    (tmp_path / "dev").mkdir()
    setup = without_device(tmp_path / "dev")
    refused(run(private(setup, FSD, "mount", source, mountpoint, *daemon)), "/dev/fuse", mountpoint)


@pytest.mark.parametrize("daemon", [[], ["--daemon"]], ids=["foreground", "daemon"])
def test_dev_fuse_of_something_else(places: tuple[Path, Path], daemon: list[str]) -> None:
    """Found out only by mounting: after the daemon's fork."""
    source, mountpoint = places
    setup = "mount --bind /dev/null /dev/fuse"
    name = source.parent / "socket"
    done = run(private(setup, FSD, "mount", source, mountpoint, "--socket", name, *daemon))
    refused(done, f"mounting on {mountpoint} failed: ", mountpoint)
    assert "fuse_session_mount" not in done.stderr  # but why it failed
    assert not name.exists()


def test_no_permission_for_dev_fuse(tmp_path: Path) -> None:
    with world_readable() as top:
        source, mountpoint = top / "source", top / "mount"
        source.mkdir()
        mountpoint.mkdir()
        os.chown(mountpoint, UID, UID)
        setup = f"{device_of_everybody(tmp_path)}\n{python_of_everybody(tmp_path)}"
        setup = setup.replace("mknod -m 666", "mknod -m 600")
        done = run(private(setup, *as_user(), FSD, "mount", source, mountpoint))
        refused(done, "/dev/fuse: Permission denied", mountpoint)


def test_no_permission_for_the_mountpoint(tmp_path: Path) -> None:
    with world_readable() as top:
        source, mountpoint = top / "source", top / "mount"
        source.mkdir()
        mountpoint.mkdir()
        setup = f"{device_of_everybody(tmp_path)}\n{python_of_everybody(tmp_path)}"
        done = run(private(setup, *as_user(), FSD, "mount", source, mountpoint))
        refused(done, "needs permission to write", mountpoint)


@pytest.mark.parametrize("daemon", [[], ["--daemon"]], ids=["foreground", "daemon"])
def test_fusermount_refuses(tmp_path: Path, daemon: list[str]) -> None:
    with world_readable() as top:
        source, mountpoint = top / "source", top / "mount"
        for directory in (source, mountpoint):
            directory.mkdir()
            os.chown(directory, UID, UID)
        setup = f"{device_of_everybody(tmp_path)}\n{python_of_everybody(tmp_path)}"
        (tmp_path / "fuse.conf").touch()
        setup += f"\ntouch /etc/fuse.conf; mount --bind {tmp_path}/fuse.conf /etc/fuse.conf"
        user = as_user()
        done = run(
            private(setup, *user, FSD, "mount", source, mountpoint, "--allow-other", *daemon)
        )
        refused(done, "failed: fusermount3: option allow_other only allowed", mountpoint)


def test_a_socket_that_cannot_be_made(places: tuple[Path, Path], tmp_path: Path) -> None:
    source, mountpoint = places
    bad = tmp_path / "no" / "socket"
    done = run([FSD, "mount", source, mountpoint, "--socket", bad])
    refused(done, f"socket {bad}", mountpoint)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "taken"))
        other.listen()
        done = run([FSD, "mount", source, mountpoint, "--socket", tmp_path / "taken"])
        refused(done, "taken: Address already in use", mountpoint)
    (tmp_path / "a file").write_text("mine")
    done = run([FSD, "mount", source, mountpoint, "--socket", tmp_path / "a file"])
    refused(done, "a file: Address already in use", mountpoint)
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_longer_queue_than_the_hosts(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    done = run([FSD, "mount", source, mountpoint, "--max-queued-events", "2000000000"])
    refused(done, "sysctl -w fs.inotify.max_queued_events=2000000000", mountpoint)


@pytest.mark.parametrize(
    "arguments",
    [
        ["mount"], ["mount", "/tmp"], ["mount", "--no-such-option", "/tmp", "/mnt"],
        ["mount", "/tmp", "/mnt", "more"], ["mount", "/tmp", "/mnt", "--max-watches", "0"],
        ["mount", "/tmp", "/mnt", "--max-queued-events", "many"],
        ["mount", "/tmp", "/mnt", "--log-level", "loud"], ["no-such-command"],
        ["status", "a", "b"], [], ["mount", "", "/mnt"], ["mount", "/tmp", ""], ["status", ""],
        ["mount", "/tmp", "/mnt", "--max-queued-events", "99999999999"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    refused(run([FSD, *arguments]), "--help'", status=2)


@pytest.mark.parametrize(
    "arguments",
    [[], ["agent"], ["mark", "toggle", "x"], ["watch"], ["marks", "a", "b"], ["watch", "--no"]],
    ids=" ".join,
)
def test_wrong_usage_of_the_guests_command(arguments: list[str]) -> None:
    refused(run([GUEST, *arguments]), "--help'", status=2, who="fsd-guest")


def test_an_entry_that_the_hidden_directory_covers(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    (source / ".fsd").mkdir()
    (source / ".fsd/mine").touch()
    with background(FSD, "mount", source, mountpoint) as process:
        said = line_of(process, stderr=True)
        assert said.startswith(f"fsd: source {source} has an entry named .fsd, ")
        assert line_of(process).startswith("fsd: ready")
        assert os.listdir(mountpoint / ".fsd") == []
        assert sorted(os.listdir(mountpoint)) == [".fsd", "file"]
        process.terminate()
        ended(process, mountpoint)
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_help_and_version() -> None:
    for arguments in ("--help", "mount --help", "status -h", "--version"):
        done = run([FSD, *arguments.split()])
        assert done.returncode == 0
        assert done.stdout
        assert done.stderr == ""
    for arguments in ("--help", "mark --help", "watch -h"):
        done = run([GUEST, *arguments.split()])
        assert done.returncode == 0
        assert done.stdout
        assert done.stderr == ""


def test_a_second_agent(share: Mount) -> None:
    done = run([GUEST, "agent", share.mountpoint])
    refused(done, "another agent is connected", who="fsd-guest")
    with background("inotifywait", "-m", "-q", share.mountpoint) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "x").touch()
        assert line_of(watcher) == f"{share.mountpoint}/ CREATE x"


@pytest.mark.parametrize("what", [["agent"], ["marks"], ["watch"], ["mark", "add"]], ids=" ".join)
def test_no_mount_of_ours(tmp_path: Path, what: list[str]) -> None:
    mask = ["--mask", "create"] if what[0] == "mark" else []
    done = run([GUEST, *what, tmp_path, *mask])
    refused(done, str(tmp_path), who="fsd-guest")
    assert "an fsd mount" in done.stderr
    done = run([GUEST, *what, tmp_path / "missing", *mask])
    refused(done, "missing", who="fsd-guest")


@pytest.mark.parametrize("daemon", [[], ["--daemon"]], ids=["foreground", "daemon"])
def test_an_agent_that_cannot_start(
    places: tuple[Path, Path], tmp_path: Path, daemon: list[str]
) -> None:
    source, mountpoint = places
    (tmp_path / "path/guest_tools").mkdir(parents=True)
    (tmp_path / "path/guest_tools/__init__.py").touch()
    (tmp_path / "path/guest_tools/__main__.py").write_text("raise SystemExit(7)")
    os.environ["PYTHONPATH"] = str(tmp_path / "path")
    try:
        done = run([FSD, "mount", source, mountpoint, *daemon])
    finally:
        del os.environ["PYTHONPATH"]
    refused(done, "agent did not start (exit status 7)", mountpoint)
