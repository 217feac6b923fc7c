"""`fsd mount` where names are odd, and where somebody else writes beside the mountpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fsd.linux.mounting import Mount, mounts
from harness.mounts import mounted, mounts_at
from harness.namespace import UID, as_user, inside, run
from harness.usersmount import users_mount
from tests.cli.support import refused

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root, and as other users")
TRANSPORTS = pytest.mark.parametrize("transport", ["devfuse", "libfuse"])
NAMES = [
    b"a,allow_other,dev,suid", b"a,user_id=0,fd=5", b"line\nend", b"back\\slash,", b"end\\",
    b"\xff\xfe,", b"-o", b"sp ace",
]  # fmt: skip


def mount_at(mountpoint: Path) -> Mount:
    return [mount for mount in mounts() if mount.path == str(mountpoint)][-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_option(tmp_path: Path, name: bytes) -> None:
    top = tmp_path / os.fsdecode(name)
    source, mountpoint = top / "source", top / "mount"
    source.mkdir(parents=True)
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--no-agent", "--no-allow-other"):
        mount = mount_at(mountpoint)
        assert mount.options == "rw,user_id=0,group_id=0,default_permissions"
        assert mount.flags.split(",")[:3] == ["rw", "nosuid", "nodev"]
        assert os.fsencode(mount.source) == os.fsencode(source)


@TRANSPORTS
@pytest.mark.parametrize("name", NAMES)
def test_a_users_name_is_no_option(tmp_path: Path, name: bytes, transport: str) -> None:
    options = f"--transport={transport}", "--no-agent"
    with users_mount(tmp_path, *options, below=os.fsdecode(name)) as (share, _):
        text = Path(f"/proc/{share.process.pid}/mountinfo").read_bytes()
        encoded = os.fsencode(share.mountpoint)
        for char in b"\\\n ":
            encoded = encoded.replace(bytes([char]), b"\\%03o" % char)
        (line,) = [line for line in text.splitlines() if line.split(b" ")[4] == encoded]
        assert line.split(b" ")[5].split(b",")[:3] == [b"rw", b"nosuid", b"nodev"]
        assert line.endswith(b" rw,user_id=%d,group_id=%d" % (UID, UID))
        if transport == "devfuse":
            assert b" fuse.fsd " + encoded.replace(b"/mount", b"/source") + b" rw" in line


SWAP = """
import os, sys
from fsd.cli import main
mountpoint, victim, *_ = sys.argv[1:]
check = main.check
def and_swap(options):
    place = check(options)
    os.rename(mountpoint, mountpoint + "-before")
    os.symlink(victim, mountpoint)
    return place
main.check = and_swap
del sys.argv[1:3]
main.main()
"""


@TRANSPORTS
@pytest.mark.parametrize("agent", [[], ["--no-agent"]], ids=["agent", "no-agent"])
def test_a_link_that_takes_the_mountpoints_place(
    tmp_path: Path, transport: str, agent: list[str]
) -> None:
    """Between the check and the mount: nothing is mounted where it leads."""
    source, mountpoint, victim = (tmp_path / name for name in ("source", "mount", "victim"))
    for path in (source, mountpoint, victim):
        path.mkdir()
    done = run(
        [
            sys.executable, "-c", SWAP, mountpoint, victim,
            "mount", source, mountpoint, f"--transport={transport}", *agent,
        ]
    )  # fmt: skip
    refused(done, f"{mountpoint} is another directory than before")
    assert mounts_at(victim) == mounts_at(tmp_path / "mount-before") == []


def test_a_fusermount_that_passes_no_descriptor(tmp_path: Path) -> None:
    """libfuse looks for its own before PATH; auto falls back to it, and says so."""
    other = tmp_path / "bin"
    other.mkdir()
    tmp_path.chmod(0o755)
    (other / "fusermount3").write_text("#!/bin/sh\nexit 0\n")
    (other / "fusermount3").chmod(0o755)
    setup = f"mkdir /dev/shm/fsd-bin; mount --bind {other} /dev/shm/fsd-bin"
    setup = f"PATH=/dev/shm/fsd-bin:$PATH; mount -t tmpfs none /dev/shm; {setup}"
    with users_mount(tmp_path, setup=setup) as (share, _):
        user = inside(share.process.pid, *as_user())
        (share.source / "f").write_text("text")
        assert run([*user, "cat", share.mountpoint / "f"]).stdout == "text"
        assert share.process.stderr is not None
        said = share.process.stderr.readline()
        assert b"transport devfuse cannot be had, using libfuse" in said
        assert b"fusermount3 passes no descriptor" in said
