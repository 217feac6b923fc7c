"""Epoll sets: which file each entry really points to.

An entry remembers the number that it was added under, not more: that descriptor may be closed, or
another file's by now, and several entries may bear one number. The kernel alone knows the file, and
answers whether it is a given descriptor's: kcmp(2), KCMP_EPOLL_TFD. The n-th line of a number in
fdinfo is the entry with ``toff`` n, for both walk the same tree.
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
    ``file_of``: the number that a file (process, descriptor) bears in the state, or 0.
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
    """Processes and descriptors that refer to an entry's file; the likely ones come first."""
    own = _descriptors(pid)
    for fd in sorted(own, key=lambda fd: fd != entry.tfd):
        if _is_target(pid, fd, pid, slot):
            yield pid, fd
    for other in pids():
        if other in (pid, os.getpid()):
            continue
        for fd in _descriptors(other):
            # kcmp may not be asked of every process: first what stat tells.
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
    except OSError:  # closed meanwhile, or not ours to ask about
        return False


def _link(pid: int, fd: int) -> bytes:
    try:
        return os.readlink(b"/proc/%d/fd/%d" % (pid, fd))
    except OSError:
        return b""
