"""Mounts whose server has died: nothing in them works, and nothing can be mounted there, until they
are taken away. Ours are known by their type and their user.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from ..linux import syscalls

TYPE = "fuse.fsd"
_UNMOUNT_TIMEOUT = 10.0
_STACKED = 16
"""Dead mounts one upon the other, each left by a server that was killed."""


class Mount(NamedTuple):
    """One line of proc_pid_mountinfo(5)."""

    path: str
    type: str
    options: str
    """Of the file system itself."""


def mounts() -> Iterator[Mount]:
    """All mounts of this process, those on top of others behind them."""
    with open(syscalls.mountinfo_path(), "rb") as mountinfo:
        for line in mountinfo:
            fields, _, rest = line.partition(b" - ")
            kind, _, options = rest.decode(errors="replace").split(" ", 2)
            path = fields.split(b" ")[4].decode("unicode_escape").encode("latin-1")
            yield Mount(os.fsdecode(path), kind, options.strip())


def is_dead(mountpoint: str) -> bool:
    """Whether the server of what is mounted there has died."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def take_away(mountpoint: str) -> bool:
    """Unmount what this user's dead servers have left there; whether they have left anything.

    Raises OSError ENOTCONN for a dead mount of others, or that cannot be unmounted.
    """
    parent, name = os.path.split(mountpoint)
    path = os.path.join(os.path.realpath(parent), name)
    for found in range(_STACKED):
        if not is_dead(mountpoint):
            return bool(found)
        top = [mount for mount in mounts() if mount.path == path][-1:]
        users = f"user_id={os.geteuid()}"
        if not top or top[0].type != TYPE or users not in top[0].options.split(","):
            break
        unmount(path, _UNMOUNT_TIMEOUT)
    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), mountpoint)


def unmount(mountpoint: str, timeout: float) -> None:
    """Unmount it, whoever still uses it; without a word where that fails."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, mountpoint], stderr=subprocess.DEVNULL, timeout=timeout, check=False)
