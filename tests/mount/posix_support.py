"""What the POSIX cases share: the map they enter, errno checks, other users, and libc calls that
Python lacks. Standard library only, so that the cases can run inside a guest too.
"""

import ctypes
import errno
import json
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CLOCK_REALTIME_COARSE = 5  # what the kernel stamps files with; Python's time lacks its name
CHILD_SECONDS = 60.0  # a child that takes longer hangs in the file system under test


@dataclass(frozen=True)
class Case:
    """One case: `run(d, host)` raises AssertionError; both name one empty directory, as the mount
    and as the host show it (natively they are the same path)."""

    run: Callable[[Path, Path], None]
    needs_root: bool
    is_two_sided: bool = False


CASES: dict[str, Case] = {}


def case(*, root: bool = False) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Enter a function of one directory into the map; `root`: it only makes sense as root."""

    def enter(function: Callable[[Path], None]) -> Callable[[Path], None]:
        _enter(function.__name__, Case(lambda d, _host: function(d), root))
        return function

    return enter


def two_sided(
    *, root: bool = False
) -> Callable[[Callable[[Path, Path], None]], Callable[[Path, Path], None]]:
    """Enter a function that also works on the host's side of its directory."""

    def enter(function: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        _enter(function.__name__, Case(function, root, is_two_sided=True))
        return function

    return enter


def settle(d: Path) -> None:
    """Before a descriptor below `d` is used: its kernel keeps nothing that the host has changed."""
    os.fspath(d)


@contextmanager
def settling(d: Path) -> Iterator[Path]:
    """The same path, which does so by itself whenever it is used, by any user. An `fsd mount` may
    let its kernel keep what the host has not changed, and takes it back within some milliseconds.
    """
    top = d.resolve()
    while not top.is_mount():
        top = top.parent
    status = f"{top}/.fsd/status"
    if not os.path.exists(status) or _is_settled(status) is None:
        yield d
        return
    ask, answer = socket.socketpair()

    def serve() -> None:
        while answer.recv(1):
            end = time.monotonic() + CHILD_SECONDS
            while not _is_settled(status) and time.monotonic() < end:
                pass
            answer.send(b"!")

    class Settling(type(d)):  # type: ignore[misc]  # the class of paths of this system
        __slots__ = ()

        def __fspath__(self) -> str:
            ask.send(b"?")
            ask.recv(1)
            return str(self)

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield Settling(d)
    finally:
        ask.shutdown(socket.SHUT_RDWR)
        server.join()
        ask.close()
        answer.close()


def _is_settled(status: str) -> bool | None:
    """None: the kernel keeps nothing."""
    with open(status) as file:
        (cache,) = (g["cache"] for g in json.load(file)["guests"] if g["kind"] == "mount")
    return None if cache is None else bool(cache["settled"])


def _enter(name: str, entry: Case) -> None:
    assert name not in CASES, f"two cases are called {name}"
    CASES[name] = entry


# -- errno -----------------------------------------------------------------------------------------


@contextmanager
def fails(*codes: int) -> Iterator[None]:
    """The block must fail with one of these errno values."""
    found = "success"
    try:
        yield
    except OSError as error:
        if error.errno in codes:
            return
        found = errno.errorcode.get(error.errno or 0, str(error))
    wanted = "/".join(errno.errorcode[code] for code in codes)
    raise AssertionError(f"{found} instead of {wanted}")


# -- other processes and other users ---------------------------------------------------------------


@dataclass(frozen=True)
class User:
    """An ordinary user, who needs no entry in /etc/passwd."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def become(self) -> None:
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)


ALICE = User(54321, 54321, (54330, 54331))
BOB = User(54322, 54322, (54331,))
PROJECT = 54330  # a group of Alice's, not of Bob's


def in_child(function: Callable[[], object], user: User | None = None) -> None:
    """Run a function in a forked child, as another user if wanted; its failure fails the caller."""
    child = Child(function, user)
    child.join()


class Child:
    """A forked child that runs one function."""

    def __init__(self, function: Callable[[], object], user: User | None = None) -> None:
        self._report, sink = os.pipe()
        with warnings.catch_warnings():
            # An idle worker thread of another test is no danger: the child takes no lock of its.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid:
            os.close(sink)
            return
        status = 1
        try:
            os.close(self._report)
            if user is not None:
                user.become()
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent raises it
            os.write(sink, traceback.format_exc()[-60_000:].encode(errors="replace"))
        finally:
            os._exit(status)

    def join(self) -> None:
        """Wait for the end, with a bound, and pass a failure on."""
        chunks = []
        with selectors.DefaultSelector() as selector, open(self._report, "rb", 0) as report:
            selector.register(report, selectors.EVENT_READ)
            while True:
                if not selector.select(CHILD_SECONDS):
                    os.kill(self.pid, signal.SIGKILL)
                    chunks.append(b"still running: killed")
                    break
                if not (chunk := report.read(65536)):
                    break
                chunks.append(chunk)
        _, status = os.waitpid(self.pid, 0)
        text = b"".join(chunks).decode(errors="replace")
        assert status == 0, f"in the child (status {status:#x}):\n{text}"


class Turns:
    """Two processes that take turns: each waits for the other's step, never for a time."""

    def __init__(self) -> None:
        self._pipes = {name: os.pipe() for name in ("parent", "child")}

    def done(self, who: str) -> None:
        os.write(self._pipes[who][1], b".")

    def wait(self, who: str) -> None:
        reader = self._pipes[who][0]
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            assert selector.select(CHILD_SECONDS), f"no step of the {who}"
        os.read(reader, 1)

    def close(self) -> None:
        for pair in self._pipes.values():
            for fd in pair:
                os.close(fd)


@contextmanager
def turns() -> Iterator[Turns]:
    both = Turns()
    try:
        yield both
    finally:
        both.close()


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def opened(
    path: Path | str | bytes, flags: int = os.O_RDONLY, mode: int = 0o644, at: int | None = None
) -> Iterator[int]:
    """An open file descriptor; `at`: the path is relative to this directory."""
    fd = os.open(path, flags, mode, dir_fd=at)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: Path, data: bytes = b"", mode: int | None = None) -> Path:
    """Make or overwrite a file; with a mode, whatever the umask."""
    path.write_bytes(data)
    if mode is not None:
        path.chmod(mode)
    return path


