"""The POSIX map over this transport: all its cases in a stock guest.

What a case does on the host's side it does through a second device of the same server, which is
another guest to it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harness.share_server import shared
from harness.vm import Guest, GuestError, GuestProcess, guest
from tests.mount.exclusions import GUEST as EXCLUDED
from tests.mount.posix_cases import CASES
from tests.mount.posix_parameters import PARAMETERS
from tests.mount.posix_support import User

CASE_SECONDS = 170
"""The longest takes 17 s where nothing else runs."""
pytestmark = pytest.mark.timeout(CASE_SECONDS + 60)
ONCE = ("readdir_5000_entries",)
"""Takes long in an emulated machine, and says the same for each user."""
RUNS = [run for run in PARAMETERS if not (run.values[0] in ONCE and run.values[1])]


class Runner:
    """The program that runs cases in the guest; started anew after a case that hangs."""

    def __init__(self, vm: Guest) -> None:
        self._vm = vm
        self._process: GuestProcess | None = None

    def run(self, name: str, user: User | None) -> str:
        """What goes wrong in a case; empty if nothing does."""
        if self._process is None:
            command = ["python3", "-m", "tests.mount.posix_runner", "/mnt", "/host"]
            self._process = self._vm.start(command, cwd="/suite")
            assert self._process.line(30) == "READY"
        self._process.write(f"{name} {'user' if user else 'root'}\n".encode())
        try:
            problem: str = json.loads(self._process.line(CASE_SECONDS))
        except GuestError:
            self._process = None
            raise
        return problem


@contextmanager
def _runner() -> Iterator[Runner]:
    with (
        tempfile.TemporaryDirectory(prefix="fsd-posix-") as source,
        shared(Path(source), 2, "--posix-acl") as server,
        guest({"share": server.paths[0], "host": server.paths[1]}) as vm,
    ):
        Path(source).chmod(0o755)
        vm.mount("share")
        vm.mount("host", "/host")
        vm.run("date -s @$(($(date +%s) + 5))")  # never the host's time by chance
        yield Runner(vm)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with ExitStack() as stack:
        yield stack.enter_context(_runner())


@pytest.mark.parametrize(("name", "user"), RUNS)
def test_posix(name: str, user: User | None, runner: Runner) -> None:
    problem = runner.run(name, user)
    if name in EXCLUDED:
        assert problem, "it passes now: take it off the list"
    else:
        assert not problem, problem


def test_exclusions_name_cases() -> None:
    assert set(EXCLUDED) <= set(CASES)
