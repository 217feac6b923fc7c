"""A real watcher: a process that makes system calls as its tests ask, a line of JSON each way.

A program of its own, with the standard library alone; the tests talk to it through ``remote``.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import struct
import sys
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [
    ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p,
]  # fmt: skip


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def at(fd: int, number: int) -> int:
    """The same file, at this number."""
    if fd != number:
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    return number


def inotify(number: int, flags: int = os.O_NONBLOCK) -> int:
    return at(_check(_libc.inotify_init1(flags)), number)


def watch(fd: int, path: str, mask: int, wd: int = 0) -> int:
    if wd:
        fcntl.ioctl(fd, 0x40044900, wd)  # INOTIFY_IOC_SETNEXTWD
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)))


def remove(fd: int, wd: int) -> int:
    return _check(_libc.inotify_rm_watch(fd, wd))


def events(fd: int, timeout: float = 10) -> list[tuple[int, int, int, str]]:
    """What is queued, waiting for the first."""
    if not select.select([fd], [], [], timeout)[0]:
        return []
    data, found = os.read(fd, 1 << 20), []
    while data:
        wd, mask, cookie, size = struct.unpack_from("=iIII", data)
        found.append((wd, mask, cookie, os.fsdecode(data[16 : 16 + size].rstrip(b"\0"))))
        data = data[16 + size :]
    return found


def queued(fd: int) -> int:
    answer = fcntl.ioctl(fd, 0x541B, bytes(4))  # FIONREAD
    return int(struct.unpack("=i", answer)[0])


def fanotify(number: int, flags: int, event_flags: int = os.O_RDONLY) -> int:
    return at(_check(_libc.fanotify_init(flags, event_flags)), number)


def mark(fd: int, flags: int, mask: int, path: str) -> int:
    return _check(_libc.fanotify_mark(fd, 1 | flags, mask, -100, os.fsencode(path)))


def epoll(number: int) -> int:
    return at(_check(_libc.epoll_create1(0)), number)


def add(set_: int, fd: int, event_bits: int, data: int) -> int:
    packed = "=IQ" if os.uname().machine == "x86_64" else "@IQ"
    return _check(_libc.epoll_ctl(set_, 1, fd, struct.pack(packed, event_bits, data)))


def ready(set_: int, timeout: float = 10) -> list[tuple[int, int]]:
    """(events, data) of what an epoll set reports."""
    size = 12 if os.uname().machine == "x86_64" else 16
    packed = "=IQ" if size == 12 else "@IQ"
    buffer = ctypes.create_string_buffer(64 * size)
    count = _check(_libc.epoll_wait(set_, buffer, 64, int(timeout * 1000)))
    return [struct.unpack_from(packed, buffer, i * size) for i in range(count)]


def fdinfo(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        return info.read()


def descriptors() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # that of the listing itself
            continue
        found.append(int(name))
    return sorted(found)


def record(setup: list[str], log: str) -> None:
    """Evaluate expressions, then write all events of descriptor 3 to a file: a process without
    pipes, which CRIU can save.
    """
    names: dict[str, Any] = dict(globals())
    for expression in setup:
        eval(expression, names)
    while True:
        with open(log, "a") as lines:
            print(json.dumps(events(3, 0.05)), file=lines)


def main() -> None:
    """Answer until the other end is gone. Low descriptors are left to the tests."""
    if len(sys.argv) > 1:
        record(json.loads(sys.argv[1]), sys.argv[2])
    names: dict[str, Any] = dict(globals())
    questions = os.fdopen(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 300))
    answers = os.fdopen(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 300), "w")
    print("true", file=answers, flush=True)
    for line in questions:
        try:
            answer = [eval(json.loads(line), names), None]
        except Exception as error:  # noqa: BLE001 - the other process raises it
            answer = [None, repr(error)]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
