"""Parsers for /proc/PID/fdinfo/FD of inotify, fanotify and epoll descriptors (fs/notify/fdinfo.c,
fs/eventpoll.c).

Grammar, a line each (numbers hexadecimal, but for FLAGS, octal, and tfd and pos, decimal):
    flags: FLAGS
    inotify wd:1 ino:2f sdev:27 mask:fff ignored_mask:0 HANDLE
    fanotify flags:… event-flags:…
    fanotify mnt_id:1c mflags:0 mask:3b ignored_mask:0
    fanotify sdev:27 mflags:0 mask:3b ignored_mask:0
    fanotify ino:2f sdev:27 mflags:0 mask:3b ignored_mask:0 HANDLE
    tfd: 5 events: 19 data: 5 pos:0 ino:61af sdev:7
HANDLE = fhandle-bytes:c fhandle-type:81 f_handle:000000000100000000000000
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class MarkInfo(NamedTuple):
    """One mark as fdinfo shows it. ``sdev`` is the kernel's s_dev (major << 20 | minor)."""

    family: str  # "inotify" or "fanotify"
    wd: int  # -1 for fanotify
    ino: int  # 0 for mount and superblock marks
    sdev: int  # 0 for mount marks
    mnt_id: int  # 0 except for mount marks
    mask: int
    ignored_mask: int
    handle_type: int
    handle: bytes
    mflags: int = 0  # fanotify's FAN_MARK_IGNORED_SURV_MODIFY and the like


def parse_fdinfo(text: str) -> Iterator[MarkInfo]:
    """Marks in the text of one fdinfo file; other lines are skipped."""
    for line in text.splitlines():
        family, _, rest = line.partition(" ")
        if family not in ("inotify", "fanotify") or " mask:" not in line:
            continue
        fields = dict(word.partition(":")[::2] for word in rest.split())
        try:
            yield MarkInfo(
                family=family,
                wd=int(fields.get("wd", "-1"), 16),
                ino=int(fields.get("ino", "0"), 16),
                sdev=int(fields.get("sdev", "0"), 16),
                mnt_id=int(fields.get("mnt_id", "0"), 16),
                mask=int(fields["mask"], 16),
                ignored_mask=int(fields.get("ignored_mask", "0"), 16),
                handle_type=int(fields.get("fhandle-type", "0"), 16),
                handle=bytes.fromhex(fields.get("f_handle", "")),
                mflags=int(fields.get("mflags", "0"), 16),
            )
        except ValueError:  # a format of a future kernel: better no mark than a wrong one
            continue


class TargetInfo(NamedTuple):
    """One entry of an epoll set. ``tfd`` is the number under which it was added."""

    tfd: int
    events: int
    data: int
    pos: int
    ino: int
    sdev: int


_TARGET = re.compile(
    r"tfd: *(\d+) events: *([0-9a-f]+) data: *([0-9a-f]+) +"
    r"pos:(-?\d+) ino:([0-9a-f]+) sdev:([0-9a-f]+) *"
)


def parse_targets(text: str) -> Iterator[TargetInfo]:
    """Entries in the text of an epoll descriptor's fdinfo (Linux 4.13 or later), in its order."""
    for line in text.splitlines():
        found = _TARGET.fullmatch(line)
        if found:
            tfd, events, data, pos, ino, sdev = found.groups()
            yield TargetInfo(
                int(tfd), int(events, 16), int(data, 16), int(pos), int(ino, 16), int(sdev, 16)
            )


def parse_flags(text: str) -> int:
    """The flags of open(2), O_CLOEXEC included, in any fdinfo. Raises ValueError."""
    found = re.search(r"^flags:\s*([0-7]+)$", text, re.MULTILINE)
    if not found:
        raise ValueError("no flags in fdinfo")
    return int(found[1], 8)


def parse_fanotify(text: str) -> tuple[int, int]:
    """The two arguments of fanotify_init(2) with which a group was made. Raises ValueError."""
    found = re.search(r"^fanotify flags:([0-9a-f]+) event-flags:([0-9a-f]+)$", text, re.MULTILINE)
    if not found:
        raise ValueError("no fanotify flags in fdinfo")
    return int(found[1], 16), int(found[2], 16)
