"""A stock guest on our server."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.share_server import shared
from tests.support.vm import guest


def test_a_guest_reads_and_writes_a_share(tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("from the host\n")
    with shared(tmp_path) as (path,), guest({"share": path}) as vm:
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


def test_file_data(tmp_path: Path) -> None:
    """Both ways, whole and in parts, as large as the kernel's requests become."""
    data = os.urandom(5_000_001)
    (tmp_path / "large").write_bytes(data)
    with shared(tmp_path) as (path,), guest({"share": path}) as vm:
        vm.mount("share")
        vm.run("cp /mnt/large /mnt/copy && cmp /mnt/large /mnt/copy")
        assert (tmp_path / "copy").read_bytes() == data
        vm.run("dd if=/mnt/large of=/mnt/part bs=65537 skip=3 seek=1 count=7")
        part = data[3 * 65537 : 10 * 65537]
        assert (tmp_path / "part").read_bytes() == bytes(65537) + part
