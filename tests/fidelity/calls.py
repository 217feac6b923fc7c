"""System calls as values, and what does them on a real tree.

A path is bytes relative to the root; `@/x` is x in the directory outside the share, on the same
file system. Apart from operations.py, which plans and never does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Argument = bytes | int | None

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UTIME_OMIT = (1 << 30) - 2


class Call(NamedTuple):
    """One system call (a transient descriptor is kept in a numbered slot)."""

    kind: str
    args: tuple[Argument, ...]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(_short, self.args))})"


class Step(NamedTuple):
    """What somebody does in one go; a paced run waits between steps, not inside."""

    kind: str
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(map(str, self.calls))}"


def _short(argument: Argument) -> str:
    if not isinstance(argument, bytes) or len(argument) < 60:
        return repr(argument)
    return f"{argument[:24]!r}..{argument[-24:]!r}[{len(argument)}]"


_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]


def _checked(result: int, path: bytes) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


class Failure(NamedTuple):
    call: Call
    error: OSError


class Executor:
    """Does the calls on a real tree; a call that fails is recorded and changes nothing."""

    def __init__(self, root: Path, outside: Path) -> None:
        self._root = os.fsencode(root)
        self._outside = os.fsencode(outside)
        self._slots: dict[int, int] = {}
        self._calls: dict[str, Callable[..., object]] = {
            name.removeprefix("_do_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("_do_")
        }
        self.failures: list[Failure] = []

    def run(self, calls: Sequence[Call]) -> None:
        for call in calls:
            try:
                self._calls[call.kind](*call.args)
            except OSError as error:
                self.failures.append(Failure(call, error))

    def close(self) -> None:
        while self._slots:
            os.close(self._slots.popitem()[1])

    def unexpected(self) -> list[str]:
        """What failed though the model says that it cannot."""
        return [
            f"{call}: {error}"
            for call, error in self.failures
            if not (call.kind == "rename_noreplace" and error.errno == errno.EEXIST)
        ]

    def _at(self, path: bytes) -> bytes:
        if path.startswith(b"@/"):
            return self._outside + path[1:]
        return self._root + b"/" + path

    def _fd(self, slot: int) -> int:
        try:
            return self._slots[slot]
        except KeyError:
            raise OSError(errno.EBADF, f"slot {slot} is not open") from None

    def _do_open(self, slot: int, path: bytes, flags: int) -> None:
        # A part of a plan may find a FIFO where the plan had a file: it must not block.
        self._slots[slot] = os.open(self._at(path), flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)

    def _do_write(self, slot: int, size: int) -> None:
        os.write(self._fd(slot), b"x" * size)

    def _do_read(self, slot: int, size: int) -> None:
        os.read(self._fd(slot), size)

    def _do_fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def _do_ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)

    def _do_fallocate(self, slot: int, size: int) -> None:
        os.posix_fallocate(self._fd(slot), 0, size)

    def _do_copy(self, source: int, target: int, size: int) -> None:
        os.copy_file_range(self._fd(source), self._fd(target), size)

    def _do_close(self, slot: int) -> None:
        fd = self._fd(slot)
        del self._slots[slot]
        os.close(fd)

    def _do_truncate(self, path: bytes, size: int) -> None:
        os.truncate(self._at(path), size)

    def _do_chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def _do_chown(self, path: bytes, uid: int) -> None:
        if os.geteuid():  # an ordinary user may only "give" a file to itself, which is an event too
            uid = os.geteuid()
        os.chown(self._at(path), uid, -1, follow_symlinks=False)

    def _do_utime(self, path: bytes, atime: int | None, mtime: int | None) -> None:
        times = (_Timespec * 2)(
            *(_Timespec(0, UTIME_OMIT) if t is None else _Timespec(t, 0) for t in (atime, mtime))
        )
        at_fdcwd, nofollow = -100, 0x100
        _checked(_libc.utimensat(at_fdcwd, self._at(path), times, nofollow), path)

    def _do_setxattr(self, path: bytes, value: bytes) -> None:
        os.setxattr(self._at(path), b"user.fidelity", value)

    def _do_unlink(self, path: bytes) -> None:
        os.unlink(self._at(path))

    def _do_rmdir(self, path: bytes) -> None:
        os.rmdir(self._at(path))

    def _do_mkdir(self, path: bytes) -> None:
        os.mkdir(self._at(path))

    def _do_rename(self, old: bytes, new: bytes) -> None:
        os.rename(self._at(old), self._at(new))

    def _renameat2(self, old: bytes, new: bytes, flags: int) -> None:
        at_fdcwd = -100
        _checked(_libc.renameat2(at_fdcwd, self._at(old), at_fdcwd, self._at(new), flags), old)

    def _do_rename_noreplace(self, old: bytes, new: bytes) -> None:
        self._renameat2(old, new, RENAME_NOREPLACE)

    def _do_rename_exchange(self, old: bytes, new: bytes) -> None:
        self._renameat2(old, new, RENAME_EXCHANGE)

    def _do_link(self, old: bytes, new: bytes) -> None:
        os.link(self._at(old), self._at(new), follow_symlinks=False)

    def _do_symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self._at(path))

    def _do_mkfifo(self, path: bytes) -> None:
        os.mkfifo(self._at(path))

    def _do_bind(self, path: bytes) -> None:
        # Through an O_PATH directory, which is no event: the whole path may not fit sun_path.
        directory, name = os.path.split(self._at(path))
        dir_fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(f"/proc/self/fd/{dir_fd}/".encode() + name)
        finally:
            os.close(dir_fd)

    def _do_listdir(self, path: bytes) -> None:
        os.listdir(self._at(path))
