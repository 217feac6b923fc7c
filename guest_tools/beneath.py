"""Opens files below a directory without leaving its mount, whatever is linked or mounted there.

The agent reaches every file in this way. Apart from ``kernel`` because the rule takes more than one
system call: openat2(2) if the kernel has it, else one component at a time.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import struct
from collections.abc import Iterator

from . import kernel

_SYS_OPENAT2 = 437  # the same on every architecture; Linux 5.6
_HOW = struct.Struct("=3Q")  # struct open_how: flags, mode, resolve
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08
"""RESOLVE_NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH (linux/openat2.h)."""
_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = _ANY | os.O_DIRECTORY
_PATH_LIMIT = 4000
"""Bytes of a path passed to one system call: below PATH_MAX."""
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (  # which makes the call a third faster
    ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t,
)  # fmt: skip


def check_name(name: bytes) -> None:
    """Raises OSError (EINVAL) if this is not the name of one entry of a directory."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "not a name", name)


def reach(dir_fd: int, path: bytes, *, directory: bool = False) -> int:
    """An O_PATH descriptor of the file at ``path`` below ``dir_fd``; of a symbolic link itself.

    ``directory``: it has to be one. Raises OSError: EINVAL for a path with an empty component, a
    dot or a dot-dot; ELOOP or ENOTDIR if a link is on the way; EXDEV if a mount is.
    """
    names = path.split(b"/")
    for name in names:
        check_name(name)
    open_one = openat2 if has_openat2() else _step
    if len(names) == 1:
        return open_one(dir_fd, path, _DIRECTORY if directory else _ANY)
    parts = names if open_one is _step else list(_joined(names))
    fd = dir_fd
    for number, part in enumerate(parts, 1):
        flags = _DIRECTORY if directory or number < len(parts) else _ANY
        try:
            below = open_one(fd, part, flags)
        finally:
            if fd != dir_fd:
                os.close(fd)
        fd = below
    return fd


def reopen(fd: int, flags: int) -> int:
    """Open the file of an O_PATH descriptor without looking up a name. Raises OSError."""
    return os.open(b"/proc/self/fd/%d" % fd, flags | os.O_CLOEXEC)


def open_file(dir_fd: int, path: bytes, flags: int) -> int:
    """Open the regular file or directory at ``path``, see ``reach``. Raises OSError: EINVAL for
    anything else, such as a device, where opening could have an effect elsewhere.
    """
    fd = reach(dir_fd, path)
    try:
        return open_reached(fd, flags)
    finally:
        os.close(fd)


def open_reached(fd: int, flags: int) -> int:
    """Open an O_PATH descriptor's file if it is a regular file or directory. Raises OSError."""
    _require_file_or_directory(fd)
    return reopen(fd, flags)


def _require_file_or_directory(fd: int) -> None:
    if kernel.kind_of(fd) not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.EINVAL, "neither a file nor a directory")


def open_entry(dir_fd: int, name: bytes, flags: int) -> int:
    """Open the regular file or directory of that name, on a mount on which no device can be opened
    and nothing is mounted: with one look-up. Raises OSError as ``open_file`` does.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        _require_file_or_directory(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


@functools.cache
def has_openat2() -> bool:
    """Whether openat2(2) works: not before Linux 5.6, nor if a seccomp filter forbids it."""
    root = os.open("/", _DIRECTORY)
    try:
        os.close(openat2(root, b".", _DIRECTORY))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            return False
        raise
    finally:
        os.close(root)
    return True


def openat2(dir_fd: int, path: bytes, flags: int) -> int:
    """openat2(2), beneath ``dir_fd``, on its mount, following no link. Raises OSError."""
    return kernel.check(_syscall(_SYS_OPENAT2, dir_fd, path, _how(flags), _HOW.size))


@functools.cache
def _how(flags: int) -> bytes:
    return _HOW.pack(flags, 0, _RESOLVE)


def _step(dir_fd: int, name: bytes, flags: int) -> int:
    """The same for one name without openat2: the file has to be on the same mount. Device numbers
    do not show that, as a directory of the share may be bound over another one.
    """
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        if kernel.mount_id(fd) != kernel.mount_id(dir_fd):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    except OSError:
        os.close(fd)
        raise
    return fd


def _joined(names: list[bytes]) -> Iterator[bytes]:
    """Names joined to paths that fit one system call."""
    start, size = 0, 0
    for end, name in enumerate(names):
        if size + len(name) >= _PATH_LIMIT and end > start:
            yield b"/".join(names[start:end])
            start, size = end, 0
        size += len(name) + 1
    yield b"/".join(names[start:])
