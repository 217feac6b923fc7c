"""Appends: what is beyond the POSIX map's cases of them (posix_appends.py)."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from harness import appending
from tests.mount.posix_support import Child, fails, opened, write
from tests.mount.sides import Sides, two_sides

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mount(2), chattr +a")


@pytest.fixture(scope="module", params=["devfuse", "libfuse"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    with two_sides(f"--transport={request.param}") as both:
        yield both


def test_a_file_that_may_only_grow(place: tuple[Path, Path]) -> None:
    """`chattr +a` on the host."""
    d, host = place
    write(host / "log", b"one ")
    (d / "log").stat()
    done = subprocess.run(["chattr", "+a", host / "log"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no append-only files here: {done.stderr.decode()}")
    try:
        with opened(d / "log", os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"two")
        with fails(errno.EPERM):
            os.open(d / "log", os.O_WRONLY)
        assert (host / "log").read_bytes() == b"one two"
    finally:
        subprocess.run(["chattr", "-a", host / "log"], check=True)


def test_a_line_is_one_request(place: tuple[Path, Path]) -> None:
    """Also across pages that the kernel has cached in part, and as readers of them see it."""
    d, host = place
    log = write(d / "log")
    lines = 400
    writers = [
        Child(partial(appending.write, path / "log", who, lines))
        for path, who in ((d, "a"), (host, "b"), (d, "c"), (host, "d"))
    ]
    size = sum(len(appending.line(who, i)) for who in "abcd" for i in range(lines))
    with opened(log) as reader:
        seen = b""
        while len(seen) < size:
            seen += os.pread(reader, 5000, len(seen))
    for writer in writers:
        writer.join()
    assert seen == (host / "log").read_bytes()
    appending.check(seen, dict.fromkeys("abcd", lines))
