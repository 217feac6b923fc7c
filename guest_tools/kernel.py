"""System calls for the agent that Python's library lacks."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import struct
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)
# The same on every architecture.
_SYS_OPEN_TREE, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 430, 431, 432
_SYS_FSPICK, _SYS_MOUNT_SETATTR = 433, 442
_AT_EMPTY_PATH = 0x1000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NODEV = 1, 4
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 1, 8
_FSCONFIG_SET_FLAG, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 6, 7
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT = 0x100, 0x800
_AT_STATX_FORCE_SYNC, _AT_STATX_DONT_SYNC = 0x2000, 0x4000
_STATX_TYPE = 1
_UTIME_OMIT = (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_OMIT, _SET = _Timespec(0, _UTIME_OMIT), _Timespec(0, 0)
_ATIME = (_Timespec * 2)(_SET, _OMIT)
_MTIME = (_Timespec * 2)(_OMIT, _SET)
_BOTH = (_Timespec * 2)(_SET, _SET)
_utimensat = _libc.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)


def check(result: int) -> int:
    """The result of a system call. Raises OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def clone_mount(path: str) -> int:
    """A private copy of the mount at ``path``, which does not keep it busy: open_tree(2). From
    Linux 5.12 on no device can be opened on it. Raises OSError.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    copy = check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags))
    with suppress(OSError):
        _set_attributes(copy, setting=_MOUNT_ATTR_NODEV)
    return copy


def _set_attributes(mount_fd: int, *, setting: int = 0, clearing: int = 0) -> None:
    """Change only this mount: mount_setattr(2), Linux 5.12. Raises OSError."""
    attributes = struct.pack("=4Q", setting, clearing, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    check(_libc.syscall(_SYS_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, attributes, size))


def make_writable(mount_fd: int) -> None:
    """Make only this mount writable, if ``mount -o ro`` has made the file system read-only.

    ``mount -o ro`` sets a flag on the mount and one on the file system. The first is cleared on
    this mount. fspick(2) clears the second; other mounts of the file system keep their own flag,
    so their users still get EROFS. Raises OSError.
    """
    _set_attributes(mount_fd, clearing=_MOUNT_ATTR_RDONLY)
    if not os.fstatvfs(mount_fd).f_flag & os.ST_RDONLY:
        return
    flags = _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH
    context = check(_libc.syscall(_SYS_FSPICK, mount_fd, b"", flags))
    try:
        check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"rw", None, 0))
        check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0))
    finally:
        os.close(context)


def mount_privately(kind: str) -> int:
    """The root of a file system that is mounted nowhere: fsmount(2), Linux 5.2. Raises OSError."""
    context = check(_libc.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC))
    try:
        check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        return check(_libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)


def open_by_handle(mount_fd: int, kind: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2); ``mount_fd``: not O_PATH, or AT_FDCWD. Raises OSError: EPERM if the
    process lacks CAP_DAC_READ_SEARCH.
    """
    data = struct.pack("=Ii", len(handle), kind) + handle
    return check(_libc.open_by_handle_at(mount_fd, data, flags | os.O_CLOEXEC))


def touch(fd: int, *, atime: bool, mtime: bool) -> None:
    """utimensat(2) on the file of an O_PATH descriptor, also a symbolic link. Raises OSError.

    The times that are set decide the event: only atime is IN_ACCESS, only mtime IN_MODIFY, both
    IN_ATTRIB (include/linux/fsnotify.h, fsnotify_change).
    """
    times = _times(atime, mtime)
    if _utimensat(fd, b"", times, _AT_EMPTY_PATH) < 0:
        if ctypes.get_errno() != errno.EINVAL:
            check(-1)
        # Before Linux 5.8, which is twice as fast.
        check(_utimensat(_AT_FDCWD, b"/proc/self/fd/%d" % fd, times, 0))


def touch_name(dir_fd: int, name: bytes, *, atime: bool, mtime: bool) -> None:
    """The same for a name in a directory, or for what is mounted on it. Raises OSError."""
    check(_utimensat(dir_fd, name, _times(atime, mtime), _AT_SYMLINK_NOFOLLOW))


def _times(atime: bool, mtime: bool) -> ctypes.Array[_Timespec]:
    return _BOTH if atime and mtime else _ATIME if atime else _MTIME


def kind_of(fd: int) -> int:
    """The type of a descriptor's file (S_IFMT), as the kernel has it: statx(2) with
    AT_STATX_DONT_SYNC, which makes no request to the server. Raises OSError.
    """
    buffer = ctypes.create_string_buffer(256)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    try:
        check(_libc.statx(fd, b"", flags, _STATX_TYPE, buffer))
        (mode,) = struct.unpack_from("=H", buffer, 28)
    except (AttributeError, OSError) as error:
        # An old C library, an old kernel, a filter; the library's replacement fails with EINVAL.
        missing = (errno.ENOSYS, errno.EPERM, errno.EINVAL)
        if isinstance(error, OSError) and error.errno not in missing:
            raise
        mode = os.fstat(fd).st_mode
    return stat.S_IFMT(mode)


def ask_for(dir_fd: int, name: bytes) -> None:
    """Make the kernel ask the server about a cached name: statx(2) with AT_STATX_FORCE_SYNC asks
    for the attributes, and upon ESTALE for the name (LOOKUP_REVAL of fs/namei.c). Raises OSError.
    """
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_STATX_FORCE_SYNC
    check(_libc.statx(dir_fd, name, flags, _STATX_TYPE, ctypes.create_string_buffer(256)))


def mount_id(fd: int) -> int:
    """The id of the mount that a descriptor was opened on: proc_pid_fdinfo(5). Raises OSError."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        found = re.search(r"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE)
    if found is None:
        raise OSError(errno.ENOTSUP, "the kernel does not show the mount of a descriptor")
    return int(found[1])


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    check(_libc.renameat2(old_fd, old, new_fd, new, flags))
