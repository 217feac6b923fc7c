"""The tests' end of ``driver``, and the commands under test as processes."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.mounts import command

DRIVER = Path(__file__).with_name("driver.py")
# The system's: ours may be where an ordinary user cannot execute it.
PYTHON = (shutil.which("python3", path="/usr/bin") or sys.executable, "-I", "-S", DRIVER)
TIMEOUT = 60.0


class Remote:
    """A process that runs the driver."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.stderr = ""

    def _line(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(TIMEOUT), "the driver does not answer"
        return self.process.stdout.readline()

    def __call__(self, expression: str) -> Any:
        """The value of an expression there."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(expression) + "\n")
        self.process.stdin.flush()
        value, error = json.loads(self._line())
        assert error is None, f"{expression}: {error}"
        return value

    def marks(self, fd: int) -> list[str]:
        """Lines of fdinfo about marks and entries, sorted."""
        text: str = self(f"fdinfo({fd})")
        return sorted(line for line in text.splitlines() if line.split(":")[0] not in _HEAD)


_HEAD = ("pos", "flags", "mnt_id", "ino")


@contextmanager
def remote(*prefix: str | Path, env: dict[str, str] | None = None) -> Iterator[Remote]:
    """The driver, as the command that ``prefix`` starts, if that is given."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*prefix, *PYTHON],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **(env or {})},
            errors="surrogateescape",
        )
        driver = Remote(process)
        try:
            started = driver._line()
            stderr.seek(0)
            driver.stderr = stderr.read()
            assert started == "true\n", f"the driver did not start:\n{driver.stderr}"
            yield driver
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


def guest(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    """Run fsd-guest."""
    done = subprocess.run(
        [command("fsd-guest"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        errors="surrogateescape",
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def save(driver: Remote, directory: Path, *options: str) -> str:
    """Checkpoint a driver; what the command says."""
    done = guest("checkpoint", "--pid", driver.pid, *options, directory)
    assert done.returncode == 0, done.stderr
    return done.stderr


def shown(directory: Path) -> dict[str, Any]:
    """A checkpoint as JSON."""
    done = guest("show", directory, "--json")
    assert done.returncode == 0, done.stderr
    state: dict[str, Any] = json.loads(done.stdout)
    return state


@contextmanager
def restored(directory: Path, *options: str) -> Iterator[Remote]:
    """A driver that starts with a checkpoint's descriptors."""
    with remote(command("fsd-guest"), "restore", *options, directory, "--") as driver:
        yield driver
