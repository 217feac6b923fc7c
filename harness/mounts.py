"""Real mounts for tests: the installed ``fsd mount`` as a separate process.

Apart from conftest.py so that tests can make mounts with other options, or several of them.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from protocol.mountinfo import parse_mountinfo

T = TypeVar("T")

START_TIMEOUT = 30.0  # an import of everything on a busy machine of two cores
STOP_TIMEOUT = 20.0


def command(name: str) -> Path:
    """An installed command of the project: of the environment that runs the tests, not of PATH."""
    return Path(sys.executable).parent / name


def wait_until(condition: Callable[[], T], timeout: float = 10, what: str = "") -> T:
    """The first truthy value of ``condition``; AssertionError if there is none in ``timeout`` s."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        last = deadline <= time.monotonic()  # taken before: a slow condition gets its last chance
        value = condition()
        if value:
            return value
        if last:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def mounts_at(path: Path) -> list[str]:
    """The types of the file systems that are mounted at ``path``, the lowest first."""
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    return [mount.fstype.decode() for mount in mounts if mount.point == os.fsencode(path)]


@dataclass(frozen=True)
class Mount:
    """A served directory; ``source`` is the host's side, ``mountpoint`` the guest's."""

    source: Path
    mountpoint: Path
    process: subprocess.Popen[bytes]

    def marks(self) -> list[dict[str, Any]]:
        """The guest's marks as ``fsd-guest marks`` lists them."""
        done = subprocess.run(
            [command("fsd-guest"), "marks", self.mountpoint, "--json"],
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"fsd-guest marks failed: {done.stderr.decode()}"
        marks: list[dict[str, Any]] = json.loads(done.stdout)
        return marks

    def wait_armed(self, *paths: Path, pid: int | None = None, timeout: float = 10) -> None:
        """Wait until the server has armed a mark, of ``pid`` if given, on each of ``paths``."""
        wanted = {str(path) for path in paths}
        marks: list[dict[str, Any]] = []

        def armed() -> bool:
            assert self.process.poll() is None, "fsd ended while its marks were waited for"
            marks[:] = self.marks()
            return wanted <= {
                mark["path"] for mark in marks if mark["armed"] and pid in (None, mark["pid"])
            }

        try:
            wait_until(armed, timeout, f"armed marks on {sorted(wanted)}")
        except AssertionError as error:
            error.add_note(f"the marks of pid {pid or 'any'} were wanted, these are there: {marks}")
            raise


def await_ready(process: subprocess.Popen[bytes], stdout: IO[bytes]) -> str:
    """The first line that the server prints, '' if it exits without; bounded by START_TIMEOUT."""
    deadline = time.monotonic() + START_TIMEOUT
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            assert selector.select(max(0.0, deadline - time.monotonic())), (
                f"fsd is not ready after {START_TIMEOUT} s (it printed {line!r})"
            )
            chunk = os.read(stdout.fileno(), 4096)
            if not chunk:
                process.wait(STOP_TIMEOUT)
                return ""
            line += chunk
    return os.fsdecode(line.rstrip(b"\n"))


def session_of(leader: int) -> list[int]:
    """The living processes of the session that ``leader`` started."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; then state, ppid, pgrp, session.
            state, _, _, session = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except OSError:
            continue  # ended while we looked
        if int(session) == leader and state not in "ZX":
            members.append(int(stat.parent.name))
    return members


def _end_by_force(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """Leave no process and no mount behind, whatever state they are in."""
    for pid in session_of(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT)
    while mounts_at(mountpoint):
        tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*tool, mountpoint], check=True, timeout=STOP_TIMEOUT)


def _stop(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """Stop the server as a user would, and check that it leaves nothing behind."""
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"fsd is still there {STOP_TIMEOUT} s after SIGTERM") from None
    assert code == 0, f"fsd ended with exit code {code}"
    left = mounts_at(mountpoint)
    assert not left, f"fsd ended and left {left} mounted at {mountpoint}"
    wait_until(lambda: not session_of(process.pid), 5, "fsd ended, what it started did not")


@contextmanager
def mounted(source: Path, mountpoint: Path, *options: str) -> Iterator[Mount]:
    """Serve ``source`` at ``mountpoint`` for the block; both must be existing directories.

    At the end the server must stop on SIGTERM with exit code 0, leave nothing mounted and no
    process, and have printed no traceback. Failures include its stderr.
    """
    assert not mounts_at(mountpoint), f"{mountpoint} is a mount already"
    with tempfile.TemporaryFile() as stderr:

        def log() -> str:
            stderr.seek(0)
            return f"--- stderr of fsd mount {source}:\n{stderr.read().decode(errors='replace')}"

        process = subprocess.Popen(
            [command("fsd"), "mount", source, mountpoint, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # ^C goes to pytest only; and the session marks its processes
        )
        assert process.stdout is not None
        try:
            line = await_ready(process, process.stdout)
            ready = f"fsd: ready: {source} on {mountpoint}"
            code = process.poll()
            assert line == ready, f"fsd printed {line!r}, not {ready!r} (its exit code: {code})"
            assert mounts_at(mountpoint), "fsd says it is ready, and nothing is mounted"

            yield Mount(source, mountpoint, process)

            _stop(process, mountpoint)
            assert "Traceback (most recent call last)" not in log(), "fsd wrote a traceback"
        except BaseException as error:
            error.add_note(log())
            raise
        else:
            sys.stderr.write(log())  # pytest shows it if the test has failed
        finally:
            process.stdout.close()
            _end_by_force(process, mountpoint)
