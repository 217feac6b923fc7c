"""How many descriptors one guest may hold, so that others get theirs and the server can still work
for them.
"""

from __future__ import annotations

import resource

HANDLES_LIMIT = 1 << 16
"""Files that one guest may have open, however many descriptors there are: they take memory, too."""
RESERVE, RESERVE_OF_GUEST = 256, 300
"""Descriptors reserved for the server: its own, those of look-ups, and for each guest those that
its VMM may send (64 regions of memory, 65 queues of three) and its sessions. At most half of
all."""


def share(guests: int = 1) -> int:
    """The share of one of ``guests`` guests, from this process's limit (RLIMIT_NOFILE)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return HANDLES_LIMIT
    reserve = min(RESERVE + RESERVE_OF_GUEST * guests, limit // 2)
    return min((limit - reserve) // max(guests, 1), HANDLES_LIMIT)
