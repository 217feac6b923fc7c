"""Traces the system calls by which programs set and remove marks.

Where the kernel caches names, a program can set a mark without any request, so the server cannot
send a hint. The agent then learns of it here: Documentation/trace/ftrace.rst, events.rst.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from .. import kernel

CALLS = ("inotify_add_watch", "inotify_rm_watch", "fanotify_mark")
_TRACEFS = "/sys/kernel/tracing"
_PREFIX = "fsd-agent-"
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PID_NS_INIT_INO in linux/nsfs.h
_SETTINGS = (
    ("options/raw", b"1"),  # "TID CPU TIME type: N": without command names, which may be anything
    ("trace_clock", b"mono"),  # TIME is nanoseconds of time.monotonic()
    ("buffer_size_kb", b"64"),  # per processor; what does not fit is reported as lost
)
_READ = 1 << 16
_READS = 16


class MarkCalls:
    """Successful calls, from an instance of tracefs that ``close`` removes. Not those of the thread
    ``server``, which marks the host's directories.

    While it exists, each system call of the machine takes about 50 ns more: the kernel has one
    switch for all of them. Calls of 32-bit programs on a 64-bit kernel are not traced. Raises
    OSError if the kernel has no such trace or the process may not use it.
    """

    def __init__(self, server: int = 0) -> None:
        self._filter = b"ret >= 0" + (b" && common_pid != %d" % server if server else b"")
        if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:
            raise OSError(errno.ENOTSUP, "thread ids are those of another pid namespace")
        self._pipe_fd = -1
        self._name = f"{_PREFIX}{os.getpid()}"
        self._instances_fd = _open_instances()
        try:
            self._remove_old()
            os.mkdir(self._name, 0o700, dir_fd=self._instances_fd)
            self._start()
        except OSError:
            self.close()
            raise

    def _remove_old(self) -> None:
        """Remove instances left by killed agents; those in use are busy."""
        for name in os.listdir(self._instances_fd):
            if name.startswith(_PREFIX):
                with suppress(OSError):
                    os.rmdir(name, dir_fd=self._instances_fd)

    def _start(self) -> None:
        # First, because it makes the instance busy.
        self._pipe_fd = self._open("trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        for path, value in _SETTINGS:
            self._write(path, value)
        with suppress(FileNotFoundError):  # before Linux 5.0: as if it were 0
            self._write("buffer_percent", b"0")  # poll(2) returns for a single event
        for call in CALLS:
            with suppress(FileNotFoundError):  # a kernel without fanotify
                self._write(f"events/syscalls/sys_exit_{call}/filter", self._filter)
                self._write(f"events/syscalls/sys_exit_{call}/enable", b"1")

    def _open(self, path: str, flags: int) -> int:
        return os.open(f"{self._name}/{path}", flags | os.O_CLOEXEC, dir_fd=self._instances_fd)

    def _write(self, path: str, value: bytes) -> None:
        fd = self._open(path, os.O_WRONLY)
        try:
            os.write(fd, value)
        finally:
            os.close(fd)

    def fileno(self) -> int:
        """For poll(2): readable when there are calls."""
        return self._pipe_fd

    def read(self) -> tuple[dict[int, float], bool]:
        """The threads that made such calls since the last read, with time.monotonic() of the first
        call, and whether some were lost. Reads for some ms at most, because a thread may make calls
        without end.
        """
        threads: dict[int, float] = {}
        lost = False
        for _ in range(_READS):
            try:
                data = os.read(self._pipe_fd, _READ)
            except BlockingIOError:
                break
            for line in data.split(b"\n"):
                fields = line.split(maxsplit=3)
                if len(fields) > 2 and fields[0].isdigit() and fields[2].isdigit():
                    threads.setdefault(int(fields[0]), int(fields[2]) / 1e9)
                elif line:  # "CPU:0 [LOST 12 EVENTS]"
                    lost = True
            if not data:
                break
        return threads, lost

    def close(self) -> None:
        """Stop tracing. No thread may be waiting for ``fileno``, or the instance stays."""
        pipe_fd, self._pipe_fd = self._pipe_fd, -1
        if pipe_fd >= 0:
            os.close(pipe_fd)
        instances_fd, self._instances_fd = self._instances_fd, -1
        if instances_fd >= 0:
            with suppress(OSError):
                os.rmdir(self._name, dir_fd=instances_fd)
            os.close(instances_fd)


def _open_instances() -> int:
    """The directory of instances; in a private mount of tracefs if it is not mounted."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(f"{_TRACEFS}/instances", flags)
    except FileNotFoundError:
        mount_fd = kernel.mount_privately("tracefs")
        try:
            return os.open("instances", flags, dir_fd=mount_fd)
        finally:
            os.close(mount_fd)
