"""Acts as a caller: with its file system identity, its capabilities, its limits on disk.

For one thread each, and with raw numbers of system calls, because glibc would change every thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

from . import syscalls
from .libc import check, libc

_NUMBERS = {"x86_64": (122, 123, 116), "aarch64": (151, 152, 159)}
_SYS = _NUMBERS.get(os.uname().machine) if ctypes.sizeof(ctypes.c_void_p) == 8 else None
"""Numbers of setfsuid, setfsgid, setgroups: raw, as glibc would change every thread."""


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
    if not syscalls.sees_processes():
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


class _Umask:
    """A umask within a with block."""

    __slots__ = ("_other",)

    def __init__(self, umask: int) -> None:
        self._other = umask

    def __enter__(self) -> None:
        self._other = os.umask(self._other)

    def __exit__(self, *_error: object) -> None:
        os.umask(self._other)


def acting_as(
    uid: int, gid: int, groups: Sequence[int], *, umask: int = 0, judged: bool = False
) -> AbstractContextManager[None]:
    """Switch this thread's file system identity to the caller's, then back.

    ``judged``: a guest's kernel has already checked permissions, with groups and ACLs that are not
    known here; so this thread may enter and write any directory. The umask belongs to the process:
    other threads must not create files. The identity does not change if the server or the caller is
    not root. Raises OSError EOVERFLOW for a number that the server's user namespace does not map.
    """
    if not _is_root() or (uid == 0 and gid == 0):
        return _Umask(umask) if umask else nullcontext()
    return _acting_as(uid, gid, groups, umask, judged)


@contextmanager
def _acting_as(
    uid: int, gid: int, groups: Sequence[int], umask: int, judged: bool
) -> Iterator[None]:
    setfsuid, setfsgid, setgroups = _known_calls()
    own = os.getgroups()
    effective = _capabilities()[0]  # before any is dropped
    grouped = False
    with _Umask(umask) if umask else nullcontext():
        try:
            _set_checked(setfsgid, gid)
            _set_checked(setfsuid, uid)
            _set_groups(setgroups, groups)
            grouped = True
            if judged and uid:
                lowered = effective & ~_CAP_FS_SET | _CAP_DAC_OVERRIDE
                check(libc.capset(_CAP_HEADER, _effective(lowered)))
            yield
        finally:
            libc.syscall(setfsuid, 0)  # restores what is permitted, whether it had an effect or not
            libc.syscall(setfsgid, 0)
            if grouped:
                _set_groups(setgroups, own)
            if uid:
                check(libc.capset(_CAP_HEADER, _effective(effective)))


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
            check(libc.capset(_CAP_HEADER, _effective(effective)))
        yield
    finally:
        libc.syscall(setfsuid, 0)
        check(libc.capset(_CAP_HEADER, _effective(effective)))


def _known_calls() -> tuple[int, int, int]:
    if _SYS is None:  # ``cannot_change_identity`` has said so at the start
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return _SYS


def _set_checked(number: int, wanted: int) -> None:
    """setfsuid(2) or setfsgid(2), which report no error: read the value back. Raises OSError
    EOVERFLOW if it was ignored, as for a number that this user namespace does not map.
    """
    libc.syscall(number, wanted)
    if wanted == NO_ID or libc.syscall(number, -1) & NO_ID != wanted:
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
    check(libc.capset(_CAP_HEADER, _packed(*capabilities)))
    _capabilities.cache_clear()
    _effective.cache_clear()


@cache
def _capabilities() -> tuple[int, int, int]:
    """Effective, permitted and inheritable capabilities, as of the first request."""
    data = ctypes.create_string_buffer(24)
    check(libc.capget(_CAP_HEADER, data))
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
    check(libc.capset(_CAP_HEADER, _effective(effective & ~_CAP_FSETID)))
    try:
        yield
    finally:
        check(libc.capset(_CAP_HEADER, _effective(effective)))


@contextmanager
def making_nodes() -> Iterator[None]:
    """Let this thread make device nodes, if the server may at all: with CAP_MKNOD."""
    effective, permitted, _ = _capabilities()
    check(libc.capset(_CAP_HEADER, _effective(effective | permitted & _CAP_MKNOD)))
    try:
        yield
    finally:
        check(libc.capset(_CAP_HEADER, _effective(effective)))


def _set_groups(number: int, groups: Sequence[int]) -> None:
    if libc.syscall(number, len(groups), (ctypes.c_uint32 * len(groups))(*groups)) < 0:
        if ctypes.get_errno() == errno.EINVAL:  # one that is not mapped here
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        check(-1)
