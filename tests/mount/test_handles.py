"""File handles on a real mount: good after the kernel's caches were dropped, and a restart."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from harness.dentries import drop_dentries
from harness.mounts import Mount, mounted

from .posix_support import FileHandle, file_handle, open_by_handle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="open_by_handle_at(2) is root's")
Handles = dict[str, tuple[FileHandle, int]]
Mounts = Callable[[], AbstractContextManager[Mount]]


@pytest.fixture(params=["devfuse", "libfuse"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Mounts:
    """Mounts the same source at the same place each time."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    return lambda: mounted(source, mountpoint, f"--transport={request.param}")


@contextmanager
def opened(share: Mount, handle: FileHandle) -> Iterator[int]:
    top = os.open(share.mountpoint, os.O_RDONLY)
    try:
        fd = open_by_handle(top, handle)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


def make(share: Mount) -> Handles:
    (share.source / "a/b").mkdir(parents=True)
    (share.source / "a/b/f").write_text("content")
    (share.source / "gone").write_text("x")
    (share.source / "moved").write_text("moved")
    paths = ("", "a", "a/b", "a/b/f", "gone", "moved")
    return {
        path: (file_handle(share.mountpoint / path), (share.source / path).stat().st_ino)
        for path in paths
    }


def check(share: Mount, handles: Handles) -> None:
    for path in ("a/b/f", "a/b", "a", ""):  # from below: nothing above it is known yet
        handle, ino = handles[path]
        with opened(share, handle) as fd:
            assert os.fstat(fd).st_ino == (os.stat(share.mountpoint).st_ino if not path else ino)
            shown = os.readlink(f"/proc/self/fd/{fd}")
            if path != "a/b/f":  # a file's place need not be known
                assert shown == str(share.mountpoint / path).rstrip("/")
            else:
                assert os.read(fd, 100) == b"content"


def stale(share: Mount, handle: FileHandle) -> None:
    with pytest.raises(OSError, match=r".") as error, opened(share, handle):
        pass
    assert error.value.errno == errno.ESTALE


def test_handles_outlive_the_cache(mount: Mounts) -> None:
    with mount() as share:
        handles = make(share)
        for _ in range(2):
            drop_dentries(share.mountpoint)
            check(share, handles)
        (share.source / "gone").unlink()
        (share.source / "moved").rename(share.source / "a/here")
        drop_dentries(share.mountpoint)
        stale(share, handles["gone"][0])
        with opened(share, handles["moved"][0]) as fd:
            assert os.read(fd, 100) == b"moved"
        (share.source / "gone").write_text("another")  # often with the same inode number
        drop_dentries(share.mountpoint)
        stale(share, handles["gone"][0])
        assert (share.mountpoint / "gone").read_text() == "another"
        stale(share, handles["gone"][0])


def test_handles_outlive_the_server(mount: Mounts) -> None:
    with mount() as share:
        handles = make(share)
    (share.source / "gone").unlink()
    with mount() as share:
        check(share, handles)
        stale(share, handles["gone"][0])
