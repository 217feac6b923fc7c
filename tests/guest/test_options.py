"""Options of `fsd virtiofs` as a guest sees them: one machine, a server for each setting."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harness.mounts import wait_until
from harness.share_server import Share, shared
from harness.vm import Guest, guest

SETTINGS = {
    "plain": (),
    "xattr": ("--xattr",),
    "acl": ("--posix-acl",),
    "never": ("--cache=never",),
    "auto": ("--cache=auto",),
    "always": ("--cache=always",),
    "metadata": ("--cache=metadata",),
    "pinned": ("--inode-file-handles=never",),
    "chroot": ("--sandbox=chroot",),
    "bare": ("--sandbox=none", "--seccomp=none"),
    "submounts": ("--announce-submounts",),
    "private": ("-o", "no_flock,no_posix_lock"),
    "direct": ("--allow-direct-io",),
}


@pytest.fixture(scope="module")
def tops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shared directories, one a setting; in one of them another file system is mounted."""
    top = tmp_path_factory.mktemp("shares")
    for name in SETTINGS:
        (top / name / "d").mkdir(parents=True)
        (top / name / "file").write_text("before\n")
    if os.geteuid() != 0:
        pytest.skip("mounts a file system, which only root can")
    for name in ("submounts", "plain"):
        subprocess.run(["mount", "-t", "tmpfs", "none", top / name / "d"], check=True)
        (top / name / "d" / "inner").touch()
    try:
        yield top
    finally:
        for name in ("submounts", "plain"):
            subprocess.run(["umount", top / name / "d"], check=True)


@pytest.fixture(scope="module")
def servers(tops: Path) -> Iterator[dict[str, Share]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(shared(tops / name, 1, *options))
            for name, options in SETTINGS.items()
        }


@pytest.fixture(scope="module")
def vm(servers: dict[str, Share]) -> Iterator[Guest]:
    """All of them mounted, at /NAME."""
    with guest({name: server.paths[0] for name, server in servers.items()}) as machine:
        for name in servers:
            machine.mount(name, f"/{name}")
        yield machine


def test_every_one_serves(vm: Guest, tops: Path) -> None:
    for name in SETTINGS:
        vm.run(f"cd /{name} && echo new > new && mkdir n && mv new n && cat n/new && rm -r n")
        assert vm.run(f"cat /{name}/file").stdout == "before\n"
        assert sorted(os.listdir(tops / name)) == ["d", "file"]


USER: dict[str, Any] = {"user": 1000, "group": 1000, "extra_groups": []}
SET = "import os; os.setxattr('/{}/file', '{}', bytes.fromhex('{}'))"
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    )
)  # fmt: skip


def test_xattr(vm: Guest, tops: Path) -> None:
    for name in ("xattr", "acl"):
        vm.python(SET.format(name, "user.x", "31"))
        assert os.getxattr(tops / name / "file", "user.x") == b"1"
    done = vm.run(["python3", "-c", SET.format("plain", "user.x", "31")], check=False)
    assert "not supported" in done.stderr
    assert os.listxattr(tops / "plain" / "file") == []


def test_posix_acl(vm: Guest, tops: Path) -> None:
    """It is set, and the guest's kernel minds it."""
    (tops / "acl" / "file").chmod(0o600)
    (tops / "acl").chmod(0o755)
    read = ["cat", "/acl/file"]
    assert vm.run(read, check=False, **USER).status != 0
    vm.python(SET.format("acl", "system.posix_acl_access", ACL.hex()))
    assert os.getxattr(tops / "acl" / "file", "system.posix_acl_access") == ACL
    assert vm.run(read, **USER).stdout == "before\n"
    # Where the guest's kernel does not mind it, it checks no caller: not even by --xattr.
    (tops / "xattr" / "file").chmod(0o600)
    for name in ("xattr", "plain"):
        for user in ({}, USER):
            code = SET.format(name, "system.posix_acl_access", ACL.hex())
            done = vm.run(["python3", "-c", code], check=False, **user)
            assert "not supported" in done.stderr
    assert (tops / "xattr" / "file").stat().st_mode & 0o777 == 0o600
    assert "system.posix_acl_access" not in os.listxattr(tops / "xattr" / "file")


def test_cache(vm: Guest, tops: Path) -> None:
    """How soon a guest that watches nothing sees the host's change of a size."""
    seen = {}
    modes = ("plain", "never", "auto", "metadata", "always")
    for name in modes:
        vm.run(f"cat /{name}/file; stat /{name}/file")
        (tops / name / "file").write_text("afterwards\n")
        seen[name] = vm.run(f"stat -c %s /{name}/file").stdout.strip()
    assert (seen["plain"], seen["never"]) == ("11", "11")
    assert (seen["metadata"], seen["always"]) == ("7", "7")
    wait_until(lambda: vm.run("cat /auto/file").stdout == "afterwards\n", 10, "a second is over")
    for name in modes:
        (tops / name / "file").write_text("before\n")


