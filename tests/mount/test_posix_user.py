"""The POSIX map over mounts of an ordinary user, on either transport: what needs no root."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.namespace import ROOT, as_user, inside
from harness.usersmount import users_mount
from tests.mount.exclusions import LIBFUSE, ORDINARY
from tests.mount.posix_cases import CASES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")
CASE_SECONDS = 60
NAMES = [name for name, case in CASES.items() if not case.needs_root]


class Runner:
    """The program that runs cases as the mount's user, in its namespace."""

    def __init__(self, transport: str, process: subprocess.Popen[bytes]) -> None:
        self.excluded = {"devfuse": ORDINARY, "libfuse": ORDINARY | LIBFUSE}[transport]
        self._process = process
        assert self.line() == "READY"

    def line(self) -> str:
        assert self._process.stdout is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                assert selector.select(CASE_SECONDS), f"no line within {CASE_SECONDS} s: {line!r}"
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                assert chunk, f"the program has ended: {line!r}"
                line += chunk
        return line.decode().rstrip("\n")

    def run(self, name: str) -> str:
        """What goes wrong in a case; empty if nothing does."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} root\n".encode())
        self._process.stdin.flush()
        problem: str = json.loads(self.line())
        return problem


@pytest.fixture(scope="module", params=["devfuse", "libfuse"])
def runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    transport = request.param
    with ExitStack() as stack:
        option = f"--transport={transport}"
        share, _ = stack.enter_context(users_mount(tmp_path_factory.mktemp("user"), option))
        command: list[str | Path] = [
            *as_user(), "env", "-C", ROOT, "PYTHONDONTWRITEBYTECODE=1", ROOT / ".venv/bin/python",
            "-m", "tests.mount.posix_runner", share.mountpoint, share.source,
        ]  # fmt: skip
        process = stack.enter_context(
            subprocess.Popen(
                inside(share.process.pid, *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        stack.callback(process.kill)
        yield Runner(transport, process)


@pytest.mark.parametrize("name", NAMES)
def test_posix(name: str, runner: Runner) -> None:
    problem = runner.run(name)
    if name in runner.excluded:
        assert problem, "it passes now: take it off the list"
    else:
        assert not problem, problem


def test_exclusions_name_cases() -> None:
    assert set(ORDINARY) <= set(NAMES)
