"""The commands as people and programs call them: bad input, daemons, signals, what they print."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from .support.mounts import Mount, command, mounted, mounts_at, wait_until
from .support.namespace import (
    UID,
    as_user,
    device_of_everybody,
    inside,
    private,
    python_of_everybody,
    run,
    without_device,
)  # fmt: skip

FSD, GUEST = command("fsd"), command("fsd-guest")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A source with a file, and an empty mountpoint; at the end nothing is mounted there."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    (source / "file").write_text("content")
    yield source, mountpoint
    left = mounts_at(mountpoint)
    for _ in left:
        subprocess.run(["umount", "-l", mountpoint], check=True)
    assert not left


def refused(
    done: subprocess.CompletedProcess[str], says: str, mountpoint: Path | None = None, *,
    status: int = 1, who: str = "fsd",
) -> None:  # fmt: skip
    """One clear line, the exit status, and nothing left behind."""
    assert done.returncode == status, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{who}: ")
    assert says in lines[0]
    if mountpoint is not None:
        assert mounts_at(mountpoint) == []


@contextmanager
def background(*arguments: str | Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours for the block."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def line_of(process: subprocess.Popen[bytes], timeout: float = 20, *, stderr: bool = False) -> str:
    """The next line that the process prints, waited for."""
    pipe = process.stderr if stderr else process.stdout
    assert pipe is not None
    line = b""
    deadline = time.monotonic() + timeout
    while not line.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        assert select.select([pipe], [], [], left)[0], f"no line within {timeout} s ({line!r})"
        byte = os.read(pipe.fileno(), 1)
        if not byte:
            break
        line += byte
    return os.fsdecode(line.rstrip(b"\n"))


# Bad input


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


@contextmanager
def world_readable() -> Iterator[Path]:
    """A directory that ordinary users can enter, other than pytest's own."""
    with tempfile.TemporaryDirectory(prefix="fsd-user-") as top:
        os.chmod(top, 0o755)
        yield Path(top)


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
    assert "contain one another" in done.stderr or "is not empty" in done.stderr
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
        refused(done, "no permission to write", mountpoint)


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
    assert "mount of fsd" in done.stderr
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


# Daemons and service managers


def status_of(mountpoint: Path) -> dict[str, Any]:
    done = run([FSD, "status", mountpoint, "--json"])
    assert done.returncode == 0, done.stderr
    state: dict[str, Any] = json.loads(done.stdout)
    return state


@contextmanager
def daemon_of(source: Path, mountpoint: Path, *options: str) -> Iterator[int]:
    """A daemon's pid for the block; then it ends as a daemon does, by SIGTERM."""
    done = run([FSD, "mount", "--daemon", source, mountpoint, *options])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fsd: ready: {source} on {mountpoint}\n"
    assert done.stderr == ""
    pid = int(status_of(mountpoint)["pid"])
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not mounts_at(mountpoint), 20, "the daemon's unmount")
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 20, "the daemon's end")


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
def test_systemd_is_told(places: tuple[Path, Path], tmp_path: Path, abstract: bool) -> None:
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


# The end


