"""mount(2), umount2(2), and the table of mounts.

Apart from mounts.py, which follows the mounts below a share: this makes and removes one mount. A
place is given by a descriptor, so that no other directory can take its place meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import NamedTuple

from protocol.mountinfo import parse_mountinfo

from . import syscalls
from .libc import check, libc

MS_NOSUID, MS_NODEV = 2, 4
_MNT_DETACH = 2
_OPEN_TREE = 428
_OPEN_TREE_CLONE, _AT_EMPTY_PATH = 1, 0x1000


class Mount(NamedTuple):
    """One line of proc_pid_mountinfo(5)."""

    number: int
    parent: int
    device: int
    """st_dev of its files."""
    path: str
    flags: str
    """Flags of the mount, such as nosuid."""
    type: str
    source: str
    options: str
    """Options of the file system itself."""


def mounts() -> Iterator[Mount]:
    """All mounts of this process, lower ones before those on top."""
    with open(syscalls.mountinfo_path(), "rb") as mountinfo:
        text = mountinfo.read()
    for line in parse_mountinfo(text):
        words = (line.point, line.flags, line.fstype, line.source, line.options)
        device = os.makedev(line.major, line.minor)
        yield Mount(line.mnt_id, line.parent, device, *map(os.fsdecode, words))


def mounted_on(fd: int) -> Mount | None:
    """The mount on an open directory: the topmost, if there are several."""
    number, path = syscalls.mount_id(fd), os.fsdecode(syscalls.shown_path(fd))
    found = None
    for each in mounts():
        if each.path == path and each.parent == number:
            found, number = each, each.number
    return found


def mount(source: str, fd: int, kind: str, flags: int, data: str) -> None:
    """mount(2) on an open directory. Raises OSError."""
    target = syscalls.fd_path(fd).encode()
    arguments = (os.fsencode(source), target, kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(libc.mount(*arguments))


def unmount(fd: int) -> None:
    """Unmount what is mounted on an open directory, even if it is in use. Raises OSError: EINVAL if
    nothing is mounted there.
    """
    check(libc.umount2(syscalls.fd_path(fd).encode(), _MNT_DETACH))


def clone(fd: int) -> int:
    """A private mount of an open directory, which no process can reach by a path: open_tree(2).
    Returns an O_PATH descriptor, with which it ends. Raises OSError: EPERM without CAP_SYS_ADMIN.
    """
    flags = _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC
    return check(libc.syscall(_OPEN_TREE, fd, b"", flags))
