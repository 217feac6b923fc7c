"""Dead mounts: mounts whose server has died. They block the mountpoint until they are unmounted.
Those of fsd are recognised by their type and their user.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator

from ..linux import mounting, syscalls
from ..linux.mounting import Mount

TYPE = "fuse.fsd"
_UNMOUNT_TIMEOUT = 10.0
_STACKED = 16
"""Dead mounts on top of each other, each left by a killed server."""


def mounts() -> Iterator[Mount]:
    """Those of fsd that this process sees, dead ones too."""
    return (mount for mount in mounting.mounts() if mount.type == TYPE)


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
        top = [mount for mount in mounting.mounts() if mount.path == path][-1:]
        users = f"user_id={os.geteuid()}"
        if not top or top[0].type != TYPE or users not in top[0].options.split(","):
            break
        _unmount(top[0])
    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), mountpoint)


def _unmount(dead: Mount) -> None:
    """Unmount it, even if it is in use. Raises OSError, TimeoutExpired."""
    if os.geteuid():
        command = ["fusermount3", "-u", "-z", "--", dead.path]
        subprocess.run(command, stderr=subprocess.DEVNULL, timeout=_UNMOUNT_TIMEOUT, check=False)
        return
    fd = os.open(dead.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if syscalls.mount_id(fd) == dead.number:  # and nothing else that has come there
            mounting.unmount(fd)
    finally:
        os.close(fd)
