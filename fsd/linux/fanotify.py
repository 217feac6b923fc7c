"""fanotify(7): what is done with files, except through one mount.

inotify does not say through which mount a file was used. A fanotify group can ignore one.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

from .inotify import queued
from .libc import check, libc

_CLOEXEC, _NONBLOCK, _UNLIMITED_MARKS, _REPORT_FID = 0x1, 0x2, 0x20, 0x200
_ADD, _REMOVE, _MOUNT, _IGNORED_SURV_MODIFY, _IGNORE = 0x1, 0x2, 0x10, 0x40, 0x400
_Q_OVERFLOW = 0x4000
_AT_FDCWD = -100
_READ_SIZE = 1 << 16
_METADATA = struct.Struct("=IBBHQii")
_FID = struct.Struct("=BBHQI")
"""struct fanotify_event_info_fid, and handle_bytes of the file handle that follows."""
_INFO_FID = 1
_mark = libc.fanotify_mark
_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


def new_group() -> int:
    """fanotify_init(2): a descriptor that does not block; events name objects by their handles.
    Raises OSError: EPERM without CAP_SYS_ADMIN.
    """
    flags = _CLOEXEC | _NONBLOCK | _UNLIMITED_MARKS | _REPORT_FID
    return check(libc.fanotify_init(flags, os.O_RDONLY))


def watch(group: int, path: str, mask: int) -> None:
    """Report these events of a file, besides those asked for before: fanotify_mark(2). Raises
    OSError.
    """
    check(_mark(group, _ADD, mask, _AT_FDCWD, path.encode()))


def unwatch(group: int, path: str, mask: int) -> None:
    """Report these events of a file no longer. Raises OSError: ENOENT if none are reported."""
    check(_mark(group, _REMOVE, mask, _AT_FDCWD, path.encode()))


def ignore_mount(group: int, path: str, mask: int) -> None:
    """Do not report these events if they are caused through the mount of ``path``: Linux 6.0.
    Raises OSError.
    """
    flags = _ADD | _MOUNT | _IGNORE | _IGNORED_SURV_MODIFY
    check(_mark(group, flags, mask, _AT_FDCWD, path.encode()))


def read(group: int) -> Iterator[tuple[bytes | None, int]]:
    """What is queued now: the file's handle, as ``syscalls.file_handle`` returns it, and its
    events. None: some of any file were lost.
    """
    left = queued(group)
    while left > 0:
        try:
            buffer = os.read(group, _READ_SIZE)
        except BlockingIOError:
            return
        left -= len(buffer)
        start = 0
        while start < len(buffer):
            length, _version, _, header, mask, _fd, _pid = _METADATA.unpack_from(buffer, start)
            if mask & _Q_OVERFLOW:
                yield None, mask
            elif length > header:
                kind, _, _, _fsid, size = _FID.unpack_from(buffer, start + header)
                if kind == _INFO_FID:
                    at = start + header + _FID.size
                    yield buffer[at : at + 4 + size], mask
            start += length
