"""inotify, fanotify and file handles of the running kernel, for tests that read its own output."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [
    ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p,
]  # fmt: skip
IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM = 0x1, 0x10, 0x100
_FAN_CLOEXEC, _FAN_REPORT_FID = 0x1, 0x200
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def directory() -> Iterator[Path]:
    """A new directory on a file system whose stat shows the kernel's own device: not every one
    does (btrfs, overlayfs), tmpfs does.
    """
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fsd-", dir=place) as path:
        yield Path(path)


@contextmanager
def inotify() -> Iterator[int]:
    """An inotify descriptor."""
    with _closing(_check(_libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC))) as fd:
        yield fd


def add_watch(fd: int, path: Path, mask: int) -> int:
    """inotify_add_watch(2)."""
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)))


@contextmanager
def fanotify() -> Iterator[int]:
    """A fanotify descriptor; an ordinary user gets one that reports file ids."""
    flags = _FAN_CLOEXEC | (0 if os.geteuid() == 0 else _FAN_REPORT_FID)
    with _closing(_check(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC))) as fd:
        yield fd


def fanotify_mark(fd: int, flags: int, mask: int, path: Path) -> None:
    """fanotify_mark(2)."""
    _check(_libc.fanotify_mark(fd, FAN_MARK_ADD | flags, mask, _AT_FDCWD, os.fsencode(path)))


def fdinfo(fd: int) -> str:
    """The kernel's text about a descriptor of this process."""
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


def mount_id(path: Path) -> int:
    """The mount that a path is on."""
    with _closing(os.open(path, os.O_PATH)) as fd:
        lines = dict(line.split(":", 1) for line in fdinfo(fd).splitlines())
    return int(lines["mnt_id"])


def file_handle(path: Path) -> tuple[int, bytes]:
    """Type and bytes: name_to_handle_at(2)."""
    buffer = ctypes.create_string_buffer(8 + 128)
    ctypes.c_uint32.from_buffer(buffer, 0).value = 128
    mount = ctypes.c_int()
    name = os.fsencode(path)
    _check(_libc.name_to_handle_at(_AT_FDCWD, name, buffer, ctypes.byref(mount), 0))
    size = ctypes.c_uint32.from_buffer(buffer, 0).value
    return ctypes.c_int32.from_buffer(buffer, 4).value, buffer.raw[8 : 8 + size]
