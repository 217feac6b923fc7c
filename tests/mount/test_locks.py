"""Locks between processes of the mount, over either transport. Those that the host sees are in
test_devfuse.py.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.posix_support import Child, in_child, opened, write
from tests.mount.sides import Sides, two_sides


@pytest.fixture(scope="module", params=["devfuse", "libfuse"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    with two_sides(f"--transport={request.param}") as both:
        yield both


def test_a_waiting_lock_blocks_nobody_else(place: tuple[Path, Path]) -> None:
    d, _ = place
    f = write(d / "f", b"data")

    def take() -> None:
        with opened(f, os.O_RDWR) as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX)  # waits
            os.pwrite(fd, b"taken", 0)

    with opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        children = [Child(take) for _ in range(3)]
        time.sleep(0.3)  # they wait by now; if not, nothing is lost but the point
        begun = time.monotonic()
        for i in range(50):
            write(d / f"other{i}").unlink()
        assert time.monotonic() - begun < 5
        assert f.read_bytes() == b"data"
        begun = time.monotonic()
        fcntl.lockf(fd, fcntl.LOCK_UN)
        for child in children:
            child.join()
    assert f.read_bytes() == b"taken"
    assert time.monotonic() - begun < 5


def test_the_holder_of_a_lock(place: tuple[Path, Path]) -> None:
    d, _ = place
    f = write(d / "f", b"data")
    with opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 2, 1)
        mine = os.getpid()

        def ask() -> None:
            with opened(f, os.O_RDWR) as other:
                question = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                answer = fcntl.fcntl(other, fcntl.F_GETLK, question)
                assert struct.unpack("@hhqqi4x", answer) == (fcntl.F_WRLCK, 0, 1, 2, mine)

        in_child(ask)
