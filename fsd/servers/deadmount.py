"""Dead mounts: mounts whose server has died. They block the mountpoint until they are unmounted.
Those of fsd are recognised by their type and their user.
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
"""Dead mounts on top of each other, each left by a killed server."""


class Mount(NamedTuple):
    """One line of proc_pid_mountinfo(5)."""

    path: str
    type: str
    options: str
    """Options of the file system itself."""


def mounts() -> Iterator[Mount]:
    """All mounts of this process, lower ones before those on top."""
    with open(syscalls.mountinfo_path(), "rb") as mountinfo:
        for line in mountinfo:
            fields, _, rest = line.partition(b" - ")
            kind, _, options = rest.decode(errors="replace").split(" ", 2)
            path = fields.split(b" ")[4].decode("unicode_escape").encode("latin-1")
            yield Mount(os.fsdecode(path), kind, options.strip())


def is_dead(mountpoint: str) -> bool:
    """Whether the server of the mount there has died."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def take_away(mountpoint: str) -> bool:
    """Unmount dead mounts of this user's servers there; returns whether there were any.

    Raises OSError ENOTCONN for a dead mount of another user, or one that cannot be unmounted.
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
    """Unmount it even if it is in use; failures are ignored."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, mountpoint], stderr=subprocess.DEVNULL, timeout=timeout, check=False)