def ended(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    assert process.wait(20) == 0
    assert mounts_at(mountpoint) == []


@contextmanager
def server(source: Path, mountpoint: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ready server that the test itself ends."""
    with background(FSD, "mount", source, mountpoint, *options) as process:
        assert line_of(process) == f"fsd: ready: {source} on {mountpoint}"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(20)
            while mounts_at(mountpoint):
                subprocess.run(["umount", "-l", mountpoint], check=True)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


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


# fsd status


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
    refused(run([FSD, "status", tmp_path]), "no mount of fsd")
    refused(run([FSD, "status", tmp_path / "missing"]), "no mount of fsd")


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


# fsd-guest marks


def marks_of(share: Mount, pid: int) -> list[dict[str, Any]]:
    return [mark for mark in share.marks() if mark["pid"] == pid]


def test_marks(share: Mount) -> None:
    (share.source / "dir").mkdir()
    (share.source / "file").touch()
    with background(
        "inotifywait", "-m", "-q", "-e", "create,delete",
        share.mountpoint / "dir", share.mountpoint / "file",
    ) as watcher:  # fmt: skip
        share.wait_armed(share.mountpoint / "dir", share.mountpoint / "file", pid=watcher.pid)
        marks = sorted(marks_of(share, watcher.pid), key=lambda mark: mark["wd"])
        assert [mark["path"] for mark in marks] == [
            str(share.mountpoint / "dir"), str(share.mountpoint / "file"),
        ]  # fmt: skip
        for mark in marks:
            assert mark["process"] == "inotifywait"
            assert mark["mask"] == ["create", "delete"]
            assert mark["armed"] is True
        assert [mark["wd"] for mark in marks] == [1, 2]
        numbers = [os.stat(share.source / name).st_ino for name in ("dir", "file")]
        assert [mark["nodeid"] for mark in marks] == numbers
        table = run([GUEST, "marks", share.mountpoint])
        assert table.returncode == 0
        heads, *rows = table.stdout.splitlines()
        assert heads.split() == ["PID", "PROCESS", "WD", "NODEID", "ARMED", "PATH", "MASK"]
        row = next(row.split() for row in rows if str(share.mountpoint / "dir") in row)
        assert row[:3] == [str(watcher.pid), "inotifywait", "1"]
        assert row[4] == "yes"
    wait_until(lambda: not share.marks(), 10, "the end of the marks")
    wait_until(
        lambda: not status_of(share.mountpoint)["guests"][0]["marks"], 10, "the server's marks' end"
    )


def test_marks_without_an_agent_are_not_armed(share_no_agent: Mount) -> None:
    """The twin: the kernel holds the mark, and nobody has published it."""
    share = share_no_agent
    with background("inotifywait", "-m", share.mountpoint) as watcher:
        wait_until(lambda: marks_of(share, watcher.pid), 10, "the mark")
        (mark,) = marks_of(share, watcher.pid)
        assert mark["armed"] is False
        assert "create" in mark["mask"]


FANOTIFY = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
flags, path = int(sys.argv[1], 0), sys.argv[2].encode()
fd = libc.fanotify_init(0, os.O_RDONLY)
mask = 0x2 | 0x8  # FAN_MODIFY, FAN_CLOSE_WRITE
mask |= 0x08000000 if flags == 1 else 0  # EVENT_ON_CHILD: for an inode mark on a directory
result = libc.fanotify_mark(fd, flags, ctypes.c_uint64(mask), -100, path)
if fd < 0 or result < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
print("marked", flush=True)
while True:
    buffer = os.read(fd, 4096)
    while buffer:
        length, _, _, _, mask, event_fd, pid = struct.unpack_from("=IBBHQii", buffer)
        print(hex(mask), os.readlink(f"/proc/self/fd/{event_fd}"), flush=True)
        os.close(event_fd)
        buffer = buffer[length:]
"""
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM = 0x1, 0x10, 0x100
FAN_MODIFY, FAN_CLOSE_WRITE = 0x2, 0x8


@pytest.mark.parametrize(
    ("kind", "nodeid"),
    [(0, None), (FAN_MARK_MOUNT, 0), (FAN_MARK_FILESYSTEM, 0)],
    ids=["inode", "mount", "filesystem"],
)
def test_fanotify_marks_show_up_armed_and_work(share: Mount, kind: int, nodeid: int | None) -> None:
    (share.source / "deep/er").mkdir(parents=True)
    (share.source / "deep/file").write_text("x")
    where = share.mountpoint / "deep" if nodeid is None else share.mountpoint
    with background(sys.executable, "-c", FANOTIFY, hex(FAN_MARK_ADD | kind), where) as watcher:
        assert line_of(watcher) == "marked", line_of(watcher, stderr=True)
        # Its look-up came before, its mark without one: the slow safety net may have to find it.
        share.wait_armed(where, pid=watcher.pid, timeout=45)
        (mark,) = marks_of(share, watcher.pid)
        assert mark["wd"] == -1
        assert mark["mask"] == ["modify", "close_write"]
        assert mark["nodeid"] == (os.stat(where).st_ino if nodeid is None else nodeid)
        with open(share.source / "deep/file", "a") as file:
            file.write("y")
        told = until_closed(watcher, share.mountpoint / "deep/file")
        # A limit: a mark on the whole file system is one on the agent's channel, too.
        channel = {"/.fsd/control"} if kind == FAN_MARK_FILESYSTEM else set()
        assert told == channel
        # And between events the mountpoint is as idle as without such a mark.
        wait_until(lambda: not status_of(share.mountpoint)["guests"][0]["depth"], 10, "rest")
        held = [os.readlink(fd) for fd in Path(f"/proc/{agent_of(share)}/fd").iterdir()]
        assert not [path for path in held if path.startswith(str(share.mountpoint))]


def until_closed(watcher: subprocess.Popen[bytes], file: Path) -> set[str]:
    """Read what fanotify tells, until the file's change is told; what else it told of."""
    told: dict[str, int] = {}
    while not told.get(str(file), 0) & FAN_CLOSE_WRITE:
        bits, path = line_of(watcher).split(" ", 1)
        told[path] = told.get(path, 0) | int(bits, 0)
    assert told.pop(str(file)) & FAN_MODIFY
    return set(told)


def test_what_was_open_before_the_mark_has_no_modify(share: Mount) -> None:
    """A limit for groups that report by descriptor: the agent has no file of it to write to."""
    path = share.mountpoint / "file"
    with open(share.source / "file", "w") as file:
        kind = hex(FAN_MARK_ADD)
        with background(sys.executable, "-c", FANOTIFY, kind, share.mountpoint) as watcher:
            assert line_of(watcher) == "marked", line_of(watcher, stderr=True)
            share.wait_armed(share.mountpoint, pid=watcher.pid, timeout=45)
            file.write("x")
            file.close()
            assert line_of(watcher) == f"{FAN_CLOSE_WRITE:#x} {path}"


def agent_of(share: Mount) -> int:
    pid: int = status_of(share.mountpoint)["guests"][0]["agent_pid"]
    return pid


def test_a_mount_mark_on_a_bind_mount_hears_nothing(share: Mount, tmp_path: Path) -> None:
    """A limit: the agent works through the mountpoint, and events carry the mount."""
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", share.mountpoint, tmp_path / "bound"], check=True)
    kind = hex(FAN_MARK_ADD | FAN_MARK_MOUNT)
    try:
        with (
            background(sys.executable, "-c", FANOTIFY, kind, tmp_path / "bound") as bound,
            background(sys.executable, "-c", FANOTIFY, kind, share.mountpoint) as direct,
        ):
            for watcher in (bound, direct):
                assert line_of(watcher) == "marked", line_of(watcher, stderr=True)
            share.wait_armed(share.mountpoint, pid=direct.pid, timeout=45)
            (share.source / "file").write_text("x")
            assert until_closed(direct, share.mountpoint / "file") == set()
            (tmp_path / "bound/own").write_text("x")
            assert line_of(bound).endswith("/own")
    finally:
        subprocess.run(["umount", "-l", tmp_path / "bound"], check=True)


@pytest.mark.parametrize("name", ["control", "session"])
def test_a_channel_opened_for_reading_is_an_empty_file(share: Mount, name: str) -> None:
    path = share.mountpoint / ".fsd" / name
    before = len(status_of(share.mountpoint)["guests"])
    with open(path, "rb", buffering=0) as file:
        assert file.read() == b""
        assert len(status_of(share.mountpoint)["guests"]) == before
    with pytest.raises(PermissionError):
        os.open(path, os.O_WRONLY)
    with background("inotifywait", "-m", "-q", share.mountpoint) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "x").mkdir()
        assert line_of(watcher) == f"{share.mountpoint}/ CREATE,ISDIR x"


# fsd-guest mark


def by_hand(share: Mount) -> dict[str, list[str]]:
    guests = status_of(share.mountpoint)["guests"]
    hand = [guest for guest in guests if guest["kind"] == "by hand"]
    return {mark["path"]: mark["mask"] for guest in hand for mark in guest["armed"]}


def mark(*arguments: str | Path) -> str:
    done = run([GUEST, "mark", *arguments])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_mark_add_modify_remove(share_no_agent: Mount) -> None:
    share = share_no_agent
    (share.source / "dir").mkdir()
    path = share.mountpoint / "dir"
    number = os.stat(path).st_ino
    assert mark("add", path, "--mask", "create") == f"{path} (nodeid {number}): IN_CREATE\n"
    assert by_hand(share) == {"dir": ["create"]}
    assert mark("add", path, "--mask", "delete,IN_MODIFY").endswith(
        ": IN_MODIFY|IN_CREATE|IN_DELETE\n"
    )
    assert by_hand(share) == {"dir": ["modify", "create", "delete"]}
    mark("modify", path, "--mask", "attrib")
    assert by_hand(share) == {"dir": ["attrib"]}
    (share.source / "dir").chmod(0o700)
    wait_until(
        lambda: _counted(share) == {"attrib": {"forwarded": 1, "replayed": 1}},
        5,
        "the counted event",
    )
    assert mark("remove", path).endswith(": 0\n")
    assert by_hand(share) == {}
    assert status_of(share.mountpoint)["host_watches"] == 0


def _counted(share: Mount) -> dict[str, dict[str, int]]:
    guests = status_of(share.mountpoint)["guests"]
    kinds: dict[str, dict[str, int]] = next(g for g in guests if g["kind"] == "by hand")["by_kind"]
    return kinds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "--mask", "isdir"], "Invalid argument"),
        (["add", "--mask", "oneshot|ignored"], "Invalid argument"),
        (["add", "--mask", "bogus"], "unknown event 'bogus'"),
        (["add", "--mask", ""], "--mask"),
        (["add"], "--mask is missing"),
        (["modify", "--mask", "create"], "no mark by hand"),
        (["remove"], "no mark by hand"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mark_refused(share_no_agent: Mount, arguments: list[str], says: str) -> None:
    action, *rest = arguments
    done = run([GUEST, "mark", action, share_no_agent.mountpoint, *rest])
    refused(done, says, who="fsd-guest")
    assert by_hand(share_no_agent) == {}


def test_mark_of_a_missing_path(share_no_agent: Mount) -> None:
    missing = share_no_agent.mountpoint / "missing"
    refused(run([GUEST, "mark", "add", missing, "--mask", "all"]), "No such file", who="fsd-guest")


# fsd-guest watch


def established(watcher: subprocess.Popen[bytes]) -> None:
    assert line_of(watcher, stderr=True) == "watches established"


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
        assert watcher.wait(10) == 130
    wait_until(lambda: len(status_of(share.mountpoint)["guests"]) == 1, 10, "the observer's end")
    assert status_of(share.mountpoint)["host_watches"] == 0


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
        told = [line_of(watcher) for _ in range(100)]
    assert told == [f"{share.mountpoint}/ CREATE,ISDIR d{number}" for number in range(100)]


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


# An ordinary user


@contextmanager
def users_mount(tmp_path: Path, *options: str) -> Iterator[tuple[Mount, Path]]:
    """A mount made by nobody, by fusermount3, in a namespace of its own."""
    with world_readable() as top:
        source, mountpoint = top / "source", top / "mount"
        for directory in (source, mountpoint):
            directory.mkdir()
            os.chown(directory, UID, UID)
        setup = f"{device_of_everybody(tmp_path)}\n{python_of_everybody(tmp_path)}"
        line = private(setup, *as_user(), FSD, "mount", source, mountpoint, *options)
        with background(*line) as process:
            assert line_of(process, 30) == f"fsd: ready: {source} on {mountpoint}", (
                process.stderr.read() if process.stderr and process.poll() is not None else ""
            )
            try:
                yield Mount(source, mountpoint, process), top
            finally:
                process.terminate()
                process.wait(20)


def test_an_ordinary_users_mount(tmp_path: Path) -> None:
    with users_mount(tmp_path) as (share, _):
        process = share.process
        said = line_of(process, stderr=True)
        assert said.startswith("fsd: not root: ")
        user = inside(process.pid, *as_user())
        kinds = "create,modify,close_write,move,delete"
        with background(*user, "inotifywait", "-mq", "-e", kinds, share.mountpoint) as watcher:

            def armed() -> bool:
                done = run([*user, str(GUEST), "marks", str(share.mountpoint), "--json"])
                assert done.returncode == 0, done.stderr
                return any(row["armed"] for row in json.loads(done.stdout))

            wait_until(armed, 20, "the armed mark")
            (share.source / "made").mkdir()
            assert line_of(watcher) == f"{share.mountpoint}/ CREATE,ISDIR made"
            (share.source / "text").write_text("x")
            assert [line_of(watcher).split()[1:] for _ in range(3)] == [
                ["CREATE", "text"], ["MODIFY", "text"], ["CLOSE_WRITE,CLOSE", "text"],
            ]  # fmt: skip
            (share.source / "text").rename(share.source / "new")
            (share.source / "new").unlink()
            assert [line_of(watcher).split()[1:] for _ in range(3)] == [
                ["MOVED_FROM", "text"], ["MOVED_TO", "new"], ["DELETE", "new"],
            ]  # fmt: skip
        made = run([*user, "sh", "-c", f"echo y > {share.mountpoint}/own; id -u"])
        assert (made.returncode, made.stdout) == (0, f"{UID}\n")
        assert (share.source / "own").stat().st_uid == UID
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""  # what is reduced was said once


def test_an_ordinary_users_mount_without_an_agent(tmp_path: Path) -> None:
    """The twin: nothing arrives."""
    with users_mount(tmp_path, "--no-agent") as (share, _):
        user = inside(share.process.pid, *as_user())
        with background(*user, "inotifywait", "-m", share.mountpoint) as watcher:
            while "established" not in line_of(watcher, stderr=True):
                pass
            (share.source / "host").mkdir()
            run([*user, "mkdir", share.mountpoint / "own"])
            assert line_of(watcher) == f"{share.mountpoint}/ CREATE,ISDIR own"


def test_an_ordinary_users_removed_working_directory(tmp_path: Path) -> None:
    with users_mount(tmp_path) as (share, _):
        user = inside(share.process.pid, *as_user())
        script = "mkdir d && cd d && rmdir ../d && ls -a . && stat -c %h . && getfacl -c ."
        done = run([*user, "sh", "-c", f"cd {share.mountpoint} && {script}"])
        assert (done.returncode, done.stdout.split()[0]) == (0, "0"), done


def test_an_ordinary_user_unmounts(tmp_path: Path) -> None:
    with users_mount(tmp_path) as (share, _):
        user = inside(share.process.pid, *as_user())
        done = run([*user, "fusermount3", "-u", "-z", share.mountpoint])
        assert done.returncode == 0, done.stderr
        assert share.process.wait(20) == 0
