"""Parser for what read(2) on an inotify descriptor returns. A pure function, apart from the fd.

inotify(7): struct inotify_event { int wd; uint32_t mask, cookie, len; char name[]; }
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

HEADER = struct.Struct("=iIII")
_GENERIC = {27: 1, 263: 4}
MARKING = {"x86_64": {254: 1, 301: 4}, "aarch64": _GENERIC, "riscv64": _GENERIC}
"""By machine, the numbers of inotify_add_watch(2) and fanotify_mark(2) (asm/unistd.h): which
argument is the path."""


class RawEvent(NamedTuple):
    """One event as the kernel wrote it; ``name`` is bytes, b"" for the watched object itself."""

    wd: int
    mask: int
    cookie: int
    name: bytes


def parse_events(buffer: bytes) -> Iterator[RawEvent]:
    """Events of one read. Raises ValueError on a buffer that the kernel cannot have written."""
    offset, end = 0, len(buffer)
    unpack, size = HEADER.unpack_from, HEADER.size
    while offset < end:
        if end - offset < size:
            raise ValueError(f"inotify: {end - offset} bytes left, a header needs {size}")
        wd, mask, cookie, length = unpack(buffer, offset)
        offset += size
        if length > end - offset:
            raise ValueError(f"inotify: name of {length} bytes, {end - offset} left")
        name = buffer[offset : offset + length].rstrip(b"\0") if length else b""
        offset += length
        yield RawEvent(wd, mask, cookie, name)
