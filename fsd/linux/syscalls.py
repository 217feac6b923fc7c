"""System calls that Python lacks: file handles, openat2, renameat2, and creating as the caller.

Apart because it has all of the core's ctypes (sandbox and seccomp have theirs).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

_libc = ctypes.CDLL(None, use_errno=True)
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
_NUMBERS = {"x86_64": (122, 123, 116), "aarch64": (151, 152, 159)}
_SYS = _NUMBERS.get(os.uname().machine) if ctypes.sizeof(ctypes.c_void_p) == 8 else None
"""Numbers of setfsuid, setfsgid, setgroups: raw, as glibc would change every thread."""
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


RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


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


def _check(result: int, what: object = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def file_handle(fd: int, name: bytes = b"") -> bytes:
    """{int type, f_handle} of the file of fd, or of a name in it: name_to_handle_at(2).

    Raises OSError (EOPNOTSUPP if the file system or the kernel has no handles). Not reentrant.
    """
    return handle_and_mount(fd, name)[0]


def handle_and_mount(fd: int, name: bytes = b"") -> tuple[bytes, int]:
    """The same, and the number of the mount: as in proc_pid_mountinfo(5)."""
    _handle_view[:8] = _HANDLE_ROOM
    flags = 0 if name else _AT_EMPTY_PATH
    if _libc.name_to_handle_at(fd, name, _handle_buffer, _mount_id_ref, flags):
        if ctypes.get_errno() not in _NO_HANDLE:
            _check(-1)
        # One that cannot be opened, but identifies the object (Linux 6.5).
        flags |= _AT_HANDLE_FID
        if _libc.name_to_handle_at(fd, name, _handle_buffer, _mount_id_ref, flags):
            if ctypes.get_errno() not in (*_NO_HANDLE, errno.EINVAL):
                _check(-1)
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
        return _check(_libc.syscall(_OPENAT2, root_fd, path, how, len(how)))
    fd = os.dup(root_fd)
    while path:
        cut = len(path) if len(path) < _PATH_BYTES else path.rindex(b"/", 0, _PATH_BYTES)
        try:
            below = _check(_libc.syscall(_OPENAT2, fd, path[:cut], how, len(how)))
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
        fd: int = _libc.open_by_handle_at(mount_fd, data, flags | os.O_CLOEXEC)
        if fd >= 0 or ctypes.get_errno() != errno.ENOMEM:
            break
        number = ctypes.get_errno()
        os.sched_yield()  # this may be the processor that the other thread needs
        ctypes.set_errno(number)
    return _check(fd)


_HANDLE_TRIES = 64
"""Attempts to open by handle before ENOMEM is believed: about 0.1 ms."""


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_fd, old, new_fd, new, flags), old)


@cache
def _is_root() -> bool:
    return os.geteuid() == 0


def cannot_change_identity() -> str:
    """Why a server run by root must not start here: it would do everything as root; "" = it may. An
    ordinary user's server never changes its identity.
    """
    if _is_root() and _SYS is None:
        return (
            f"no system call numbers for setfsuid on this machine ({os.uname().machine}), so every "
            "file would be made as root; run the server as an ordinary user"
        )
    return ""


def takes_for_itself(uid: int) -> bool:
    """Whether files that this server makes for another user of the mount belong to the server's
    user.
    """
    return not _is_root() and uid not in (0, os.geteuid())


def supplementary_groups(pid: int) -> list[int]:
    """Groups of a process, from /proc; none if it is gone or not visible. Groups that this user
    namespace does not map are left out: /proc shows all of them as the overflow gid.
    """
    if not sees_processes():
        return []
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    groups = [int(group) for group in line.split()[1:]]
                    return [group for group in groups if group != _overflow_gid()]
    except OSError:
        pass
    return []


@cache
def _overflow_gid() -> int:
    """The gid shown for gids that are not mapped: user_namespaces(7); -1 if all are mapped."""
    with open("/proc/self/gid_map", "rb") as gid_map:
        if gid_map.read().split() == [b"0", b"0", b"4294967295"]:
            return -1
    with open("/proc/sys/kernel/overflowgid", "rb") as overflow:
        return int(overflow.read())


@contextmanager
def acting_as(
    uid: int, gid: int, groups: Sequence[int], *, umask: int = 0, judged: bool = False
) -> Iterator[None]:
    """Switch this thread's file system identity to the caller's, then back.

    ``judged``: a guest's kernel has already checked permissions, with groups and ACLs that are not
    known here; so this thread may enter and write any directory. The umask belongs to the process:
    other threads must not create files. The identity does not change if the server or the caller is
    not root. Raises OSError EOVERFLOW for a number that the server's user namespace does not map.
    """
    before = os.umask(umask) if umask else 0
    try:
        if not _is_root() or (uid == 0 and gid == 0):
            yield
            return
        setfsuid, setfsgid, setgroups = _known_calls()
        own = os.getgroups()
        effective = _capabilities()[0]  # before any is dropped
        grouped = False
        try:
            _set_checked(setfsgid, gid)
            _set_checked(setfsuid, uid)
            _set_groups(setgroups, groups)
            grouped = True
            if judged and uid:
                lowered = effective & ~_CAP_FS_SET | _CAP_DAC_OVERRIDE
                _check(_libc.capset(_CAP_HEADER, _effective(lowered)))
            yield
        finally:
            _libc.syscall(
                setfsuid, 0
            )  # restores what is permitted, whether it had an effect or not
            _libc.syscall(setfsgid, 0)
            if grouped:
                _set_groups(setgroups, own)
            if uid:
                _check(_libc.capset(_CAP_HEADER, _effective(effective)))
    finally:
        if umask:
            os.umask(before)


@contextmanager
def on_behalf_of(uid: int, *, kill_suid: bool) -> Iterator[None]:
    """Charge what this thread's calls allocate on disk to that user: no blocks reserved for root,
    and within quotas. Permissions given by a guest's kernel or an open file stay.

    ``kill_suid``: as for ``killing_suid``. Nothing changes if the server is not root. Raises
    OSError EOVERFLOW for a uid that is not mapped here.
    """
    if not _is_root() or not uid:
        with killing_suid() if kill_suid else nullcontext():
            yield
        return
    setfsuid = _known_calls()[0]
    effective = _capabilities()[0]
    try:
        _set_checked(setfsuid, uid)  # takes away _CAP_FS_SET, CAP_FSETID among it
        if not kill_suid:
            _check(_libc.capset(_CAP_HEADER, _effective(effective)))
        yield
    finally:
        _libc.syscall(setfsuid, 0)
        _check(_libc.capset(_CAP_HEADER, _effective(effective)))


def _known_calls() -> tuple[int, int, int]:
    if _SYS is None:  # ``cannot_change_identity`` has said so at the start
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return _SYS


def _set_checked(number: int, wanted: int) -> None:
    """setfsuid(2) or setfsgid(2), which report no error: read the value back. Raises OSError
    EOVERFLOW if it was ignored, as for a number that this user namespace does not map.
    """
    _libc.syscall(number, wanted)
    if wanted == NO_ID or _libc.syscall(number, -1) & NO_ID != wanted:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))


NO_ID = 0xFFFF_FFFF
"""No valid uid or gid: what a kernel sends for one that its mount does not map."""
_CAP_HEADER = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_CAP_DAC_OVERRIDE, _CAP_FSETID, _CAP_SYS_RESOURCE, _CAP_MKNOD = 1 << 1, 1 << 4, 1 << 24, 1 << 27
_CAP_FS_SET = 0x1F | 1 << 9 | 1 << 27 | 1 << 32
"""The capabilities that setfsuid(2) takes away: CAP_FS_SET of linux/capability.h."""


def obey_limits_of_disks() -> None:
    """Give up CAP_SYS_RESOURCE permanently: with it this thread and its children would use blocks
    reserved for root, and exceed quotas. Raise resource limits before. Raises OSError.
    """
    capabilities = (s & ~_CAP_SYS_RESOURCE for s in _capabilities())
    _check(_libc.capset(_CAP_HEADER, _packed(*capabilities)))
    _capabilities.cache_clear()
    _effective.cache_clear()


@cache
def _capabilities() -> tuple[int, int, int]:
    """Effective, permitted and inheritable capabilities, as of the first request."""
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(_CAP_HEADER, data))
    low = struct.unpack_from("=III", data)
    high = struct.unpack_from("=III", data, 12)
    effective, permitted, inheritable = (a | b << 32 for a, b in zip(low, high, strict=True))
    return effective, permitted, inheritable


@cache
def _effective(effective: int) -> bytes:
    """The argument of capset(2) for these effective capabilities."""
    return _packed(effective, *_capabilities()[1:])


def _packed(*sets: int) -> bytes:
    return struct.pack("=6I", *(s & 0xFFFF_FFFF for s in sets), *(s >> 32 for s in sets))


@contextmanager
def killing_suid() -> Iterator[None]:
    """Let writes and truncations of this thread clear suid and sgid bits, as an ordinary user's do:
    without CAP_FSETID.
    """
    effective = _capabilities()[0]
    if not effective & _CAP_FSETID:
        yield
        return
    _check(_libc.capset(_CAP_HEADER, _effective(effective & ~_CAP_FSETID)))
    try:
        yield
    finally:
        _check(_libc.capset(_CAP_HEADER, _effective(effective)))


@contextmanager
def making_nodes() -> Iterator[None]:
    """Let this thread make device nodes, if the server may at all: with CAP_MKNOD."""
    effective, permitted, _ = _capabilities()
    _check(_libc.capset(_CAP_HEADER, _effective(effective | permitted & _CAP_MKNOD)))
    try:
        yield
    finally:
        _check(_libc.capset(_CAP_HEADER, _effective(effective)))


def _set_groups(number: int, groups: Sequence[int]) -> None:
    if _libc.syscall(number, len(groups), (ctypes.c_uint32 * len(groups))(*groups)) < 0:
        if ctypes.get_errno() == errno.EINVAL:  # one that is not mapped here
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        _check(-1)


_STATX_BTIME = 0x800
_statx_buffer = ctypes.create_string_buffer(256)


def born_ns(dir_fd: int, name: bytes) -> int:
    """Time of creation, of dir_fd itself for b""; 0 if the file system has none: statx(2). Not
    reentrant.
    """
    flags = _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH
    _check(_libc.statx(dir_fd, name, flags, _STATX_BTIME, _statx_buffer), name)
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
    _check(_libc.utimensat(_AT_FDCWD, path.encode(), times, 0))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    long = ctypes.c_long
    _check(_libc.fallocate(fd, mode, long(offset), long(length)))


_libc.getdents64.restype = ctypes.c_ssize_t


def getdents(fd: int, size: int) -> bytes:
    """getdents64(2) into a buffer of that size: structs linux_dirent64, b"" at the end."""
    buffer = ctypes.create_string_buffer(size)
    count = _check(_libc.getdents64(fd, buffer, ctypes.c_size_t(size)))
    return buffer.raw[:count]


def syncfs(fd: int) -> None:
    """syncfs(2) of the file system that fd is on."""
    _check(_libc.syncfs(fd))
