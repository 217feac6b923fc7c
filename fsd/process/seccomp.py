"""The allow list of system calls for a server of virtual machines: libseccomp(3).

Calls a few functions through ctypes, because PyPI has no maintained binding
(docs/decisions/sandbox.md).
"""

from __future__ import annotations

import ctypes
import errno

from ..linux import ioctls

ALLOWED = """
accept4 brk capget capset clock_getres clock_gettime clock_nanosleep close close_range
copy_file_range dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd2
exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown
fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync
ftruncate futex futex_wait futex_wake getcwd getdents64 getegid geteuid getgid getgroups getpid
getppid getrandom getrlimit getrusage getsockname getsockopt gettid gettimeofday getuid getxattr
inotify_add_watch inotify_init1 inotify_rm_watch lgetxattr linkat listen listxattr llistxattr
lremovexattr lseek lsetxattr madvise membarrier memfd_create mkdirat mknodat mmap mprotect mremap
munmap name_to_handle_at nanosleep newfstatat open_by_handle_at openat openat2 pipe2 ppoll pread64
preadv preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read readlinkat readv recvfrom recvmsg
removexattr renameat renameat2 restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigreturn rt_sigtimedwait sched_getaffinity sched_yield sendmsg sendto set_robust_list setfsgid
setfsuid setgroups setsockopt setxattr shutdown sigaltstack socketpair statfs statx symlinkat syncfs
sysinfo tgkill truncate umask uname unlinkat utimensat write writev
"""
"""By name; older forms on some architectures are below."""
OLDER = """
access chmod chown epoll_create getdents inotify_init lchown link lstat mkdir mknod open pipe poll
readlink rename rmdir select stat symlink time unlink utime utimes
"""
"""Older forms of the same calls, which some architectures have."""
IOCTLS = (*ioctls.FILES, *ioctls.INOTIFY, 0x5401, 0x5421, 0x5450, 0x5451)
"""Requests of ioctl(2): those that guests may make, the watcher's; and TCGETS, FIONBIO, FIONCLEX,
FIOCLEX, which Python uses for open, setblocking and set_inheritable."""
_CLONE_THREAD = 0x10000
_PR_SET_NAME = 15  # by trio's threads, of their own name
_ALLOW, _KILL, _TRAP, _LOG, _ERRNO = (
    0x7FFF_0000, 0x8000_0000, 0x0003_0000, 0x7FFC_0000, 0x0005_0000,
)  # fmt: skip
ACTIONS = {"refuse": _ERRNO | errno.ENOSYS, "kill": _KILL, "trap": _TRAP, "log": _LOG}
"""What happens upon any other call: it fails with ENOSYS, it ends the process, …"""
_TSYNC = 4  # SCMP_FLTATR_CTL_TSYNC
_MASKED_EQ = 7  # SCMP_CMP_MASKED_EQ


class _Comparison(ctypes.Structure):  # struct scmp_arg_cmp
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class Filter:
    """A filter to install later. Raises OSError if there is no libseccomp.

    Made before entering the sandbox, where there are no libraries.
    """

    def __init__(self, action: str) -> None:
        self._library = library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        library.seccomp_init.restype = ctypes.c_void_p
        library.seccomp_init.argtypes = [ctypes.c_uint32]
        library.seccomp_load.argtypes = library.seccomp_release.argtypes = [ctypes.c_void_p]
        library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
        library.seccomp_rule_add_array.argtypes = [
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
        ]  # fmt: skip
        self._context = library.seccomp_init(ACTIONS[action])
        if not self._context:
            raise OSError(errno.EINVAL, "seccomp_init failed")
        self._check(library.seccomp_attr_set(self._context, _TSYNC, 1))
        for name in (ALLOWED + OLDER).split():
            self._rule(_ALLOW, name)
        for request in IOCTLS:  # of which the kernel sees 32 bits
            self._rule(_ALLOW, "ioctl", _Comparison(1, _MASKED_EQ, 0xFFFF_FFFF, request))
        self._rule(_ALLOW, "prctl", _Comparison(0, _MASKED_EQ, 0xFFFF_FFFF, _PR_SET_NAME))
        # Threads, but no processes. The arguments of clone3 are not visible: glibc then uses clone.
        self._rule(_ALLOW, "clone", _Comparison(0, _MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
        if action != "refuse":
            self._rule(_ERRNO | errno.ENOSYS, "clone3")

    def _rule(self, action: int, name: str, *comparisons: _Comparison) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # not on this machine, or newer than the library
            return
        array = (_Comparison * len(comparisons))(*comparisons)
        self._check(
            self._library.seccomp_rule_add_array(
                self._context, action, number, len(comparisons), array
            )
        )

    @staticmethod
    def _check(result: int) -> None:
        if result < 0:
            raise OSError(-result, "libseccomp failed")

    def install(self) -> None:
        """Install it for every thread of this process, permanently. Raises OSError."""
        self._check(self._library.seccomp_load(self._context))
        self._library.seccomp_release(self._context)
