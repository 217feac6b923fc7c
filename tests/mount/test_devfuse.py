"""What the /dev/fuse transport carries and libfuse's does not, beside the POSIX map; and how it is
mounted.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.posix_support import ALICE, fails, in_child, opened, write
from tests.mount.sides import Sides, two_sides

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    with two_sides("--transport=devfuse") as both:
        yield both


# -- locks that the host sees ----------------------------------------------------------------------


def test_a_killed_process_waits_no_more(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f")
    with opened(host / "f", os.O_RDWR) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = subprocess.Popen(["flock", f, "true"])
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(5) == -signal.SIGTERM


def test_locks_are_the_hosts(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f", b"data")
    with opened(f, os.O_RDWR) as fd, opened(host / "f", os.O_RDWR) as other:
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
        with fails(errno.EAGAIN):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 15)
        with fails(errno.EAGAIN):
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 15)
        fcntl.flock(other, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_closing_any_descriptor_of_a_file_drops_a_process_s_locks(
    place: tuple[Path, Path],
) -> None:
    d, host = place
    f = write(d / "f", b"data")
    with opened(host / "f", os.O_RDWR) as other, opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with opened(f):
            pass
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(other, fcntl.LOCK_UN)


# -- data ------------------------------------------------------------------------------------------


def test_copy_file_range(place: tuple[Path, Path]) -> None:
    d, host = place
    content = os.urandom(3_000_000)
    source = write(d / "source", content)
    with opened(source) as fd, opened(d / "target", os.O_RDWR | os.O_CREAT) as target:
        copied = 0
        while step := os.copy_file_range(fd, target, 10_000_000):
            copied += step
        assert copied == len(content)
    assert (host / "target").read_bytes() == content


def test_a_shared_mapping(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f", bytes(100_000))
    with opened(f, os.O_RDWR) as fd, mmap.mmap(fd, 0) as mapped:
        mapped[50_000:50_005] = b"hello"
        mapped.flush()
    assert (host / "f").read_bytes()[50_000:50_005] == b"hello"


def test_a_temporary_file_gets_a_name(place: tuple[Path, Path]) -> None:
    d, host = place
    with opened(d, os.O_TMPFILE | os.O_RDWR) as fd:
        os.write(fd, b"data")
        assert os.listdir(host) == []
        with opened(d) as directory:  # without dst_dir_fd Python does not follow the link
            os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=directory, follow_symlinks=True)
        assert os.fstat(fd).st_nlink == 1
    assert (host / "named").read_bytes() == b"data"


def test_time_of_birth(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f")
    done = subprocess.run(["stat", "-c", "%W", f, host / "f"], capture_output=True, check=True)
    mine, native = map(int, done.stdout.split())
    assert mine == native > 0


def test_flags_of_a_file(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f")
    subprocess.run(["chattr", "+A", f], check=True)
    lines = [
        subprocess.run(["lsattr", path], capture_output=True, check=True).stdout.split()
        for path in (f, host / "f")
    ]
    assert b"A" in lines[0][0]
    assert lines[0][0] == lines[1][0]
    in_child(lambda: _may_not_set_flags(f), ALICE)


def _may_not_set_flags(path: Path) -> None:
    with opened(path) as fd, fails(errno.EPERM, errno.EACCES):
        fcntl.ioctl(fd, 0x4008_6602, struct.pack("q", 0))