def mkdir(path: Path, mode: int | None = None) -> Path:
    path.mkdir()
    if mode is not None:
        path.chmod(mode)
    return path


def mode_of(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes in which no two aligned words are alike."""
    return b"".join(struct.pack("<Q", seed << 40 | i) for i in range((size + 7) // 8))[:size]


def page_aligned(size: int) -> mmap.mmap:
    """A buffer that O_DIRECT takes."""
    return mmap.mmap(-1, size)


def clock_passes(path: Path) -> None:
    """Return once a new ctime must differ from the one that this file has."""
    before, bound = path.lstat().st_ctime_ns, time.monotonic() + 5
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= before:
        assert time.monotonic() < bound, f"{path}: ctime lies in the future"


# -- libc ------------------------------------------------------------------------------------------

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def libc(name: str, *arguments: object) -> int:
    """Call a C function that returns -1 and errno on failure."""
    function = getattr(_libc, name)
    function.restype = ctypes.c_ssize_t if name in {"getxattr", "getdents64"} else ctypes.c_int
    result = int(function(*arguments))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def link_descriptor(fd: int, new: Path) -> None:
    """Give an open file another name (os.link does not follow links on Linux)."""
    path = b"/proc/self/fd/%d" % fd
    libc("linkat", AT_FDCWD, path, AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW)


class FileHandle(ctypes.Structure):
    """struct file_handle of <fcntl.h>."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * 128),
    )


def file_handle(path: Path) -> FileHandle:
    handle, mount_id = FileHandle(handle_bytes=128), ctypes.c_int()
    name = os.fsencode(path)
    libc("name_to_handle_at", AT_FDCWD, name, ctypes.byref(handle), ctypes.byref(mount_id), 0)
    return handle


def open_by_handle(mount_fd: int, handle: FileHandle) -> int:
    return libc("open_by_handle_at", mount_fd, ctypes.byref(handle), os.O_RDONLY)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def utimensat(path: Path, atime_nsec: int, mtime_nsec: int) -> None:
    """Both seconds are 7, for what UTIME_NOW and UTIME_OMIT do not replace."""
    times = (_Timespec * 2)(_Timespec(7, atime_nsec), _Timespec(7, mtime_nsec))
    libc("utimensat", AT_FDCWD, os.fsencode(path), times, 0)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc("fallocate64", fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


class Dirent(NamedTuple):
    ino: int
    off: int  # what lseek takes to continue after this entry
    type: int
    name: bytes


def getdents(fd: int, size: int = 32768) -> list[Dirent]:
    """One getdents64 call; an empty list at the end of the directory."""
    buffer = ctypes.create_string_buffer(size)
    end = libc("getdents64", fd, buffer, ctypes.c_size_t(size))
    data, position, entries = buffer.raw[:end], 0, []
    while position < end:
        ino, off, length, kind = struct.unpack_from("<QqHB" if _LITTLE else ">QqHB", data, position)
        name = data[position + 19 : position + length].split(b"\0", 1)[0]
        entries.append(Dirent(ino, off, kind, name))
        position += length
    return entries


_LITTLE = sys.byteorder == "little"


def list_all(fd: int, size: int = 32768) -> list[Dirent]:
    """The rest of a directory, without `.` and `..`."""
    entries: list[Dirent] = []
    while part := getdents(fd, size):
        entries += part
    return [entry for entry in entries if entry.name not in (b".", b"..")]
