"""How this process uses the processor, so that calls of others do not wait for it: short turns
(sched_setattr(2) needs no privileges for that), and no long pauses.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct

SLICE = 100_000
"""Nanoseconds of a turn. A process with shorter turns runs at once when it wakes, not at the end of
the turn of the program that has just changed a file: docs/decisions/short-turns.md."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(os.uname().machine)
_sched_attr = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime, deadline, period: linux/sched/types.h."""


def shorten_turns() -> None:
    """For this thread, and for threads and processes that it starts from now on.

    Linux before 6.12 ignores it; a policy that was chosen for this process stays.
    """
    if _SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attr = _sched_attr.pack(_sched_attr.size, os.SCHED_OTHER, 0, nice, 0, SLICE, 0, 0)
    ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, attr, 0)


def spare_collections() -> None:
    """Call this once everything is set up: the garbage collector then skips all existing objects,
    which stay anyway. Collecting them took 14 ms of a guest's look-up (Python 3.11).
    """
    gc.collect()
    gc.freeze()
