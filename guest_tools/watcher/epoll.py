"""Epoll sets: which file each entry really refers to.

An entry stores only the number under which it was added. That descriptor may be closed or belong to
another file by now, and several entries may have the same number. Only the kernel knows the file,
and tests whether it is that of a given descriptor: kcmp(2), KCMP_EPOLL_TFD. The n-th line of a
number in fdinfo is the entry with ``toff`` n, because both walk the same tree.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

from protocol.fdinfo import TargetInfo, parse_targets

from ..marks import pids
from .notify import Slot, is_target
from .objects import kernel_device
from .state import Target


def targets(pid: int, fd: int, text: str, file_of: Callable[[int, int], int]) -> list[Target]:
    """Entries of the set that ``pid`` has as ``fd``, in fdinfo's order. ``text``: its fdinfo;
    ``file_of``: the number in the state of the file of (process, descriptor), or 0.
    """
    seen: Counter[int] = Counter()
    found = []
    for entry in parse_targets(text):
        slot = Slot(fd, entry.tfd, seen[entry.tfd])
        seen[entry.tfd] += 1
        owner, descriptor = next(_holders(pid, slot, entry), (0, 0))
        found.append(
            Target(
                entry.tfd,
                slot.toff,
                entry.events,
                entry.data,
                entry.pos & 0xFFFF_FFFF_FFFF_FFFF,
                entry.ino,
                entry.sdev,
                owner,
                descriptor,
                file_of(owner, descriptor) if owner else 0,
                _link(owner, descriptor) if owner else b"",
            )
        )
    return found


def _holders(pid: int, slot: Slot, entry: TargetInfo) -> Iterator[tuple[int, int]]:
    """Processes and descriptors that refer to an entry's file, the likely ones first."""
    own = _descriptors(pid)
    for fd in sorted(own, key=lambda fd: fd != entry.tfd):
        if _is_target(pid, fd, pid, slot):
            yield pid, fd
    for other in pids():
        if other in (pid, os.getpid()):
            continue
        for fd in _descriptors(other):
            # kcmp is not allowed for every process: use stat first.
            if _could_be(other, fd, entry) and _is_target(other, fd, pid, slot):
                yield other, fd


def _descriptors(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def _could_be(pid: int, fd: int, entry: TargetInfo) -> bool:
    try:
        status = os.stat(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return False
    return (status.st_ino, kernel_device(status.st_dev)) == (entry.ino, entry.sdev)


def _is_target(pid: int, fd: int, epoll_pid: int, slot: Slot) -> bool:
    try:
        return is_target(pid, fd, epoll_pid, slot)
    except OSError:  # closed meanwhile, or access is denied
        return False


def _link(pid: int, fd: int) -> bytes:
    try:
        return os.readlink(b"/proc/%d/fd/%d" % (pid, fd))
    except OSError:
        return b""