def test_file_handles(vm: Guest, servers: dict[str, Share]) -> None:
    """Without them, directories that the guest knows are held open."""
    for name, held in (("pinned", True), ("xattr", False)):
        process = vm.start(["cat"], cwd=f"/{name}/d")
        assert ("/d" in servers[name].descriptors()) is held, name
        process.write(None)
        process.wait()


def test_submounts(vm: Guest) -> None:
    """Announced, they are file systems of their own in the guest."""
    devices = "stat -c %d /{0} /{0}/d/inner"
    announced = vm.run(devices.format("submounts")).stdout.split()
    assert announced[0] != announced[1]
    plain = vm.run(devices.format("plain")).stdout.split()
    assert plain[0] == plain[1]
    for name in ("submounts", "plain"):
        assert vm.run(f"ls /{name}/d").stdout == "inner\n"


DIRECT = """
import errno, mmap, os, sys
path = sys.argv[1]
page = mmap.mmap(-1, 8192)
page[:4096] = b"d" * 4096
for name, flags in ((path + "/old", 0), (path + "/new", os.O_CREAT | os.O_EXCL)):
    fd = os.open(name, os.O_RDWR | os.O_DIRECT | flags)
    assert os.pwrite(fd, memoryview(page)[:4096], 0) == 4096
    assert os.preadv(fd, [memoryview(page)[4096:]], 0) == 4096
    assert page[4096:] == b"d" * 4096
    try:
        print(os.preadv(fd, [memoryview(page)[1:514]], 0))
    except OSError as error:
        print(errno.errorcode[error.errno])
print("open", flush=True)
sys.stdin.read()
"""


def test_direct_io(vm: Guest, servers: dict[str, Share], tops: Path) -> None:
    """O_DIRECT of a guest's program holds on the host, with what the host's file system asks of
    its buffers; without the option it is the guest's alone.
    """
    for name, unaligned in (("direct", "EINVAL"), ("plain", "513")):
        (tops / name / "old").touch()
        program = vm.start(["python3", "-c", DIRECT, f"/{name}"])
        assert [program.line() for _ in range(3)] == [unaligned, unaligned, "open"]
        flags = []
        for fd in Path(f"/proc/{servers[name].pid}/fd").iterdir():
            if os.readlink(fd).endswith(("/old", "/new")):
                info = Path(f"/proc/{servers[name].pid}/fdinfo/{fd.name}").read_text()
                flags.append(int(info.split()[3], 8) & os.O_DIRECT)
        assert flags == [os.O_DIRECT if name == "direct" else 0] * 2
        for made in ("old", "new"):
            assert (tops / name / made).read_bytes() == b"d" * 4096
            (tops / name / made).unlink()
        program.write(None)
        program.wait()


LOCK = "import fcntl, sys; f = open('/{}/file', 'r+'); fcntl.flock(f, 6); print('held', flush=True)"


def test_locks(vm: Guest, servers: dict[str, Share], tops: Path) -> None:
    """Of guests' locks the host knows, unless they are to be the guest's alone."""
    for name, known in (("xattr", True), ("private", False)):
        holder = vm.start(["python3", "-c", LOCK.format(name) + "; sys.stdin.read()"])
        assert holder.line() == "held"
        done = subprocess.run(["flock", "-n", tops / name / "file", "true"], check=False)
        assert (done.returncode != 0) is known, name
        holder.write(None)
        holder.wait()


@pytest.mark.parametrize("name", ["chroot", "bare", "pinned"])
def test_events(vm: Guest, tops: Path, name: str) -> None:
    agent = vm.start(["/fsd-guest.pyz", "agent", f"/{name}"])
    agent.wait_output("\n", 30)
    watcher = vm.start(["inotifywait", "-m", "--format", "%e %f", f"/{name}"])
    watcher.wait_output("Watches established.", of="err")
    marks = ["/fsd-guest.pyz", "marks", f"/{name}", "--json"]
    wait_until(lambda: '"armed": true' in vm.run(marks).stdout, 30, "a mark in the server")
    (tops / name / "new").write_text("x")
    (tops / name / "new").unlink()
    watcher.wait_output("DELETE new", 20)
    assert watcher.stdout.splitlines() == [
        "CREATE new", "OPEN new", "MODIFY new", "CLOSE_WRITE,CLOSE new", "DELETE new",
    ]  # fmt: skip
    watcher.signal()
    agent.signal()
