"""How many descriptors the agent may have, and how they are divided.

Apart because two threads share them: neither may take the other's.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import NamedTuple

WANTED = 65_536
"""Descriptors that root requests beyond its hard limit: twice the number that is held at most."""
OPENED = 16_384
"""Largest number of files kept open for programs of the host: each costs the guest's kernel and the
server about a KiB."""
EXITS = 1_024
"""Largest number of processes whose exit is awaited with a descriptor: more than have marks on a
usual machine. The slow timer notices the exits of others."""


class Shares(NamedTuple):
    """How many descriptors each use may take; a quarter of the limit is left for the rest."""

    opened: int
    exits: int


def raise_limit() -> Shares:
    """Raise this process's limit as far as possible. Returns how many descriptors each use may
    take.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = [(hard, hard)]
    if hard != resource.RLIM_INFINITY and hard < WANTED:
        wanted.append((WANTED, WANTED))  # root only: setrlimit(2), CAP_SYS_RESOURCE
    for limits in wanted:
        with suppress(OSError, ValueError):  # as it is, then: above fs.nr_open, or not allowed
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = WANTED if soft == resource.RLIM_INFINITY else soft
    return Shares(min(OPENED, limit // 2), min(EXITS, limit // 4))
