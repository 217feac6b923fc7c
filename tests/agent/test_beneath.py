"""How the agent reaches a file: it never leaves its mount, with openat2 and without."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from guest_tools import beneath
from guest_tools.beneath import open_file, reach
from harness.forbid import OPENAT2, STATX

ROOT = Path(__file__).parent.parent.parent
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, which only root can")


@pytest.fixture(params=[True, False], ids=["openat2", "step by step"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    has: bool = request.param
    monkeypatch.setattr(beneath, "has_openat2", lambda: has)


@pytest.fixture
def share(tmp_path: Path, way: None) -> Iterator[tuple[int, Path]]:
    """A directory, and a descriptor of it; beside it lies what must not be reached."""
    outside, top = tmp_path / "outside", tmp_path / "share"
    (outside / "sub").mkdir(parents=True)
    (outside / "file").write_text("outside")
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").write_text("inside")
    fd = os.open(top, os.O_PATH | os.O_DIRECTORY)
    yield fd, top
    os.close(fd)


def refused(attempt: Callable[[], int]) -> int:
    """The errno; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    try:
        os.close(attempt())
    except OSError as error:
        assert len(os.listdir("/proc/self/fd")) == before
        return error.errno or 0
    raise AssertionError("it was reached")


def test_what_is_below_is_reached(share: tuple[int, Path]) -> None:
    fd, top = share
    for path in (b"a", b"a/b", b"a/b/file"):
        reached = reach(fd, path)
        assert os.path.samestat(os.fstat(reached), os.stat(top / os.fsdecode(path)))
        os.close(reached)
    file = open_file(fd, b"a/b/file", os.O_RDONLY)
    assert os.read(file, 100) == b"inside"
    os.close(file)
    assert refused(lambda: reach(fd, b"a/b/file", directory=True)) == errno.ENOTDIR
    assert refused(lambda: reach(fd, b"a/none")) == errno.ENOENT


def test_paths_of_any_length(share: tuple[int, Path]) -> None:
    fd, top = share
    name = b"n" * 200
    below = os.open(top, os.O_RDONLY)
    for _ in range(45):  # 9,000 bytes, more than twice PATH_MAX
        os.mkdir(name, dir_fd=below)
        deeper = os.open(name, os.O_RDONLY, dir_fd=below)
        os.close(below)
        below = deeper
    reached = reach(fd, b"/".join([name] * 45), directory=True)
    assert os.path.samestat(os.fstat(reached), os.fstat(below))
    os.close(reached)
    os.close(below)
    assert refused(lambda: reach(fd, b"n" * 5000)) == errno.ENAMETOOLONG
    assert refused(lambda: reach(fd, b"a/" + b"n" * 5000 + b"/b")) == errno.ENAMETOOLONG


@pytest.mark.parametrize(
    "path",
    [b"", b"/", b"/etc", b"..", b"a/..", b"a/../../outside", b".", b"a/.", b"a//b", b"a/", b"a\0b"],
)
def test_paths_that_no_honest_server_gives(share: tuple[int, Path], path: bytes) -> None:
    fd, _ = share
    assert refused(lambda: reach(fd, path)) == errno.EINVAL


@pytest.mark.parametrize("target", ["../../outside", "/", "b", "/proc/self/root"])
def test_links_are_not_followed(share: tuple[int, Path], target: str) -> None:
    fd, top = share
    (top / "a/link").symlink_to(target)
    refusals = (errno.ELOOP, errno.ENOTDIR)
    assert refused(lambda: reach(fd, b"a/link/file")) in refusals
    assert refused(lambda: reach(fd, b"a/link", directory=True)) in refusals
    assert refused(lambda: open_file(fd, b"a/link", os.O_RDONLY)) == errno.EINVAL
    reached = reach(fd, b"a/link")  # the link itself
    assert stat.S_ISLNK(os.fstat(reached).st_mode)
    os.close(reached)


def test_devices_and_pipes_are_not_opened(share: tuple[int, Path]) -> None:
    fd, top = share
    os.mkfifo(top / "pipe")
    assert refused(lambda: open_file(fd, b"pipe", os.O_RDONLY | os.O_NONBLOCK)) == errno.EINVAL
    if os.geteuid() == 0:
        os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert refused(lambda: open_file(fd, b"device", os.O_WRONLY)) == errno.EINVAL


@AS_ROOT
@pytest.mark.parametrize("what", ["tmpfs", "outside", "share/other", "share/a"])
def test_mounts_are_not_entered(share: tuple[int, Path], what: str) -> None:
    """A volume, a directory bound there, another one of the share, the very one."""
    fd, top = share
    (top / "other").mkdir()
    volume = top / "a"
    how = ["-t", "tmpfs"] if what == "tmpfs" else ["--bind"]
    subprocess.run(["mount", *how, top.parent / what, volume], check=True)
    try:
        (volume / "file").touch()
        assert refused(lambda: reach(fd, b"a")) == errno.EXDEV
        assert refused(lambda: reach(fd, b"a/file")) == errno.EXDEV
        assert refused(lambda: open_file(fd, b"a/file", os.O_RDONLY)) == errno.EXDEV
    finally:
        subprocess.run(["umount", volume], check=True)
    os.close(reach(fd, b"a/b/file"))


@AS_ROOT
def test_a_file_bound_over_a_file_is_not_reached(share: tuple[int, Path]) -> None:
    fd, top = share
    subprocess.run(["mount", "--bind", top.parent / "outside/file", top / "a/b/file"], check=True)
    try:
        assert refused(lambda: reach(fd, b"a/b/file")) == errno.EXDEV
    finally:
        subprocess.run(["umount", top / "a/b/file"], check=True)


def test_swapping_a_directory_for_a_link_gains_nothing(share: tuple[int, Path]) -> None:
    fd, top = share
    (top / "link").symlink_to("../outside")
    (top / "dir").mkdir()
    (top / "dir/file").write_text("inside")
    ending = threading.Event()

    def swap() -> None:
        while not ending.is_set():
            for place in ("dir", "link"):
                os.rename(top / place, top / "x")
                os.rename(top / "x", top / place)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        found = set()
        for _ in range(2000):
            with suppress(OSError):
                file = open_file(fd, b"x/file", os.O_RDONLY)
                found.add(os.read(file, 100))
                os.close(file)
    finally:
        ending.set()
        swapper.join()
    assert found <= {b"inside"}


IN_AN_OLD_KERNEL = """
import os, sys
from guest_tools import beneath
fd = os.open(sys.argv[1], os.O_PATH)
assert not beneath.has_openat2()
os.close(beneath.reach(fd, b"a/b"))
os.close(beneath.open_file(fd, b"a/b/file", os.O_RDONLY))
try:
    beneath.reach(fd, b"a/link/file")
    print("followed")
except OSError:
    print("refused")
"""


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_without_such_calls(tmp_path: Path, error: int) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    (tmp_path / "a/link").symlink_to("b")
    command: list[str | Path] = [
        sys.executable, ROOT / "harness/forbid.py", str(OPENAT2), str(error),
        sys.executable, ROOT / "harness/forbid.py", str(STATX), str(error),
        sys.executable, "-c", IN_AN_OLD_KERNEL, tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr
