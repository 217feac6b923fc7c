"""System calls that Python lacks: file handles, renameat2, and creating files as the caller.

Apart because it is all of the server's ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_MAX_HANDLE_SZ = 128
_handle_buffer = ctypes.create_string_buffer(8 + _MAX_HANDLE_SZ)
_mount_id = ctypes.c_int()
_SYS = {"x86_64": (122, 123, 116), "aarch64": (151, 152, 159)}.get(os.uname().machine)
"""Numbers of setfsuid, setfsgid, setgroups: raw, as glibc would change every thread."""

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


def _check(result: int, what: object = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def file_handle(fd: int, name: bytes = b"") -> bytes:
    """{int type, f_handle} of what fd refers to, or of a name in it: name_to_handle_at(2).

    Raises OSError (EOPNOTSUPP where the file system has no handles). Not reentrant.
    """
    struct.pack_into("=Ii", _handle_buffer, 0, _MAX_HANDLE_SZ, 0)
    flags = 0 if name else _AT_EMPTY_PATH
    _check(_libc.name_to_handle_at(fd, name, _handle_buffer, ctypes.byref(_mount_id), flags))
    (size,) = struct.unpack_from("=I", _handle_buffer)
    return _handle_buffer.raw[4 : 8 + size]


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """A descriptor of the object with that handle: open_by_handle_at(2), CAP_DAC_READ_SEARCH.

    Raises OSError, ESTALE where there is no such object: also for the ENOMEM that ext4 answers
    while the object is being freed (seen on Linux 6.18).
    """
    data = struct.pack("=I", len(handle) - 4) + handle
    try:
        return _check(_libc.open_by_handle_at(mount_fd, data, flags | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_fd, old, new_fd, new, flags), old)


@cache
def _is_root() -> bool:
    return os.geteuid() == 0


def supplementary_groups(pid: int) -> list[int]:
    """Groups of a process, from /proc; none where it is gone or not visible."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    return [int(group) for group in line.split()[1:]]
    except OSError:
        pass
    return []


@contextmanager
def acting_as(uid: int, gid: int, pid: int) -> Iterator[None]:
    """Make this thread's file system identity the caller's (its groups too), then come back.

    Changes only the calling thread. No-op where the server is no root or the caller is root.
    """
    if not _is_root() or _SYS is None or (uid == 0 and gid == 0):
        yield
        return
    setfsuid, setfsgid, setgroups = _SYS
    own = os.getgroups()
    _set_groups(setgroups, supplementary_groups(pid))
    _libc.syscall(setfsgid, gid)
    _libc.syscall(setfsuid, uid)
    try:
        yield
    finally:
        _libc.syscall(setfsuid, 0)
        _libc.syscall(setfsgid, 0)
        _set_groups(setgroups, own)


def _set_groups(number: int, groups: list[int]) -> None:
    _check(_libc.syscall(number, len(groups), (ctypes.c_uint32 * len(groups))(*groups)))


_STATX_BTIME = 0x800
_statx_buffer = ctypes.create_string_buffer(256)


def born_ns(dir_fd: int, name: bytes) -> int:
    """Time of creation; 0 where the file system has none: statx(2). Not reentrant."""
    _check(_libc.statx(dir_fd, name, _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, _statx_buffer), name)
    (mask,) = struct.unpack_from("=I", _statx_buffer)
    seconds, nanoseconds = struct.unpack_from("=qI", _statx_buffer, 80)
    born: int = seconds * 10**9 + nanoseconds if mask & _STATX_BTIME else 0
    return born


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_UTIME_OMIT = (1 << 30) - 2
_AT_FDCWD = -100


def set_times(path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2) with UTIME_OMIT for None, which os.utime cannot say."""
    times = (_Timespec * 2)()
    for slot, value in zip(times, (atime_ns, mtime_ns), strict=True):
        slot.sec, slot.nsec = (0, _UTIME_OMIT) if value is None else divmod(value, 10**9)
    _check(_libc.utimensat(_AT_FDCWD, path.encode(), times, 0))
