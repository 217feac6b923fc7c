"""The harness itself, against somebody else's server: Debian's virtiofsd in C."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness.vm import C_VIRTIOFSD, Done, GuestError, c_virtiofsd, guest

pytestmark = pytest.mark.skipif(not C_VIRTIOFSD.exists(), reason=f"there is no {C_VIRTIOFSD}")


def test_a_guest_reads_a_share(tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("from the host\n")
    with c_virtiofsd(tmp_path) as path, guest({"share": path}) as vm:
        vm.mount("share")
        assert vm.run("ls /mnt; cat /mnt/hello").stdout == "hello\nfrom the host\n"
        assert " /mnt virtiofs " in vm.run("cat /proc/mounts").stdout
        vm.run("echo from the guest > /mnt/answer")
        assert (tmp_path / "answer").read_text() == "from the guest\n"
        assert "usage: fsd-guest" in vm.run("/fsd-guest.pyz --help").stdout
        vm.run("umount /mnt")
        vm.power_off()


def test_programs_in_a_guest() -> None:
    with guest({}) as vm:
        done = vm.run("echo out; echo err >&2; exit 3", check=False)
        assert done == Done(3, "out\n", "err\n")
        with pytest.raises(GuestError, match="status 3"):
            vm.run("exit 3")
        with pytest.raises(GuestError, match="no-such-program"):
            vm.run(["no-such-program"])
        with pytest.raises(GuestError, match="its end"):
            vm.run("sleep 60", timeout=0.5)
        much = 3_000_000
        assert len(vm.run(f"head -c {much} /dev/zero").stdout) == much
        user = vm.run(["id", "-u"], user="user", group="user", extra_groups=[])
        assert user.stdout == "1000\n"

        cat = vm.start("cat")
        cat.write(b"one\ntwo\n")
        assert [cat.line(), cat.line()] == ["one", "two"]
        cat.signal(signal.SIGKILL)
        assert cat.wait().status == -signal.SIGKILL

        # What a program leaves behind is not waited for.
        assert vm.run("sleep 60 & echo started", timeout=10).stdout == "started\n"

        watcher = vm.start(["inotifywait", "-m", "-r", "/tmp"])
        watcher.wait_output("Watches established.", of="err")
        vm.run("touch /tmp/x")
        assert [watcher.line() for _ in range(3)] == [
            f"/tmp/ {event} x" for event in ("CREATE", "OPEN", "CLOSE_WRITE,CLOSE")
        ]


def test_two_guests_side_by_side() -> None:
    with guest({}, name="one") as one, guest({}, name="two") as two:
        assert one.process.pid != two.process.pid
        assert one.run("uname -r").stdout == two.run("uname -r").stdout


def test_a_guest_ends_with_its_block() -> None:
    with guest({}) as vm:
        pid = vm.process.pid
        os.kill(pid, 0)
        vm.start("sleep 60")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_guest_that_dies_is_reported() -> None:
    with guest({}) as vm:
        sleeper = vm.start("sleep 60")
        vm.process.kill()
        with pytest.raises(GuestError, match="the guest has gone"):
            sleeper.wait()
