"""What VMMs do to a device that a guest uses: pause, reset, end, many queues, much memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.guest_agents import start_agent, start_watcher
from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import guest


def test_pause(tmp_path: Path) -> None:
    """Requests under way outlive it; what happens meanwhile is delivered afterwards."""
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        vm.run("echo before > /mnt/file; exec 3< /mnt/file")
        start_agent(vm)
        watcher = start_watcher(vm)
        (tmp_path / "one").touch()
        watcher.wait_output("CREATE one")
        for name in ("two", "three"):
            vm.qmp("stop")
            (tmp_path / name).touch()
            vm.qmp("cont")
            watcher.wait_output(f"CREATE {name}")
        assert vm.run("cat /mnt/file").stdout == "before\n"


def test_reset(tmp_path: Path) -> None:
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        for boot in range(3):
            if boot:
                vm.reset()
            vm.mount("share")
            start_agent(vm)
            watcher = start_watcher(vm)
            (tmp_path / f"new{boot}").touch()
            watcher.wait_output(f"CREATE new{boot}")
            assert len(vm.run("ls /mnt").stdout.split()) == boot + 1


@pytest.mark.parametrize("handed", [False, True], ids=["path", "fd"])
def test_the_next_vmm(tmp_path: Path, handed: bool) -> None:
    """A VMM that is killed in the middle of things, and another on the same socket, which the
    server has made or was given as libvirt gives it.
    """
    with shared(tmp_path, handed=handed) as server:
        before = server.descriptors()
        for boot in range(2):
            with guest({"share": server.paths[0]}) as vm:
                vm.mount("share")
                start_agent(vm)
                start_watcher(vm)
                vm.start(f"while :; do echo {boot} > /mnt/file{boot}-$((n += 1)); done")
                wait_until(lambda: len(os.listdir(tmp_path)) > 50 * (boot + 1), 30)  # noqa: B023
                vm.process.kill()
            wait_until(lambda: server.descriptors() == before, 10, "what the guest had is closed")


def test_locks_between_guests(tmp_path: Path) -> None:
    """One that waits for a lock keeps nobody else waiting, and outlives a pause."""
    lock = "import fcntl, os, sys; fd = os.open('/mnt/lock', os.O_RDWR); "
    hold = lock + "fcntl.{0}(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    (tmp_path / "lock").touch()
    with (
        shared(tmp_path, guests=2) as server,
        guest({"share": server.paths[0]}, name="one") as one,
        guest({"share": server.paths[1]}, name="two") as two,
    ):
        for vm in (one, two):
            vm.mount("share")
        for kind in ("flock", "lockf"):
            holder = one.start(["python3", "-c", hold.format(kind)])
            assert holder.line() == "held"
            waiter = two.start(["python3", "-c", hold.format(kind)])
            two.run(f"until grep -q request_wait /proc/{waiter.pid}/wchan; do :; done")
            for vm in (one, two):
                assert "lock" in vm.run("ls /mnt").stdout
            two.qmp("stop")
            holder.write(None)
            assert holder.wait().status == 0
            two.qmp("cont")
            assert waiter.line() == "held"
            waiter.write(None)
            assert waiter.wait().status == 0


def test_much_memory_and_many_queues(tmp_path: Path) -> None:
    """4 GiB on q35 lie in two regions, the kernel's buffers on both sides of the hole."""
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    with (
        shared(tmp_path) as server,
        guest({"share": server.paths[0]}, memory=4096, machine="q35", queues=4) as vm,
    ):
        assert "100000000-" in vm.run("grep 'System RAM' /proc/iomem").stdout
        vm.mount("share")
        vm.run("cp /mnt/file /mnt/copy && cmp /mnt/file /mnt/copy")
        assert (tmp_path / "copy").read_bytes() == data
