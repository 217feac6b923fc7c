"""The sandbox of a server that guests reach: its own root and namespaces, few capabilities.

The started process stays outside: it passes on signals and removes the sockets. The process inside
has one file system, and no other process, no network and no program to execute.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import linecache
import math
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import structlog

from ..linux import syscalls
from ..linux.libc import check, libc

log = structlog.get_logger()
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x0002_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000,
)  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
_MNT_DETACH = 2
_M_ARENA_MAX = -8
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, -1)
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_END = 4.8
"""Seconds from SIGTERM until the process inside is killed; normally it exits before."""
CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID",
    "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW",
    "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT",
    "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD",
    "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
"""Names by number: capabilities(7)."""
NEEDED = frozenset(
    {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID", "MKNOD", "SETFCAP"}
)
"""The capabilities for serving files as other users; file handles also take DAC_READ_SEARCH."""


# The process outside


def supervise(inside: Callable[[int], int], on_ready: Callable[[], object]) -> int:
    """Run ``inside`` in a child; returns its exit status.

    The child gets one end of a socket pair. A byte written there means that it is ready, and
    ``on_ready`` is called here. The end of the pair means to stop, because a signal came or because
    this process is gone.
    """
    ours, theirs = socket.socketpair()
    ending = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {*ending, signal.SIGCHLD})
    child = os.fork()
    if not child:
        ours.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        _exit_with(inside, theirs.detach())
    theirs.close()
    _ready_or_end(ours, on_ready)
    deadline = math.inf
    while True:
        with suppress(ChildProcessError):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        wait = min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        came = signal.sigtimedwait({*ending, signal.SIGCHLD}, wait)
        if came is None:
            # Not waited for: to close a file on a dead file system cannot be interrupted.
            log.error("killed the server: it hung in a system call", seconds=_END)
            os.kill(child, signal.SIGKILL)
            return 1
        if came.si_signo in ending:
            ours.close()
            deadline = min(deadline, time.monotonic() + _END)


def _ready_or_end(ours: socket.socket, on_ready: Callable[[], object]) -> None:
    """Wait for the child's byte; a signal to stop ends the wait through sigwait afterwards."""
    pending = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    while not select.select([ours], [], [], 0.05)[0]:
        if signal.sigpending() & pending:
            return
    with suppress(OSError):
        if ours.recv(1):
            on_ready()


def _exit_with(inside: Callable[[int], int], lifeline: int) -> None:
    status = 1
    try:
        status = inside(lifeline)
    except BaseException:  # noqa: BLE001 - the child ends here
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def own_processes() -> None:
    """The next child is the first process of a pid namespace; for an ordinary user, also of a user
    namespace with this user only. Raises OSError.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        check(libc.unshare(_CLONE_NEWPID))
        return
    check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


# The process inside


def isolate(directory: str, *, read_only: bool) -> None:
    """Enter mount and network namespaces with ``directory`` as the root. Raises OSError.

    The working directory becomes this process's directory in a /proc of its pid namespace, as a
    mount of its own: no ".." leads out of it.
    """
    _last_of_the_old_root()
    check(libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET))
    check(libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None))
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    check(libc.mount(b"proc", b"/proc", b"proc", flags, None))
    process = _clone("/proc/self")
    root = _clone(directory, _AT_RECURSIVE)
    # Guests' kernels open the device nodes in it and run the programs, as their own; this one never
    wanted = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
    attributes = struct.pack("=4Q", wanted | _MOUNT_ATTR_RDONLY * read_only, 0, 0, 0)
    check(
        libc.syscall(
            _MOUNT_SETATTR, root, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes,
            ctypes.c_size_t(len(attributes)),
        )
    )  # fmt: skip
    where = os.fsencode(directory)
    check(libc.syscall(_MOVE_MOUNT, root, b"", _AT_FDCWD, where, _MOVE_MOUNT_F_EMPTY_PATH))
    os.fchdir(root)
    check(libc.syscall(_PIVOT_ROOT, b".", b"."))
    check(libc.umount2(b".", _MNT_DETACH))  # the old root, which is mounted over the new one
    os.close(root)
    os.fchdir(process)  # it stays open: the mount ends with it
    syscalls.use_working_directory_as_process()


def confine(directory: str) -> None:
    """Make ``directory`` the root: chroot(2). Raises OSError. The working directory is outside."""
    _last_of_the_old_root()
    os.chdir("/proc/self")
    os.chroot(directory)
    syscalls.use_working_directory_as_process()


def _clone(path: str, flags: int = 0) -> int:
    flags |= _OPEN_TREE_CLONE | os.O_CLOEXEC
    return check(libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags))


def _last_of_the_old_root() -> None:
    """Load no more code by path: the files there belong to guests."""
    import encodings.idna
    import encodings.utf_8

    del encodings
    with suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")  # which glibc loads when a thread ends
    time.localtime()  # which reads /etc/localtime
    libc.mallopt(_M_ARENA_MAX, 1)  # else glibc reads /proc/sys/vm/overcommit_memory, in threads
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, "path_hooks")]
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "PathFinder"]
    sys.path_hooks.clear()
    linecache.updatecache = _no_source
    ctypes.util.find_library = _no_library  # pyinotify's: it runs programs to find libc


def _no_library(name: str) -> str | None:
    return None


def _no_source(filename: str, module_globals: dict[str, Any] | None = None) -> list[str]:
    return []


def drop_capabilities(keep: Iterable[str]) -> None:
    """Keep at most these capabilities, and never get another. MKNOD is effective only in
    ``making_nodes``. Raises OSError.
    """
    wanted = sum(1 << CAPABILITIES.index(name) for name in keep)
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    data = ctypes.create_string_buffer(24)
    check(libc.capget(header, data))
    words = struct.unpack("=6I", data.raw)
    kept = (words[1] | words[4] << 32) & wanted
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(64):
        if not kept >> number & 1:  # refused if it may not be dropped, or does not exist
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    low, high = kept & 0xFFFF_FFFF, kept >> 32
    at_rest = low & ~(1 << CAPABILITIES.index("MKNOD"))
    check(libc.capset(header, struct.pack("=6I", at_rest, low, 0, high, high, 0)))
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
