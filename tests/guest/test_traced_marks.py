"""Marks on names that a kernel keeps: no request shows them, only the trace of the calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.guest_agents import start_agent, status
from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import Guest, GuestProcess, guest

INSTANCES = "/sys/kernel/tracing/instances"
HINTS_LAST = 3.5
"""Seconds after a look-up in which the agent keeps scanning the process that made it."""
SOON = 0.5
"""Seconds: a bound for a guest that is emulated, where the trace takes some 20 ms."""
PROGRAM = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
def watch(path):
    inotify = libc.inotify_init1(0)
    assert libc.inotify_add_watch(inotify, path.encode(), 0x100) > 0  # IN_CREATE
    print("watching", flush=True)
    while True:
        for event in os.read(inotify, 4096).split(b"\\0"):
            name = event.strip(bytes(range(33)))
            if name:
                print(os.fsdecode(name), flush=True)
os.stat(sys.argv[1])
print("looked", flush=True)
for line in sys.stdin:
    threading.Thread(target=watch, args=sys.argv[1:2], daemon=True).start()
"""
"""Looks at a directory, and watches it when asked to, in a thread."""
CALLS = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
path = sys.argv[1].encode()
inotify, fanotify = libc.inotify_init1(0), libc.fanotify_init(0, 0)
def fanotify_mark(flags):
    return libc.fanotify_mark(fanotify, flags, ctypes.c_uint64(0x20), -100, path)  # FAN_OPEN
os.stat(path)
print("looked", flush=True)
for call in (
    lambda: libc.inotify_add_watch(inotify, path, 0x100) - 1,
    lambda: libc.inotify_add_watch(inotify, path, 0x20000200) - 1,  # IN_MASK_ADD
    lambda: fanotify_mark(1),  # FAN_MARK_ADD
    lambda: libc.inotify_rm_watch(inotify, 1),
    lambda: fanotify_mark(2),  # FAN_MARK_REMOVE
):
    sys.stdin.readline()
    assert call() == 0
    print("done", flush=True)
