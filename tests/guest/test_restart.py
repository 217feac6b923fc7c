"""Servers that end under a running guest: restart, upgrade and SIGKILL, and the guest continues."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.guest_agents import start_agent, start_watcher, status, wait_armed
from harness.mounts import wait_until
from harness.restarts import NAMES, Kept, Stop, kept, native_watcher, storm
from harness.share_server import Share
from harness.vm import Guest, GuestProcess, guest

pytestmark = pytest.mark.timeout(360)
WAYS = ["replace", "kill"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kept, Guest]]:
    with (
        kept(tmp_path_factory.mktemp("restart") / "source") as server,
        guest({"share": server.share.paths[0]}) as vm,
    ):
        vm.mount("share")
        start_agent(vm)
        yield server, vm


def is_locked(path: Path) -> tuple[bool, bool]:
    """Whether somebody has a lock of flock(2), of fcntl(2)."""
    found = []
    for lock in (fcntl.flock, fcntl.lockf):
        with path.open("r+") as file:
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(False)
            except BlockingIOError:
                found.append(True)
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS)
def test_open_files(place: tuple[Kept, Guest], way: str) -> None:
    """Files of all kinds that a program has open stay usable, with their locks; directories too."""
    server, vm = place
    holder = vm.start(["python3", "-m", "harness.open_files", f"/mnt/{way}"], cwd="/suite")
    assert holder.line(60) == "READY"
    folder = server.source / way
    for _ in range(3):
        server.again(way)
        assert is_locked(folder / "flocked") == (True, False)
        assert is_locked(folder / "locked") == (False, True)
        holder.write(b"check\n")
        assert holder.line(20) == "OK"
    holder.write(None)
    assert holder.wait().status == 0
    assert is_locked(folder / "flocked") == is_locked(folder / "locked") == (False, False)

    def held() -> list[str]:
        """What anybody on the host still has of it."""
        pids = (server.pid, server.share.keeper)
        return [x for pid in pids for x in Share([], pid).descriptors() if str(folder) in x]

    wait_until(lambda: not held(), 10, "files that nobody has open")


@pytest.mark.parametrize("way", WAYS)
def test_waiting_requests(place: tuple[Kept, Guest], way: str) -> None:
    """A program that waits for a lock, and one that a stopped server keeps waiting."""
    server, vm = place
    path = server.source / f"lock-{way}"
    path.touch()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); print('waits', flush=True); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('has it', flush=True)"
    )
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiter = vm.start(["python3", "-c", code, f"/mnt/{path.name}"])
        assert waiter.line() == "waits"
        vm.run(f"until grep -q request_wait /proc/{waiter.pid}/wchan; do :; done")
        for _ in range(2):
            server.again(way)
        assert waiter.status is None
    assert waiter.line() == "has it"
    assert waiter.wait().status == 0


@pytest.mark.parametrize("way", WAYS)
def test_events(place: tuple[Kept, Guest], way: str) -> None:
    """What the host does before, meanwhile and after is delivered; where the end was
    clean, each thing once.
    """
    server, vm = place
    folder = server.source / f"events-{way}"
    folder.mkdir()
    watcher = start_watcher(vm, f"/mnt/{folder.name}")
    names = []
    for step in range(3):
        names += [f"before{step}", f"meanwhile{step}", f"after{step}"]
        (folder / f"before{step}").touch()
        watcher.wait_output(f"CREATE before{step}", 20)
        if way == "kill":  # until there is an image that knows of the mark
            time.sleep(1)
        old = server.pid
        os.kill(old, signal.SIGSTOP)
        (folder / f"meanwhile{step}").touch()
        if way == "replace":
            os.kill(old, signal.SIGCONT)
        server.again(way)
        (folder / f"after{step}").touch()
        watcher.wait_output(f"CREATE after{step}", 30)
    created = [x.partition(" ")[2] for x in watcher.stdout.splitlines() if x.startswith("CREATE")]
    watcher.signal()
    if way == "kill":  # what came just before may be delivered again
        assert set(created) == set(names)
    else:
        assert sorted(created) == sorted(names)
    (state,) = status(vm)["guests"]
    assert state["refused"] == 0


def test_a_mark_set_right_before_an_upgrade(place: tuple[Kept, Guest]) -> None:
    """What happened since is delivered, though the agent has not reported the mark yet."""
    server, vm = place
    watchers = []
    for step in range(6):
        folder = server.source / f"young{step}"
        folder.mkdir()
        watched = f"/mnt/{folder.name}"
        watcher = vm.start(["inotifywait", "-m", *NAMES, "--format", "%e %f", watched])
        watcher.wait_output("Watches established.", of="err")
        (folder / "before").touch()
        server.again("replace")
        (folder / "after").touch()
        watchers.append(watcher)
    for watcher in watchers:
        watcher.wait_output("CREATE after", 30)
    seen = [watcher.stdout.splitlines() for watcher in watchers]
    for watcher in watchers:
        watcher.signal()
    assert seen == [["CREATE before", "CREATE after"]] * 6


def under_load(vm: Guest, folder: Path) -> tuple[GuestProcess, GuestProcess]:
    """Make a folder of the share; a program in the guest that works on files beside it, and its
    watcher of the folder.
    """
    folder.mkdir()
    beside = f"/mnt/beside-{folder.name}"
    busy = vm.start(["python3", "-m", "harness.busy_files", beside], cwd="/suite")
    assert busy.line(60) == "READY"
    watched = f"/mnt/{folder.name}"
    watcher = vm.start(["inotifywait", "-m", *NAMES, "--format", "%e %f", watched])
    watcher.wait_output("Watches established.", of="err")
    wait_armed(vm, watcher.pid, [Path(watched)])
    return busy, watcher


def test_upgrades_under_load(place: tuple[Kept, Guest]) -> None:
    """While the guest works on files and the host changes others, servers are replaced: no call
    fails, and the guest's watcher sees every event that a watcher on the host sees, in its order.
    """
    server, vm = place
    folder = server.source / "storm"
    busy, watcher = under_load(vm, folder)
    stop = Stop()
    with native_watcher(folder) as native, ThreadPoolExecutor() as threads, stop:
        stormed = threads.submit(storm, folder, stop)
        for _ in range(4):
            time.sleep(0.5)
            server.again("replace")
        time.sleep(0.5)
        stop.set()
        count = stormed.result()
        (folder / "last").touch()
        watcher.wait_output("CREATE last", 100)
        busy.write(None)
        assert busy.wait(60).status == 0
        wait_until(lambda: "CREATE last" in native.read_text(), 5)
        expected = native.read_text()
    assert watcher.stdout.splitlines() == expected.splitlines()
    rounds, longest, *failures = busy.stdout.splitlines()[1:]
    print(f"{count} steps of the host; {rounds} rounds in the guest, the longest {longest} s")
    assert not failures
    assert int(rounds) > 20
    (state,) = status(vm)["guests"]
    assert state["failed"] == 0


def test_kills_under_load(place: tuple[Kept, Guest]) -> None:
    """SIGKILL at any moment: nothing hangs, at most the call that was under way fails, with EIO;
    the guest's watcher ends with every name that is there.
    """
    server, vm = place
    folder = server.source / "kills"
    busy, watcher = under_load(vm, folder)
    stop = Stop()
    with ThreadPoolExecutor() as threads, stop:
        stormed = threads.submit(storm, folder, stop)
        for _ in range(4):
            time.sleep(0.8)
            server.again("kill")
        time.sleep(0.5)
        stop.set()
        count = stormed.result()
    (folder / "last").touch()
    watcher.wait_output("CREATE last", 100)
    busy.write(None)
    assert busy.wait(60).status == 0
    rounds, longest, *failures = busy.stdout.splitlines()[1:]
    print(f"{count} steps of the host; {rounds} rounds in the guest, the longest {longest} s")
    print(failures)
    assert len(failures) <= 4
    assert all("EIO" in x or "Input/output" in x or "FileExists" in x for x in failures)
    reported: set[str] = set()
    for line in watcher.stdout.splitlines():
        event, _, name = line.partition(" ")
        (reported.add if event in ("CREATE", "MOVED_TO") else reported.discard)(name)
    (state,) = status(vm)["guests"]
    assert state["failed"] == 0
    assert reported == set(os.listdir(folder))


def test_paused_and_reset(tmp_path: Path) -> None:
    """Servers die while the machine is paused, and when it was reset. Without file handles."""
    with (
        kept(tmp_path / "source", "--inode-file-handles=never") as server,
        guest({"share": server.share.paths[0]}) as vm,
    ):
        for boot in range(2):
            if boot:
                vm.reset()
                server.again("kill")
            vm.mount("share")
            start_agent(vm)
            watcher = start_watcher(vm)
            wait_armed(vm, watcher.pid, [Path("/mnt")])
            command = ["python3", "-m", "harness.open_files", f"/mnt/boot{boot}"]
            holder = vm.start(command, cwd="/suite")
            assert holder.line(30) == "READY"
            vm.qmp("stop")
            server.again("kill" if boot else "replace")
            (server.source / f"paused{boot}").touch()
            vm.qmp("cont")
            watcher.wait_output(f"CREATE paused{boot}", 20)
            server.again("kill")
            holder.write(b"check\n")
            assert holder.line(20) == "OK"
