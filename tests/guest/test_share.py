"""A stock guest on our server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.guest_agents import marks, start_agent
from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import guest


def test_a_guest_reads_and_writes_a_share(tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("from the host\n")
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        assert vm.run("ls /mnt; cat /mnt/hello").stdout == "hello\nfrom the host\n"
        assert " /mnt virtiofs " in vm.run("cat /proc/mounts").stdout
        vm.run("mkdir /mnt/d && echo from the guest > /mnt/d/answer")
        assert (tmp_path / "d" / "answer").read_text() == "from the guest\n"
        vm.run("mv /mnt/d/answer /mnt/moved && rmdir /mnt/d && rm /mnt/hello")
        assert os.listdir(tmp_path) == ["moved"]
        vm.run("umount /mnt")
        vm.mount("share")  # once more, with a session of its own
        assert vm.run("cat /mnt/moved").stdout == "from the guest\n"
        vm.power_off()


@pytest.mark.parametrize(
    "backend",
    ["memory-backend-memfd,seal=off", "memory-backend-file,mem-path=/dev/shm"],
)
def test_memory_of_other_kinds(tmp_path: Path, backend: str) -> None:
    """What VMMs share besides sealed memfds; libvirt's source type 'file' is the second."""
    (tmp_path / "hello").write_text("from the host\n")
    with shared(tmp_path) as server, guest({"share": server.paths[0]}, backend=backend) as vm:
        vm.mount("share")
        assert vm.run("cat /mnt/hello").stdout == "from the host\n"


def test_file_data(tmp_path: Path) -> None:
    """Both ways, whole and in parts, as large as the kernel's requests become."""
    data = os.urandom(5_000_001)
    (tmp_path / "large").write_bytes(data)
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        vm.run("cp /mnt/large /mnt/copy && cmp /mnt/large /mnt/copy")
        assert (tmp_path / "copy").read_bytes() == data
        vm.run("dd if=/mnt/large of=/mnt/part bs=65537 skip=3 seek=1 count=7")
        part = data[3 * 65537 : 10 * 65537]
        assert (tmp_path / "part").read_bytes() == bytes(65537) + part


@pytest.mark.parametrize("agent", [True, False])
def test_inotify_in_the_guest_sees_what_the_host_does(tmp_path: Path, agent: bool) -> None:
    (tmp_path / "d").mkdir()
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        if agent:
            start_agent(vm)
        form = ["--format", "%e %w%f", "-m", "-r", "/mnt"]
        watcher = vm.start(["inotifywait", *form])
        watcher.wait_output("Watches established.", of="err")
        if agent:
            wait_until(
                lambda: sum(mark["armed"] for mark in marks(vm)) >= 2, 20, "marks in the server"
            )
        (tmp_path / "d" / "new").write_text("x")
        os.rename(tmp_path / "d" / "new", tmp_path / "moved")
        (tmp_path / "moved").unlink()
        (tmp_path / "sub").mkdir()
        if not agent:
            # A change of the guest's own comes through: what was before it is not coming.
            vm.run("touch /mnt/own")
            watcher.wait_output("CREATE /mnt/own")
            assert watcher.stdout.startswith("CREATE /mnt/own\n")
            return
        watcher.wait_output("CREATE,ISDIR /mnt/sub", 20)
        assert watcher.stdout.splitlines()[:8] == [
            "CREATE /mnt/d/new",
            "OPEN /mnt/d/new",
            "MODIFY /mnt/d/new",
            "CLOSE_WRITE,CLOSE /mnt/d/new",
            "MOVED_FROM /mnt/d/new",
            "MOVED_TO /mnt/moved",
            "DELETE /mnt/moved",
            "CREATE,ISDIR /mnt/sub",
        ]
