"""System calls that Python lacks: file handles, openat2, renameat2, statx and a few more.

Also the paths in /proc of descriptors. Acting as a caller is in credentials.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from .libc import check, libc

_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_HANDLE_FID = 0x200
_MAX_HANDLE_SZ = 128
_handle_buffer = ctypes.create_string_buffer(8 + _MAX_HANDLE_SZ)
_handle_view = memoryview(_handle_buffer).cast("B")
_HANDLE_ROOM = struct.pack("=Ii", _MAX_HANDLE_SZ, 0)
_unpack_size = struct.Struct("=I").unpack_from
_mount_id = ctypes.c_int()
_mount_id_ref = ctypes.byref(_mount_id)
_OPENAT2 = 437
_RESOLVE_NO_XDEV, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x04, 0x08
_BELOW, _BELOW_ON_MOUNT = (
    struct.pack(
        "=QQQ",
        os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC,
        0,
        _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH | more,
    )
    for more in (0, _RESOLVE_NO_XDEV)
)
_HOW_SIZE = len(_BELOW)
_syscall = libc.syscall
_PATH_BYTES = 3800
"""Bytes of a path passed to one look-up, of the kernel's 4,096."""

_own_process = "/proc/self"


def fd_path(fd: int) -> str:
    """A path to the file of a descriptor: proc_pid_fd(5)."""
    return f"{_own_process}/fd/{fd}"


def fdinfo_path(fd: int) -> str:
    """proc_pid_fdinfo(5)."""
    return f"{_own_process}/fdinfo/{fd}"


def mountinfo_path() -> str:
    """proc_pid_mountinfo(5)."""
    return f"{_own_process}/mountinfo"


def sees_processes() -> bool:
    """Whether /proc is the machine's. In a sandbox that path is under the guest's control, and
    could be a FIFO.
    """
    return _own_process == "/proc/self"


def use_working_directory_as_process() -> None:
    """The working directory is /proc/self, and must stay so: for a sandbox without /proc."""
    global _own_process
    _own_process = "."


RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def is_gone(error: OSError) -> bool:
    """Whether an error means that the object does not exist. Any other (no descriptor, no memory,
    no permission, a failing disk) only means that it could not be looked at.
    """
    return error.errno in _GONE


_GONE = (errno.ENOENT, errno.ESTALE)


