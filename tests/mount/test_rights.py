"""What the users of a mount may not get by it: suid bits, blocks reserved for root."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.posix_support import ALICE, in_child
from tests.mount.sides import Sides, two_sides

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as ordinary users")


@pytest.fixture(scope="module", params=["devfuse", "libfuse"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    with two_sides("--no-agent", f"--transport={request.param}") as both:
        yield both


def _truncate(path: Path) -> None:
    os.truncate(path, 3)


def _open_truncating(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def _create_truncating(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))


def _with(change: Callable[[int], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            change(fd)
        finally:
            os.close(fd)

    return changed


CHANGES: dict[str, Callable[[Path], None]] = {
    "truncate": _truncate,
    "O_TRUNC": _open_truncating,
    "O_CREAT": _create_truncating,
    "ftruncate": _with(lambda fd: os.ftruncate(fd, 3)),
    "write": _with(lambda fd: os.pwrite(fd, b"x", 0)),
    "fallocate": _with(lambda fd: os.posix_fallocate(fd, 0, 100_000)),
    "copy": _with(lambda fd: os.copy_file_range(fd, fd, 4, 0, 100)),
}


@pytest.mark.parametrize("place", ["native", "mounted"])
@pytest.mark.parametrize("change", CHANGES)
def test_suid_bits_go_with_what_a_user_changes(sides: Sides, place: str, change: str) -> None:
    mount = sides.mount
    where, host = mount.mountpoint, mount.source
    if place == "native":
        where = host = sides.native
    tool = host / "tool"
    tool.write_text("some text")
    tool.chmod(0o6777)
    in_child(lambda: CHANGES[change](where / "tool"), ALICE)
    assert stat.S_IMODE(tool.stat().st_mode) == 0o777


def _fill(directory: Path) -> None:
    """Until the disk is full, for a user; root may write more."""

    def fill() -> None:
        fd = os.open(directory / "big", os.O_CREAT | os.O_RDWR)
        for _ in range(1024):  # 32 MiB
            with suppress(OSError):
                os.write(fd, bytes(32768))
        os.close(fd)

    in_child(fill, ALICE)


def test_blocks_reserved_for_root(sides: Sides, tmp_path: Path) -> None:
    image, disk = tmp_path / "image", sides.mount.source / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    options = ["-m", "25", "-O", "^has_journal"]
    subprocess.run(["mkfs.ext4", "-q", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        disk.chmod(0o777)
        _fill(sides.mount.mountpoint / "disk")
        left = os.statvfs(disk)
        assert left.f_bfree * left.f_frsize > 1 << 20  # of 2 MiB
        (sides.mount.mountpoint / "disk/root's").write_bytes(bytes(1 << 18))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
        disk.rmdir()


def test_what_is_written_by_a_mapping_is_its_users(sides: Sides) -> None:
    """It comes from no process; the file is still written, and keeps its suid bits as natively."""
    path = sides.mount.source / "mapped"
    path.write_bytes(bytes(4096))
    path.chmod(0o666)

    def write() -> None:
        fd = os.open(sides.mount.mountpoint / "mapped", os.O_RDWR)
        with mmap.mmap(fd, 4096) as view:
            view[:5] = b"by me"
            view.flush()
        os.close(fd)

    in_child(write, ALICE)
    assert path.read_bytes()[:5] == b"by me"
