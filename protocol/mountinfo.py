"""Parser for /proc/PID/mountinfo: proc_pid_mountinfo(5).

Grammar, a line a mount, lower ones before those on top; OPTIONAL are any number of fields:
    ID PARENT MAJOR:MINOR ROOT POINT FLAGS [OPTIONAL…] - TYPE SOURCE OPTIONS
Blanks, tabs, newlines, backslashes and (in OPTIONS) more are written as \\ooo, in octal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class MountLine(NamedTuple):
    """One mount, as seen by a process."""

    mnt_id: int
    parent: int
    major: int
    minor: int
    root: bytes
    """The directory of the file system that is mounted there."""
    point: bytes
    flags: bytes
    """Flags of the mount, such as nosuid."""
    fstype: bytes
    source: bytes
    options: bytes
    """Of the file system."""


def parse_mountinfo(text: bytes) -> Iterator[MountLine]:
    """The mounts in the file's text. Raises ValueError if it is not mountinfo."""
    for line in text.split(b"\n"):
        if not line:
            continue
        mount, _, filesystem = line.partition(b" - ")
        mnt_id, parent, device, root, point, flags = mount.split(b" ")[:6]
        fstype, source, options = filesystem.split(b" ", 2)
        major, _, minor = device.partition(b":")
        yield MountLine(
            int(mnt_id), int(parent), int(major), int(minor), _plain(root), _plain(point), flags,
            _plain(fstype), _plain(source), _plain(options),
        )  # fmt: skip


def _plain(field: bytes) -> bytes:
    if b"\\" not in field:
        return field
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
