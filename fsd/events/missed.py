"""Missed events: names with the kinds of their events, and what file times show."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..files.listing import Known

CLOCK_LAG_NS = 20_000_000
"""File times lag the clock by up to a tick of the kernel (10 ms at HZ=100), twice for safety."""


class Missed(NamedTuple):
    """A name with undelivered events: the state known before, and their kinds."""

    before: Known | None
    mask: int

    def followed_by(self, later: Missed) -> Missed:
        """Both for the same name: the state known before the first one counts."""
        return Missed(self.before, self.mask | later.mask)


def changed_since(status: os.stat_result, seen_ns: int) -> tuple[bool, bool]:
    """Whether (content, anything) changed after that time. Programs cannot set ctime."""
    since = seen_ns - CLOCK_LAG_NS
    return status.st_mtime_ns > since, status.st_ctime_ns > since