sys.stdin.readline()
"""
AGENT = (
    "import sys; sys.path.insert(0, '/fsd-guest.pyz')\n"
    "import guest_tools.agent.schedule as schedule; schedule.FULL_EVERY = 8.0\n"
    "from guest_tools.cli import main; sys.exit(main(['agent', '/mnt']))"
)
"""The agent, with its slow scan made faster."""


class Case:
    """A guest that keeps all names for a day."""

    def __init__(self, source: Path, vm: Guest) -> None:
        self.source, self.vm = source, vm
        self._count = 0

    def watchers(self, *names: str) -> list[GuestProcess]:
        """Programs that have looked at a directory each, some time ago; that in "apart" has a pid
        namespace of its own.
        """
        programs = []
        for name in names:
            (self.source / name).mkdir()
            apart = ["unshare", "-p", "-f"] if name == "apart" else []
            programs.append(self.vm.start([*apart, "python3", "-c", PROGRAM, f"/mnt/{name}"]))
        for program in programs:
            assert program.line() == "looked"
        time.sleep(HINTS_LAST)
        return programs

    def first_event(self, program: GuestProcess, name: str, within: float) -> float | None:
        """Seconds from its watch to the first change on the host that it hears of. No request but
        those of the agent is made meanwhile.
        """
        program.write(b"\n")
        assert program.line() == "watching"
        begun = time.monotonic()
        made: dict[str, float] = {}
        while time.monotonic() - begun < within:
            self._count += 1
            new = f"n{self._count}"
            made[new] = time.monotonic() - begun
            (self.source / name / new).touch()
            time.sleep(0.02)
            if "n" in program.stdout.partition("watching\n")[2]:
                return made[program.line()]
        return None

    def instances(self) -> list[str]:
        """Traces that are there."""
        return self.vm.run(["ls", INSTANCES]).stdout.split()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    source = tmp_path_factory.mktemp("share")
    with shared(source, cache="always") as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        yield Case(source, vm)


def test_a_mark_is_found_at_once(case: Case) -> None:
    agent = start_agent(case.vm)
    assert agent.stderr == ""
    try:
        assert status(case.vm)["guests"][0]["keeps_names"] is True
        names = ("one", "two", "apart")
        for name, program in zip(names, case.watchers(*names), strict=True):
            after = case.first_event(program, name, 10)
            assert after is not None
            assert after < 4 * SOON  # beside busy programs it was 0.7 s
    finally:
        agent.signal()
        agent.wait(3)  # it need not wait for its long poll


def test_each_call_is_noticed(case: Case) -> None:
    (case.source / "calls").mkdir()
    agent = start_agent(case.vm)
    program = case.vm.start(["python3", "-c", CALLS, "/mnt/calls"])
    assert program.line() == "looked"
    time.sleep(HINTS_LAST)

    def marks() -> list[list[str]]:
        (mount,) = [guest for guest in status(case.vm)["guests"] if guest["kind"] == "mount"]
        return [mark["mask"] for mark in mount["armed"] if mark["path"] == "calls"]

    try:
        for wanted in (
            ["create"],
            ["create", "delete"],
            ["open", "create", "delete"],
            ["open"],
            [],
        ):
            program.write(b"\n")
            assert program.line() == "done"
            wait_until(lambda: marks() == [wanted] * bool(wanted), 5, str(wanted))  # noqa: B023
    finally:
        program.signal()
        agent.signal()
        agent.wait()


def test_without_a_trace_it_is_found_by_the_slow_scan(case: Case) -> None:
    """The counterpart. It says so once."""
    case.vm.run(f"mount -t tmpfs none /sys/kernel/tracing && mkdir {INSTANCES}")
    try:
        agent = case.vm.start(["python3", "-c", AGENT])
        agent.wait_output("ready", 30)
        said = agent.stderr.splitlines()
        instances = case.instances()
        (program,) = case.watchers("slow")
        after = case.first_event(program, "slow", 20)
        agent.signal()
        agent.wait()
        assert said == [
            "fsd-guest: cannot trace the calls that set marks: No such file or directory; marks on "
            "names that the kernel has cached may be found up to 30 s late"
        ]
        assert instances == []
        assert after is not None
        assert SOON < after < 9
    finally:
        case.vm.run("umount /sys/kernel/tracing")


def test_it_costs_nothing_at_rest(case: Case) -> None:
    agent = start_agent(case.vm)
    time.sleep(HINTS_LAST)
    tasks = case.vm.run(["ls", f"/proc/{agent.pid}/task"]).stdout.split()
    others = [task for task in tasks if task != str(agent.pid)]  # than the one in its long poll
    times = f"cd /proc/{agent.pid}/task && grep ctxt_switches {'/status '.join(others)}/status"
    before = case.vm.run(times).stdout
    case.vm.run("sleep 3")
    after = case.vm.run(times).stdout
    agent.signal()
    agent.wait()
    assert after == before


def test_nothing_is_left_behind(case: Case) -> None:
    """By an agent that is ended, or whose mount goes; and the next one removes what a killed one
    has left.
    """
    killed = start_agent(case.vm)
    assert case.instances() == [f"fsd-agent-{killed.pid}"]
    killed.signal(9)
    killed.wait()
    assert case.instances() == [f"fsd-agent-{killed.pid}"]
    agent = start_agent(case.vm)
    assert case.instances() == [f"fsd-agent-{agent.pid}"]
    agent.signal()
    assert agent.wait().status == -15
    assert case.instances() == []
    # tracefs is mounted nowhere
    case.vm.run("umount /sys/kernel/tracing")
    private = start_agent(case.vm)
    case.vm.run("mount -t tracefs none /sys/kernel/tracing")
    assert case.instances() == [f"fsd-agent-{private.pid}"]
    case.vm.run("umount /mnt", timeout=40)
    assert private.wait().status == 0
    wait_until(lambda: case.instances() == [], 5, "no trace is left")
    case.vm.mount("share")
