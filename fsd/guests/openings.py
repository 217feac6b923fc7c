"""Decides how a file was opened, from the events that followed its OPEN. Pure: the caller reads the
clock, the queue and /proc.

The host's OPEN shows neither the mode nor the number of opens: inotify merges consecutive ones
(docs/decisions/open-look-ahead.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from ..pacing import windows

OPENS_LIMIT = 16
"""Opens that one merged OPEN can stand for."""


class Need(Enum):
    """What to look at before there can be a verdict."""

    QUEUE = 1
    """Is more queued, and what has come? ``unread`` and ``written``."""
    PROC = 2
    """How is the file open? ``proc``."""


class Opens(NamedTuple):
    """An item for each open that the OPEN stands for: whether it is for writing."""

    writing: list[bool]


class Wait(NamedTuple):
    """Nothing is known before more events come, or before that time.monotonic()."""

    until: float


class Evidence(NamedTuple):
    """What is known of an OPEN at the head of the waiting events."""

    arrived: float  # time.monotonic()
    closes: list[bool]  # ``closes_of`` those behind it
    is_dir: bool = False
    is_gone: bool = False  # the file cannot be looked at
    unread: bool | None = None  # more is queued, and may be its CLOSE; None: not checked
    written: bool | None = None  # the first event behind it: a MODIFY (True), or an ACCESS
    proc: tuple[bool, bool | None] | None = None
    """(Whether /proc has been read since, whether it is open for writing there; None: it is not
    open); None: not requested."""


def judge(known: Evidence, now: float) -> Opens | Wait | Need:
    """The verdict from the best evidence, or how to get better evidence."""
    if known.closes:
        return Opens(known.closes[:OPENS_LIMIT])
    closing = known.arrived + windows.CLOSE_WAIT
    if now < closing:
        return Wait(closing)
    if known.is_dir:
        return Opens([False])
    if known.unread is None:
        return Need.QUEUE
    if known.unread:
        return Wait(closing)
    if known.written is not None:
        return Opens([known.written])
    used = known.arrived + windows.OPEN_WAIT
    if now < used:
        return Wait(used)
    if known.is_gone:
        return Opens([False])
    if known.proc is None:
        return Need.PROC
    is_read, writing = known.proc
    if not is_read and now < known.arrived + windows.OPENERS_WAIT:
        return Wait(now + windows.OPENERS_POLL)
    # Open no more: its CLOSE is on the way, unless it is only mapped.
    ended = known.arrived + 2 * windows.OPEN_WAIT
    if writing is None and now < ended:
        return Wait(ended)
    return Opens([bool(writing)])


def closes_of(later: Iterable[bool | None], before: Mapping[bool, int]) -> list[bool]:
    """Which CLOSEs behind an OPEN belong to it (True: for writing). ``later``: the OPENs (None) and
    CLOSEs of that file behind it; ``before``: how often it was open already, for writing or not.

    The last opened is assumed to be the first closed. Closes beyond the known opens belong to the
    OPEN before them: the kernel merged several.
    """
    left = dict(before)
    found: list[bool] = []
    others = 0  # opens after this one, not closed yet
    ours, alone = True, True  # this one is open; none came after it
    for writing in later:
        if not (ours or alone):
            break
        if writing is None:
            others, alone = others + 1, False
        elif others:
            others -= 1
        elif ours:
            ours = False
            found.append(writing)
        elif left.get(writing, 0):
            left[writing] -= 1
        elif alone:
            found.append(writing)
    return found
