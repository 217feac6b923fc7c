"""System calls that Python's library lacks, for the agent."""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
# The same on every architecture.
_SYS_OPEN_TREE, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 430, 431, 432
_SYS_FSPICK, _SYS_MOUNT_SETATTR = 433, 442
_AT_EMPTY_PATH = 0x1000
_MOUNT_ATTR_RDONLY = 1
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 1, 8
_FSCONFIG_SET_FLAG, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 6, 7
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_UTIME_OMIT = (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_OMIT, _SET = _Timespec(0, _UTIME_OMIT), _Timespec(0, 0)
_ATIME = (_Timespec * 2)(_SET, _OMIT)
_MTIME = (_Timespec * 2)(_OMIT, _SET)
_BOTH = (_Timespec * 2)(_SET, _SET)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def clone_mount(path: str) -> int:
    """A private copy of the mount at ``path``, which does not keep that one busy: open_tree(2)."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags))


def make_writable(mount_fd: int) -> None:
    """Let this mount alone be written, where ``mount -o ro`` has made the file system read-only.

    ``mount -o ro`` sets a flag on the mount and one on the file system. The first is taken from
    this mount: mount_setattr(2), Linux 5.12. The second is taken too: fspick(2); other mounts of
    it keep their own flag, so that their users go on getting EROFS. Raises OSError.
    """
    attributes = struct.pack("=4Q", 0, _MOUNT_ATTR_RDONLY, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, attributes, size))
    if not os.fstatvfs(mount_fd).f_flag & os.ST_RDONLY:
        return
    flags = _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH
    context = _check(_libc.syscall(_SYS_FSPICK, mount_fd, b"", flags))
    try:
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"rw", None, 0))
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0))
    finally:
        os.close(context)


def mount_privately(kind: str) -> int:
    """The root of a file system that is mounted nowhere: fsmount(2), Linux 5.2. Raises OSError."""
    context = _check(_libc.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC))
    try:
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        return _check(_libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)


def open_by_handle(mount_fd: int, kind: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2); ``mount_fd``: not O_PATH, or AT_FDCWD. Raises OSError, EPERM where the
    process lacks CAP_DAC_READ_SEARCH.
    """
    data = struct.pack("=Ii", len(handle), kind) + handle
    return _check(_libc.open_by_handle_at(mount_fd, data, flags | os.O_CLOEXEC))


def touch(dir_fd: int, name: bytes, *, atime: bool, mtime: bool) -> None:
    """utimensat(2) of a name, not following symlinks.

    What times are set decides the event: atime alone is IN_ACCESS, mtime alone IN_MODIFY, both
    IN_ATTRIB (include/linux/fsnotify.h, fsnotify_change). An empty name is the directory itself.
    """
    times = _BOTH if atime and mtime else _ATIME if atime else _MTIME
    if name:
        _check(_libc.utimensat(dir_fd, name, times, _AT_SYMLINK_NOFOLLOW))
    else:
        _check(_libc.utimensat(_AT_FDCWD, b"/proc/self/fd/%d" % dir_fd, times, 0))


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_fd, old, new_fd, new, flags))
