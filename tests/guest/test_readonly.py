"""Shares that guests may not change: the server refuses, or the guest has mounted it so."""

from __future__ import annotations

import json
import os
from pathlib import Path

from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import Guest, GuestProcess, guest

CHANGES = {
    "create": "echo x > /mnt/new",
    "write": "echo x >> /mnt/file",
    "truncate": "truncate -s 0 /mnt/file",
    "mkdir": "mkdir /mnt/new",
    "symlink": "ln -s x /mnt/new",
    "link": "ln /mnt/file /mnt/new",
    "mknod": "mkfifo /mnt/new",
    "rename": "mv /mnt/file /mnt/d/file",
    "unlink": "rm -f /mnt/file",
    "rmdir": "rmdir /mnt/d",
    "chmod": "chmod 600 /mnt/file",
    "touch": "touch /mnt/file",
}


def check_refused(vm: Guest, source: Path) -> None:
    """Every change is EROFS, and nothing has changed."""
    before = (source / "file").stat()
    for what, line in CHANGES.items():
        done = vm.run(line, check=False)
        assert done.status != 0, what
        assert "Read-only file system" in done.stderr, (what, done)
    assert sorted(os.listdir(source)) == ["d", "file"]
    after = (source / "file").stat()
    assert (after.st_mode, after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode, before.st_size, before.st_mtime_ns, before.st_ctime_ns
    )  # fmt: skip
    assert vm.run("cat /mnt/file").stdout == "content\n"


def check_events(vm: Guest, source: Path) -> None:
    """What the host does is delivered, complete and correct; its users still may not write."""
    agent = vm.start(["/fsd-guest.pyz", "agent", "/mnt"])
    agent.wait_output("\n", 30)
    watcher = vm.start(["inotifywait", "-m", "-r", "--format", "%e %w%f", "/mnt"])
    watcher.wait_output("Watches established.", of="err")
    wait_until(lambda: _armed(vm) >= 2, 30, "marks in the server")
    seen = _delivered(watcher, source)
    assert seen == [
        "CREATE /mnt/d/new", "OPEN /mnt/d/new", "MODIFY /mnt/d/new", "CLOSE_WRITE,CLOSE /mnt/d/new",
        "ATTRIB /mnt/d/new", "MOVED_FROM /mnt/d/new", "MOVED_TO /mnt/moved", "DELETE /mnt/moved",
        "CREATE,ISDIR /mnt/sub", "DELETE,ISDIR /mnt/sub",
    ]  # fmt: skip
    status = json.loads(vm.run("cat /mnt/.fsd/status").stdout)
    assert [g["failed"] for g in status["guests"] if g["kind"] == "mount"] == [0], status
    check_refused(vm, source)
    agent.signal()


def _delivered(watcher: GuestProcess, source: Path) -> list[str]:
    (source / "d" / "new").write_text("x")
    (source / "d" / "new").chmod(0o600)
    (source / "d" / "new").rename(source / "moved")
    (source / "moved").unlink()
    (source / "sub").mkdir()
    (source / "sub").rmdir()
    watcher.wait_output("DELETE,ISDIR /mnt/sub", 20)
    lines = watcher.stdout.splitlines()
    return [line for line in lines if not line.endswith("/mnt/") and "ISDIR /mnt/sub/" not in line]


def _armed(vm: Guest) -> int:
    marks = json.loads(vm.run(["/fsd-guest.pyz", "marks", "/mnt", "--json"]).stdout)
    return sum(mark["armed"] for mark in marks)


def source_in(tmp_path: Path) -> Path:
    """A share with a file and a directory."""
    (tmp_path / "d").mkdir()
    (tmp_path / "file").write_text("content\n")
    return tmp_path


def test_the_server_refuses(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    with shared(source, 1, "--readonly") as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        check_refused(vm, source)
        check_events(vm, source)


def test_the_guest_has_mounted_it_so(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    with shared(source) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share", options="ro")
        check_refused(vm, source)
        check_events(vm, source)
        assert " ro," in vm.run("grep ' /mnt ' /proc/mounts").stdout


def test_both(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    with shared(source, 1, "--readonly") as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share", options="ro")
        check_events(vm, source)
