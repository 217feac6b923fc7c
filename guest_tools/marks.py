"""Which inodes of a mount the guest's programs watch: the kernel's marks, read from /proc.

No file of the mount is touched, only /proc/PID/fd links and /proc/PID/fdinfo texts.
"""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from protocol.fdinfo import MarkInfo, parse_fdinfo
from protocol.handles import NodeKey, decode_fh
from protocol.inotify import MARKING
from protocol.masks import EVENTS, MOVE, Mask
from protocol.mountinfo import parse_mountinfo

from .errors import GONE

WHOLE = NodeKey(0, 0)
_FAN_OPEN_EXEC = 0x1000
_FAN_RENAME = 0x1000_0000
_THREADS = 64
"""Threads of a process among which to look for one that has not ended."""
_TGID = re.compile(rb"^Tgid:\t(\d+)$", re.M)
_NOTIFY_FDS = ("anon_inode:inotify", "anon_inode:[fanotify]")


class Mark(NamedTuple):
    """One mark on the mount."""

    wd: int  # -1 for fanotify
    node: NodeKey
    mask: int


class Device(NamedTuple):
    """A mount as fdinfo shows it: the kernel's s_dev, and the ids of its mounts."""

    sdev: int
    mount_ids: frozenset[int]


def device_of(status: os.stat_result) -> Device:
    """The device of any file on the mount, from its stat."""
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    return Device(major << 20 | minor, mount_ids(major, minor))


def mount_ids(major: int, minor: int) -> frozenset[int]:
    """The ids under which a device is mounted here; none when it is not mounted."""
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        mounts = parse_mountinfo(mountinfo.read())
        return frozenset(each.mnt_id for each in mounts if each[2:4] == (major, minor))


def pids() -> list[int]:
    """All processes that this one can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def process_of(thread: int) -> int:
    """The process of a thread; the number itself if the process is unknown."""
    try:
        with open(f"/proc/{thread}/status", "rb", buffering=0) as status:
            found = _TGID.search(status.read(4096))
    except OSError:
        return thread
    return int(found[1]) if found is not None else thread


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot, to distinguish it from a later process
    with the same number; 0 if it has ended. Raises OSError if that is not known.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name may hold anything
    except OSError as error:
        if error.errno in GONE:
            return 0
        raise
    has_ended = fields[0] in (b"Z", b"X") and int(fields[17]) < 2  # threads, this one among them
    return 0 if has_ended else int(fields[19])


def notify_texts(pid: int) -> Iterator[tuple[int, str | OSError]]:
    """The fdinfo of each inotify and fanotify descriptor of a process (or thread), or the error of
    reading it; then it may be a descriptor of another kind. Raises OSError if its descriptors
    cannot be listed: ProcessLookupError if it has ended.
    """
    try:
        directory, fds = _descriptors(pid)
    except OSError as error:
        if error.errno in GONE:
            raise ProcessLookupError(errno.ESRCH, "it has ended") from None
        raise
    for fd in fds:
        try:
            if os.readlink(f"{directory}/fd/{fd}") not in _NOTIFY_FDS:
                continue
            with open(f"{directory}/fdinfo/{fd}") as info:
                text = info.read()
        except OSError as error:
            if error.errno not in GONE:
                yield int(fd), error
            continue
        yield int(fd), text


def may_set_mark(pid: int) -> bool:
    """Whether a thread of a process may be in the middle of inotify_add_watch(2) or
    fanotify_mark(2). False if all of them wait in other calls.
    """
    calls = MARKING.get(platform.machine())
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        if calls is None or len(threads) > _THREADS:
            return True
        for thread in threads:
            with open(f"/proc/{pid}/task/{thread}/syscall") as file:
                if int(file.read().split()[0]) in calls:
                    return True
    except (OSError, ValueError, IndexError):  # it runs, or may not be traced
        return True
    return False


def _descriptors(pid: int) -> tuple[str, list[str]]:
    """Where a process's descriptors are, and their numbers. If its first thread has ended, that one
    has none, and another thread's are listed.
    """
    directory = f"/proc/{pid}"
    fds = os.listdir(f"{directory}/fd")
    if fds:
        return directory, fds
    for thread in os.listdir(f"{directory}/task")[:_THREADS]:
        other = f"{directory}/task/{thread}"
        with suppress(FileNotFoundError, ProcessLookupError):
            if fds := os.listdir(f"{other}/fd"):
                return other, fds
    return directory, []


def marks_in(text: str, device: Device) -> Iterator[Mark]:
    """The marks on the mount in the fdinfo of one descriptor."""
    for mark in parse_fdinfo(text):
        node = _node(mark, device)
        mask = _event_bits(mark)
        if node is not None and mask:
            yield Mark(mark.wd, node, mask)


def _node(mark: MarkInfo, device: Device) -> NodeKey | None:
    if mark.sdev != device.sdev:
        return WHOLE if mark.mnt_id in device.mount_ids else None
    if not mark.ino:
        return WHOLE
    try:
        return decode_fh(mark.handle_type, mark.handle)
    except ValueError:
        return None


def _event_bits(mark: MarkInfo) -> int:
    bits = mark.mask & int(EVENTS)
    if mark.family == "fanotify":
        bits |= int(Mask.OPEN) if mark.mask & _FAN_OPEN_EXEC else 0
        bits |= int(MOVE) if mark.mask & _FAN_RENAME else 0
    return bits


def process_name(pid: int) -> str:
    """The command name of a process."""
    try:
        with open(f"/proc/{pid}/comm", errors="surrogateescape") as comm:
            return comm.read().strip()
    except OSError:
        return "?"
