"""System calls on inotify, fanotify and epoll descriptors, also those of another process.

Apart from ``kernel``, which the agent uses: only checkpoint and restore need these.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import termios
from collections.abc import Sequence
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_PIDFD_GETFD = 438  # the same on every architecture
_SYS_KCMP = {"x86_64": 312}.get(os.uname().machine, 272)  # 272: all that came after 2011
_KCMP_FILE, _KCMP_EPOLL_TFD = 0, 7
_INOTIFY_IOC_SETNEXTWD = 0x4004_4900  # _IOW('I', 0, __s32)
_F_SETOWN_EX, _F_GETOWN_EX, _F_SETSIG, _F_GETSIG, _F_GETOWNER_UIDS = 15, 16, 10, 11, 17
_EPOLL_CTL_ADD = 1
_AT_FDCWD = -100
_WORDS = struct.Struct("=16Q")  # MAX_HANDLE_SZ
_AT_EMPTY_PATH = 0x1000
_FAN_MARK_ADD = 1

IN_MASK_CREATE = 0x1000_0000
FAN_PERMISSION = 0x17_0000
"""FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS."""
FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM = 0x10, 0x100
FAN_MARK_IGNORED_MASK, FAN_MARK_EVICTABLE, FAN_MARK_IGNORE = 0x20, 0x200, 0x400


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def fd_path(fd: int) -> str:
    """A path that leads to what a descriptor refers to: proc_pid_fd(5)."""
    return f"/proc/self/fd/{fd}"


def fdinfo(fd: int) -> str:
    """The text of proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        return info.read()


# Of another process


def take_descriptor(pidfd: int, fd: int) -> int:
    """A descriptor here for the file of a descriptor of another process: pidfd_getfd(2), Linux 5.6.
    Raises OSError: EPERM if the process may not be traced.
    """
    return _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))


class Slot(ctypes.Structure):
    """An entry of an epoll set: struct kcmp_epoll_slot (linux/kcmp.h)."""

    _fields_ = (("efd", ctypes.c_uint32), ("tfd", ctypes.c_uint32), ("toff", ctypes.c_uint32))


def compare_files(pid: int, fd: int, other_pid: int, other_fd: int) -> int:
    """0 if two descriptors refer to one open file, else an order, -1 or 1: kcmp(2). Raises OSError:
    ENOSYS if the kernel lacks CONFIG_KCMP.
    """
    fds = ctypes.c_ulong(fd), ctypes.c_ulong(other_fd)
    order = _check(_libc.syscall(_SYS_KCMP, pid, other_pid, _KCMP_FILE, *fds))
    return (0, -1, 1)[order] if order < 3 else 1


def is_target(pid: int, fd: int, epoll_pid: int, slot: Slot) -> bool:
    """Whether a descriptor refers to the file of an epoll entry: kcmp(2). Raises OSError."""
    arguments = ctypes.c_ulong(fd), ctypes.byref(slot)
    return _check(_libc.syscall(_SYS_KCMP, pid, epoll_pid, _KCMP_EPOLL_TFD, *arguments)) == 0


# Of any file


def bytes_queued(fd: int) -> int:
    """How many bytes of events are queued: FIONREAD."""
    (size,) = struct.unpack("=i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size)


class Owner(NamedTuple):
    """The receiver of the signal of a file with O_ASYNC: fcntl(2), F_SETOWN_EX and F_SETSIG."""

    uid: int
    euid: int
    signum: int
    pid_type: int  # F_OWNER_TID 0, F_OWNER_PID 1, F_OWNER_PGRP 2
    pid: int  # 0: no process


def owner(fd: int) -> Owner:
    """The owner of a file. Raises OSError."""
    pid_type, pid = struct.unpack("=ii", fcntl.fcntl(fd, _F_GETOWN_EX, bytes(8)))
    try:
        uid, euid = struct.unpack("=II", fcntl.fcntl(fd, _F_GETOWNER_UIDS, bytes(8)))
    except OSError:  # a kernel without CONFIG_CHECKPOINT_RESTORE
        uid = euid = 0
    if not pid:
        pid_type = 0
    return Owner(uid, euid, fcntl.fcntl(fd, _F_GETSIG), pid_type, pid)


def set_owner(fd: int, owner: Owner) -> None:
    """Set the owner, as far as this process may. Raises OSError."""
    fcntl.fcntl(fd, _F_SETSIG, owner.signum)
    fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("=ii", owner.pid_type, owner.pid))


# inotify


def inotify_init(flags: int) -> int:
    """inotify_init1(2)."""
    return _check(_libc.inotify_init1(flags))


def add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the watch's number."""
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)))


def why_not(error: OSError) -> str:
    """Why a file cannot be watched, for the user."""
    if error.errno == errno.ENOSPC:  # inotify(7)
        return "the user's limit of watches (fs.inotify.max_user_watches) is reached"
    return f"it cannot be watched: {error.strerror}"


def remove_watch(fd: int, wd: int) -> None:
    """inotify_rm_watch(2)."""
    _check(_libc.inotify_rm_watch(fd, wd))


def set_next_wd(fd: int, wd: int) -> None:
    """Make ``wd`` the number of the next watch, if it is free. Raises OSError: ENOTTY if the kernel
    lacks CONFIG_CHECKPOINT_RESTORE.
    """
    fcntl.ioctl(fd, _INOTIFY_IOC_SETNEXTWD, wd)


# fanotify


def fanotify_init(flags: int, event_flags: int) -> int:
    """fanotify_init(2)."""
    return _check(_libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(event_flags)))


def fanotify_mark(fd: int, flags: int, mask: int, path: str) -> None:
    """fanotify_mark(2), FAN_MARK_ADD."""
    mask64, name = ctypes.c_uint64(mask), os.fsencode(path)
    _check(_libc.fanotify_mark(fd, ctypes.c_uint(flags | _FAN_MARK_ADD), mask64, _AT_FDCWD, name))


# epoll


def epoll_create(flags: int) -> int:
    """epoll_create1(2)."""
    return _check(_libc.epoll_create1(flags))


def epoll_add(epoll: int, fd: int, events: int, data: int) -> None:
    """epoll_ctl(2), EPOLL_CTL_ADD; Python's own supports no data except the descriptor."""
    packed = "=IQ" if os.uname().machine == "x86_64" else "@IQ"  # linux/eventpoll.h, EPOLL_PACKED
    _check(_libc.epoll_ctl(epoll, _EPOLL_CTL_ADD, fd, struct.pack(packed, events, data)))


# File handles


def has_decodable_handles(fd: int) -> bool:
    """Whether open_by_handle_at(2) can work on this file system: without AT_HANDLE_FID
    name_to_handle_at(2) encodes only handles that can be decoded.
    """
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 8 + 128)
    mount_id = ctypes.c_int()
    result = _libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), _AT_EMPTY_PATH)
    return result == 0 or ctypes.get_errno() == errno.EOVERFLOW


def to_words(handle: bytes) -> tuple[int, ...]:
    """A handle in CRIU's form: 64-bit words of the machine's order, 16 for the longest."""
    return _WORDS.unpack(handle.ljust(_WORDS.size, b"\0"))


def from_words(words: Sequence[int], size: int) -> bytes:
    """The handle of ``size`` bytes. Raises ValueError if the words hold none of that size."""
    if size > _WORDS.size or size > 8 * len(words):
        raise ValueError(f"a file handle cannot have {size} bytes")
    return struct.pack(f"={len(words)}Q", *words)[:size]
