"""How this process uses the processor, so that others' calls do not wait for it: short turns (what
sched_setattr(2) gives without privileges), and no long pauses of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct

SLICE = 100_000
"""Nanoseconds of a turn. Who has shorter turns is run at once when it wakes, and not at the end of
the turn of the program that has just changed a file: docs/decisions/short-turns.md.
"""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(os.uname().machine)
_sched_attr = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime, deadline, period: linux/sched/types.h."""


def shorten_turns() -> None:
    """Of this thread, and of threads and processes that it starts from now on.

    Linux before 6.12 knows no such thing and takes no notice; a policy that somebody has chosen
    for this process stays.
    """
    if _SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attr = _sched_attr.pack(_sched_attr.size, os.SCHED_OTHER, 0, nice, 0, SLICE, 0, 0)
    ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, attr, 0)


def spare_collections() -> None:
    """To be called once all is set up: the garbage collector leaves alone what is there by now, as
    that stays. Looking through it took 14 ms of a guest's look-up (Python 3.11).
    """
    gc.collect()
    gc.freeze()
