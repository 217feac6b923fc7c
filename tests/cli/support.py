"""Calling the commands: what they print, how they refuse, daemons."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.mounts import command, mounts_at, wait_until
from harness.namespace import run

FSD, GUEST = command("fsd"), command("fsd-guest")


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
    """A process for the block."""
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


@contextmanager
def world_readable() -> Iterator[Path]:
    """A directory that ordinary users can enter, other than pytest's own."""
    with tempfile.TemporaryDirectory(prefix="fsd-user-") as top:
        os.chmod(top, 0o755)
        yield Path(top)


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


def mark(*arguments: str | Path) -> str:
    done = run([GUEST, "mark", *arguments])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def established(watcher: subprocess.Popen[bytes]) -> None:
    assert line_of(watcher, stderr=True) == "watches established"
