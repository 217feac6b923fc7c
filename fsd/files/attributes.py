"""Attributes as the transports give them to a kernel: real ones, or those of a placeholder."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from .inode import Inode


class Attr(NamedTuple):
    """The fields of os.stat_result that a FUSE reply needs."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blksize: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int


StatLike = os.stat_result | Attr
_PERMISSIONS = {stat.S_IFDIR: 0o755, stat.S_IFIFO: 0o666}


def placeholder_attr(inode: Inode, nlink: int = 1) -> Attr:
    """Attributes of an object that is gone: its type, and nothing misleading. Any agent may open a
    FIFO (LONE_CLOSE of protocol/frames.py).
    """
    mode = inode.kind | _PERMISSIONS.get(inode.kind, 0o644)
    return Attr(mode, inode.nodeid, 0, nlink, 0, 0, 0, 0, 4096, 0, 0, 0, 0)


def with_nlink(status: StatLike, nlink: int) -> Attr:
    """The same attributes with the link count of another moment."""
    return Attr(
        status.st_mode, status.st_ino, status.st_dev, nlink, status.st_uid, status.st_gid,
        status.st_rdev, status.st_size, status.st_blksize, status.st_blocks,
        status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip
