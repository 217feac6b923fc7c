"""Parser for /proc/PID/fdinfo/FD of inotify and fanotify descriptors (fs/notify/fdinfo.c).

Grammar, a line each (numbers hexadecimal):
    inotify wd:1 ino:2f sdev:27 mask:fff ignored_mask:0 HANDLE
    fanotify flags:… event-flags:…
    fanotify mnt_id:1c mflags:0 mask:3b ignored_mask:0
    fanotify sdev:27 mflags:0 mask:3b ignored_mask:0
    fanotify ino:2f sdev:27 mflags:0 mask:3b ignored_mask:0 HANDLE
HANDLE = fhandle-bytes:c fhandle-type:81 f_handle:000000000100000000000000
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class MarkInfo(NamedTuple):
    """One mark as fdinfo shows it. ``sdev`` is the kernel's s_dev (major << 20 | minor)."""

    family: str  # "inotify" or "fanotify"
    wd: int  # -1 for fanotify
    ino: int  # 0 for mount and superblock marks
    sdev: int  # 0 for mount marks
    mnt_id: int  # 0 but for mount marks
    mask: int
    ignored_mask: int
    handle_type: int
    handle: bytes


def parse_fdinfo(text: str) -> Iterator[MarkInfo]:
    """Marks in the text of one fdinfo file; a line that is not a mark is passed over."""
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
            )
        except ValueError:  # a format of a future kernel: better no mark than a wrong one
            continue
