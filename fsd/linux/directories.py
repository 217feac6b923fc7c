"""Reads an open directory from a position on. Between two requests of a guest only the kernel's own
file position is kept.

Positions are the kernel's (d_off of getdents64(2)), as telldir(3) returns them natively: they
outlive this process, and a directory may change between two requests as for any reader.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from . import syscalls

_HEAD = struct.Struct("=QqHB")  # struct linux_dirent64: d_ino, d_off, d_reclen, d_type; the name
LONGEST = 280
"""Bytes of the longest struct linux_dirent64: a name of 255 bytes."""


class DirEntry(NamedTuple):
    """A name in a directory, with its type and number from the listing."""

    name: bytes
    ino: int
    type: int  # DT_* of readdir(3), 0 = unknown
    next: int  # position after it


def read(fd: int, size: int) -> list[DirEntry]:
    """Entries from the file position of ``fd`` on, in as many bytes of struct linux_dirent64; [] at
    the end. "." and ".." are included. Raises OSError.
    """
    data = syscalls.getdents(fd, max(size, LONGEST))
    entries = []
    offset, unpack, start = 0, _HEAD.unpack_from, _HEAD.size
    while offset < len(data):
        ino, behind, length, kind = unpack(data, offset)
        end = data.index(0, offset + start)
        entries.append(DirEntry(data[offset + start : end], ino, kind, behind))
        offset += length
    return entries


def seek(fd: int, position: int) -> None:
    """Go to a position; 0 starts again. Raises OSError EINVAL, OverflowError for an invalid one."""
    os.lseek(fd, position, os.SEEK_SET)
