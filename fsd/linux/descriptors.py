"""How many of the server's descriptors one guest may hold: so many that others have theirs, and the
server what it needs to work for them.
"""

from __future__ import annotations

import resource

HANDLES_LIMIT = 1 << 16
"""Files that one guest may have open, however many descriptors there are: they take memory, too."""
RESERVE, RESERVE_OF_GUEST = 256, 300
"""Descriptors for the server: its own, those of looking names up, and for each guest what its VMM
may hand over (64 regions of memory, 65 queues of three) and its sessions. Never more than half."""


def share(guests: int = 1) -> int:
    """Of each of so many guests, by this process's limit (RLIMIT_NOFILE)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return HANDLES_LIMIT
    reserve = min(RESERVE + RESERVE_OF_GUEST * guests, limit // 2)
    return min((limit - reserve) // max(guests, 1), HANDLES_LIMIT)
