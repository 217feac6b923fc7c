"""A stand-alone inotify program like many: it blocks in read(2) and notes when it wakes up.

Usage: reader.py MASK [-r] DIRECTORY (-r: the directories in it, too). Prints READY when it watches,
and ends on an event of the name ~end; then prints a JSON list of [CLOCK_MONOTONIC in ns, mask,
name]. Standard library only: it knows nothing of fsd. It parses the events at the end, so that
reading stays cheap.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import time

HEADER = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, len
END = b"~end\0"
IN_CREATE, IN_ISDIR = 0x100, 0x4000_0000


def watch(fd: int, mask: int, directory: str) -> None:
    """Watch a directory; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.inotify_add_watch(fd, os.fsencode(directory), ctypes.c_uint32(mask)) < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch", directory)


def parse(when: int, data: bytes) -> list[tuple[int, int, str]]:
    """The events of one read."""
    events = []
    offset = 0
    while offset < len(data):
        _wd, mask, _cookie, length = HEADER.unpack_from(data, offset)
        offset += HEADER.size
        events.append((when, mask, data[offset : offset + length].rstrip(b"\0").decode()))
        offset += length
    return events


def main() -> None:
    mask, *recursive, directory = sys.argv[1:]
    fd: int = ctypes.CDLL(None).inotify_init1(os.O_CLOEXEC)
    watch(fd, int(mask), directory)
    if recursive:
        os.chdir(directory)  # names without a path: each of its steps would be a request or two
        for entry in os.scandir():
            if entry.is_dir(follow_symlinks=False):
                watch(fd, int(mask), entry.name)
    print("READY", flush=True)
    reads: list[tuple[int, bytes]] = []
    while not reads or END not in reads[-1][1]:
        data = os.read(fd, 1 << 20)
        reads.append((time.monotonic_ns(), data))
    json.dump([event for when, data in reads for event in parse(when, data)], sys.stdout)


if __name__ == "__main__":
    main()