class _SkippingGone:
    """``contextlib.suppress`` for the errors for which ``is_gone`` holds, and no others."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError) and is_gone(error)


skipping_gone = _SkippingGone()
"""For a with block that ends early if its object does not exist."""


def file_handle(fd: int, name: bytes = b"") -> bytes:
    """{int type, f_handle} of the file of fd, or of a name in it: name_to_handle_at(2).

    Raises OSError (EOPNOTSUPP if the file system or the kernel has no handles). Not reentrant.
    """
    return handle_and_mount(fd, name)[0]


def handle_and_mount(fd: int, name: bytes = b"") -> tuple[bytes, int]:
    """The same, and the number of the mount: as in proc_pid_mountinfo(5)."""
    _handle_view[:8] = _HANDLE_ROOM
    flags = 0 if name else _AT_EMPTY_PATH
    if libc.name_to_handle_at(fd, name, _handle_buffer, _mount_id_ref, flags):
        if ctypes.get_errno() not in _NO_HANDLE:
            check(-1)
        # One that cannot be opened, but identifies the object (Linux 6.5).
        flags |= _AT_HANDLE_FID
        if libc.name_to_handle_at(fd, name, _handle_buffer, _mount_id_ref, flags):
            if ctypes.get_errno() not in (*_NO_HANDLE, errno.EINVAL):
                check(-1)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), name)
    (size,) = _unpack_size(_handle_view)
    return bytes(_handle_view[4 : 8 + size]), _mount_id.value


_NO_HANDLE = (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS)
"""Errors of name_to_handle_at(2) for objects that never have a handle. EOVERFLOW is what the kernel
makes of it if the file system has none for this object (do_sys_name_to_handle in fs/fhandle.c)."""


def shown_path(fd: int) -> bytes:
    """The path of an open object according to the kernel: readlink of /proc/self/fd,
    proc_pid_fd(5).
    """
    return os.fsencode(os.readlink(fd_path(fd)))


def mount_id(fd: int) -> int:
    """The number of the mount that fd was opened on, also without file handles."""
    try:
        return handle_and_mount(fd)[1]
    except OSError:
        with open(fdinfo_path(fd), "rb") as info:
            return next(int(line[7:]) for line in info if line.startswith(b"mnt_id:"))


def open_below(root_fd: int, path: bytes, *, one_mount: bool) -> int:
    """An O_PATH descriptor of an object below the root, without following links; with ``one_mount``
    also without entering another mount, which may hang: openat2(2). Raises OSError.
    """
    how = _BELOW_ON_MOUNT if one_mount else _BELOW
    if len(path) < _PATH_BYTES:
        fd: int = _syscall(_OPENAT2, root_fd, path, how, _HOW_SIZE)
        return fd if fd >= 0 else check(fd)
    fd = os.dup(root_fd)
    while path:
        cut = len(path) if len(path) < _PATH_BYTES else path.rindex(b"/", 0, _PATH_BYTES)
        try:
            below = check(libc.syscall(_OPENAT2, fd, path[:cut], how, len(how)))
        finally:
            os.close(fd)
        fd, path = below, path[cut + 1 :]
    return fd


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """A descriptor of the object with that handle: open_by_handle_at(2), CAP_DAC_READ_SEARCH.

    Raises OSError: ESTALE if there is no such object, ENOMEM if there is no memory. ext4 also
    answers ENOMEM for an object whose inode number is just being reused (iget_locked in fs/inode.c,
    seen on Linux 6.18): that is over in a moment, and the next attempt gets ESTALE.
    """
    data = struct.pack("=I", len(handle) - 4) + handle
    for _ in range(_HANDLE_TRIES):
        fd: int = libc.open_by_handle_at(mount_fd, data, flags | os.O_CLOEXEC)
        if fd >= 0 or ctypes.get_errno() != errno.ENOMEM:
            break
        number = ctypes.get_errno()
        os.sched_yield()  # this may be the processor that the other thread needs
        ctypes.set_errno(number)
    return check(fd)


_HANDLE_TRIES = 64
"""Attempts to open by handle before ENOMEM is believed: about 0.1 ms."""


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    check(libc.renameat2(old_fd, old, new_fd, new, flags), old)


_STATX_BTIME = 0x800
_statx_buffer = ctypes.create_string_buffer(256)


def born_ns(dir_fd: int, name: bytes) -> int:
    """Time of creation, of dir_fd itself for b""; 0 if the file system has none: statx(2). Not
    reentrant.
    """
    flags = _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH
    check(libc.statx(dir_fd, name, flags, _STATX_BTIME, _statx_buffer), name)
    (mask,) = struct.unpack_from("=I", _statx_buffer)
    seconds, nanoseconds = struct.unpack_from("=qI", _statx_buffer, 80)
    born: int = seconds * 10**9 + nanoseconds if mask & _STATX_BTIME else 0
    return born


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
NOW = 1 << 80
"""A time for ``set_times`` that no file can have: the current time of the kernel."""
_AT_FDCWD = -100


def set_times(path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2) with UTIME_OMIT for None and UTIME_NOW for NOW, which os.utime does not
    support.
    """
    times = (_Timespec * 2)()
    for slot, value in zip(times, (atime_ns, mtime_ns), strict=True):
        if value is None:
            slot.nsec = _UTIME_OMIT
        elif value == NOW:
            slot.nsec = _UTIME_NOW
        else:
            slot.sec, slot.nsec = divmod(value, 10**9)
    check(libc.utimensat(_AT_FDCWD, path.encode(), times, 0))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    long = ctypes.c_long
    check(libc.fallocate(fd, mode, long(offset), long(length)))


libc.getdents64.restype = ctypes.c_ssize_t


def getdents(fd: int, size: int) -> bytes:
    """getdents64(2) into a buffer of that size: structs linux_dirent64, b"" at the end."""
    buffer = ctypes.create_string_buffer(size)
    count = check(libc.getdents64(fd, buffer, ctypes.c_size_t(size)))
    return buffer.raw[:count]


def syncfs(fd: int) -> None:
    """syncfs(2) of the file system that fd is on."""
    check(libc.syncfs(fd))
