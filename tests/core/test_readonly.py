"""A share that its guests may not change: every kind of request."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fsd.files.caller import Caller
from fsd.files.changes import Changes
from fsd.fuse.operations import Operations

from .support import World

USER = Caller(0, 0, 4242, ())
RDWR = os.O_RDWR


@pytest.fixture
def operations(tmp_path: Path) -> Operations:
    (tmp_path / "f").write_bytes(b"content")
    (tmp_path / "d").mkdir()
    world = World(tmp_path, read_only=True)
    return world.mount(agent=False)


def node(operations: Operations, name: bytes) -> int:
    return operations.lookup(USER, 1, name).inode.nodeid


CHANGES: dict[str, Callable[[Operations], object]] = {
    "mknod": lambda s: s.mknod(USER, 1, b"new", 0o100600, 0),
    "mkdir": lambda s: s.mkdir(USER, 1, b"new", 0o700),
    "symlink": lambda s: s.symlink(USER, 1, b"new", b"target"),
    "link": lambda s: s.link(USER, node(s, b"f"), 1, b"new"),
    "unlink": lambda s: s.unlink(USER, 1, b"f"),
    "rmdir": lambda s: s.rmdir(USER, 1, b"d"),
    "rename": lambda s: s.rename(USER, 1, b"f", 1, b"g", 0),
    "create": lambda s: s.create(USER, 1, b"new", 0o600, RDWR),
    "tmpfile": lambda s: s.tmpfile(USER, 1, 0o600, RDWR),
    "setattr": lambda s: s.setattr(USER, node(s, b"f"), Changes(mode=0o600), None),
    "truncate": lambda s: s.setattr(USER, node(s, b"f"), Changes(size=0), None),
    "setxattr": lambda s: s.setxattr(USER, node(s, b"f"), b"user.x", b"1", 0),
    "removexattr": lambda s: s.removexattr(USER, node(s, b"f"), b"user.x"),
    "open for writing": lambda s: s.files.open(USER, node(s, b"f"), os.O_WRONLY),
    "open and truncate": lambda s: s.files.open(USER, node(s, b"f"), os.O_RDONLY | os.O_TRUNC),
    "flags": lambda s: s.files.ioctl(
        USER, s.files.open(USER, node(s, b"f"), os.O_RDONLY), 0x4008_6602, bytes(8)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_users_may_not(operations: Operations, change: str) -> None:
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            CHANGES[change](operations)
        assert sorted(os.listdir(operations.export.source)) == ["d", "f"]
        assert Path(operations.export.source, "f").read_bytes() == b"content"
    finally:
        operations.close()
        operations.export.close()


DATA: dict[str, Callable[[Operations, int], object]] = {
    "write": lambda s, fh: s.files.write_from(USER, fh, [memoryview(b"x")], 0, kill=False),
    "fallocate": lambda s, fh: s.files.fallocate(USER, fh, 0, 0, 100),
    "copy": lambda s, fh: s.files.copy_file_range(USER, fh, 0, fh, 100, 7),
}


@pytest.mark.parametrize("change", DATA)
def test_what_is_open_cannot_be_written(operations: Operations, change: str) -> None:
    try:
        fh = operations.files.open(USER, node(operations, b"f"), os.O_RDONLY)
        assert operations.files.read(fh, 0, 100) == b"content"
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            DATA[change](operations, fh)
    finally:
        operations.close()
        operations.export.close()
