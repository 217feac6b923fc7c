"""`fsd mount` where a server was killed and has left its mount."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from harness.mounts import mounted, mounts_at, wait_until
from harness.namespace import run
from tests.cli.support import FSD, refused, status_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
TRANSPORTS = pytest.mark.parametrize("transport", ["devfuse", "libfuse"])


def start(source: Path, mountpoint: Path, *options: str) -> list[str]:
    """A daemon; returns what it says on its way."""
    done = run([FSD, "mount", "--daemon", "--no-restore", source, mountpoint, *options])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fsd: ready: {source} on {mountpoint}\n"
    return done.stderr.splitlines()


def killed(source: Path, mountpoint: Path, *options: str) -> None:
    """Leave a dead mount there."""
    start(source, mountpoint, *options)
    os.kill(status_of(mountpoint)["pid"], signal.SIGKILL)
    wait_until(lambda: run(["stat", "-f", mountpoint]).returncode, 20, "the end of the server")
    assert mounts_at(mountpoint)


def ended(mountpoint: Path) -> None:
    """A daemon ends as it should."""
    os.kill(status_of(mountpoint)["pid"], signal.SIGTERM)
    wait_until(lambda: not mounts_at(mountpoint), 20, "the unmount")


@TRANSPORTS
def test_the_same_command_again(places: tuple[Path, Path], transport: str) -> None:
    source, mountpoint = places
    options = [f"--transport={transport}"]
    for _ in range(2):
        killed(source, mountpoint, *options)
        asked = run([FSD, "status", mountpoint])
        refused(asked, f"{mountpoint}: the server of this mount has died; run fsd mount again")
    said = start(source, mountpoint, *options)
    assert said == [f"fsd: mountpoint {mountpoint}: its server had died; unmounted it"]
    assert mounts_at(mountpoint) == ["fuse.fsd"]
    assert (mountpoint / "file").read_text() == "content"
    ended(mountpoint)


def test_by_another_path(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    killed(source, mountpoint)
    link = mountpoint.with_name("link")
    link.symlink_to(mountpoint.parent)
    (said,) = start(source, link / mountpoint.name)
    assert said == f"fsd: mountpoint {link / mountpoint.name}: its server had died; unmounted it"
    ended(mountpoint)


def test_a_living_mount_is_left_alone(places: tuple[Path, Path]) -> None:
    source, mountpoint = places
    with mounted(source, mountpoint) as share:
        refused(run([FSD, "mount", source, mountpoint]), f"mountpoint {mountpoint} is busy")
        assert mounts_at(mountpoint) == ["fuse.fsd"]
        assert share.process.poll() is None


def test_a_dead_mount_of_others_is_named(places: tuple[Path, Path]) -> None:
    """Of another program, whose remains are its own."""
    source, mountpoint = places
    fd = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    command = ["mount", "-i", "-t", "fuse.other", "-o", data, "other", str(mountpoint)]
    subprocess.run(command, check=True, pass_fds=[fd])
    os.close(fd)
    try:
        done = run([FSD, "mount", source, mountpoint])
        refused(done, f"mountpoint {mountpoint} is not connected: the server of the mount there")
        assert f"fusermount3 -u {mountpoint}" in done.stderr
        assert mounts_at(mountpoint) == ["fuse.other"]
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)
