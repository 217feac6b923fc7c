"""The fidelity comparison in a stock guest: a watcher on the source, and one in the guest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.guest_agents import start_agent, wait_armed
from harness.share_server import shared
from harness.vm import Guest, GuestError, guest
from tests.fidelity.compare import Stream, load
from tests.fidelity.run import STEP_TIMEOUT, Arena, Case, Process, Watching, job, run
from tests.fidelity.test_fidelity import LIMITS

pytestmark = pytest.mark.timeout(180)
MNT = Path("/mnt")
OUTPUT = Path("/tmp/stream.json")


class GuestWatcher:
    """The watcher program in a guest."""

    side = "guest"

    def __init__(self, vm: Guest, base: Path, paths: list[bytes], mask: int) -> None:
        self._vm = vm
        self.process = vm.start(["python3", "-m", "tests.fidelity.watcher"], cwd="/suite")
        self.process.write(job(base, paths, mask, OUTPUT))
        self.process.write(None)

    def start(self, timeout: float = STEP_TIMEOUT) -> None:
        self.process.wait_output("READY\n", timeout)

    def saw(self, marker: bytes, timeout: float) -> bool:
        try:
            self.process.wait_output(f"MARK {marker.decode()}\n", timeout)
        except GuestError:
            return False
        return True

    def finish(self, timeout: float) -> bool:
        try:
            return self.process.wait(timeout).status == 0
        except GuestError:
            return False

    def stream(self) -> Stream:
        self.process.signal()
        assert self.process.wait().status == 0, "the guest's watcher failed"
        return load(self._vm.run(["cat", OUTPUT]).stdout)

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.signal()


@dataclass(frozen=True, kw_only=True)
class GuestArena(Arena):
    """A directory of the share."""

    vm: Guest

    def watch(self, paths: list[bytes], mask: int) -> Watching:
        return GuestWatcher(self.vm, self.mountpoint, paths, mask)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Guest]]:
    source = tmp_path_factory.mktemp("fidelity") / "source"
    source.mkdir()
    with shared(source) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        start_agent(vm)
        yield source, vm


@pytest.mark.parametrize("files", [False, True], ids=["dirs", "files"])
@pytest.mark.parametrize("burst", [False, True], ids=["paced", "burst"])
def test_equal(place: tuple[Path, Guest], burst: bool, files: bool) -> None:
    source, vm = place
    case = Case(80 + files, 500 if burst else 80, burst, files, without=LIMITS)
    name = f"{burst:d}{files:d}"
    (source / name).mkdir()

    def arm(paths: Sequence[Path], process: Process) -> None:
        wait_armed(vm, process.pid, paths)

    arena = GuestArena(source / name, MNT / name, source.with_name(f"outside{name}"), arm, vm=vm)
    outcome = run(case, arena)
    print(f"{len(outcome.mount)} events, {outcome.seconds:.1f} s")
    report = outcome.report()
    assert not report, report
    assert len(outcome.native) > 150
