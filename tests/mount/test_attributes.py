"""A directory's attributes that the replayer's kernel keeps: every change on the host ends them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, wait_until

from .observing import watching

KEPT = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ctime_ns")
CHANGES: dict[str, Callable[[Path], object]] = {
    "chmod": lambda d: d.chmod(0o700),
    "chown": lambda d: os.chown(d, 1, 1),
    "times": lambda d: os.utime(d, (1, 1)),
    "a file made": lambda d: (d / "new").touch(),
    "a file removed": lambda d: (d / "old").unlink(),
    "a file replaced": lambda d: (d / "other").rename(d / "old"),
    "a directory made": lambda d: (d / "new").mkdir(),
    "moved in": lambda d: (d.parent / "outside").rename(d / "in"),
    "moved out": lambda d: (d / "old").rename(d.parent / "out"),
    "renamed itself, and back": lambda d: d.rename(d.parent / "x").rename(d),
    "xattr": lambda d: os.setxattr(d, "user.x", b"y"),
}


def attributes(path: Path) -> list[int]:
    status = path.stat()
    return [getattr(status, name) for name in KEPT]


@pytest.fixture(scope="module", params=["devfuse", "libfuse"])
def share(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    """One for all tests, each of which has a directory in it."""
    top = tmp_path_factory.mktemp("attributes")
    source, mountpoint = top / "source", top / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, f"--transport={request.param}") as mount:
        yield mount


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("marks", ["both", "the directory"])
def test_a_change_on_the_host_shows(share: Mount, change: str, marks: str) -> None:
    name = f"{marks}, {change}"
    source, seen = share.source / name / "d", share.mountpoint / name / "d"
    source.mkdir(parents=True)
    for path in (source / "old", source / "other", source.parent / "outside"):
        path.touch()
    with watching(share, *[seen] + [seen.parent] * (marks == "both")) as watcher:
        (source / "other").write_text("x")  # its replay asks for d's attributes
        watcher.wait((os.fsencode(seen / "other"), "CLOSE_WRITE,CLOSE"))
        CHANGES[change](source)
        wait_until(lambda: attributes(seen) == attributes(source), 1.0, change)
