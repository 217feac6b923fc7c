"""/proc/self/mountinfo: the table of proc_pid_mountinfo(5), and this machine's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocol.mountinfo import MountLine, parse_mountinfo

TABLE = [
    (
        b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
        MountLine(
            36, 35, 98, 0, b"/mnt1", b"/mnt2", b"rw,noatime", b"ext3", b"/dev/root",
            b"rw,errors=continue",
        ),
    ),
    (
        b"5 1 0:9 / /a\\040b\\134c\\011d\\012e rw shared:1 master:2 - fuse.x my\\040fs ro",
        MountLine(5, 1, 0, 9, b"/", b"/a b\\c\td\ne", b"rw", b"fuse.x", b"my fs", b"ro"),
    ),
    (
        b"7 1 0:4 / /- rw - proc - rw",
        MountLine(7, 1, 0, 4, b"/", b"/-", b"rw", b"proc", b"-", b"rw"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "mount"), TABLE, ids=[str(mount.mnt_id) for _, mount in TABLE])
def test_lines(line: bytes, mount: MountLine) -> None:
    assert list(parse_mountinfo(line + b"\n")) == [mount]


def test_all_lines_in_order() -> None:
    text = b"".join(line + b"\n" for line, _ in TABLE)
    assert list(parse_mountinfo(text)) == [mount for _, mount in TABLE]


def test_this_machine() -> None:
    found = list(parse_mountinfo(Path("/proc/self/mountinfo").read_bytes()))
    proc = [mount for mount in found if mount.point == b"/proc"][-1]
    assert os.makedev(proc.major, proc.minor) == os.stat("/proc").st_dev
    assert proc.fstype == b"proc"


def test_another_file() -> None:
    with pytest.raises(ValueError, match="unpack"):
        list(parse_mountinfo(b"something else\n"))
