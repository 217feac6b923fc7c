"""How many descriptors the agent may have, and what they are for.

Apart because two threads share them: what one keeps must never leave the other without.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import NamedTuple

WANTED = 65_536
"""Descriptors that root asks for, beyond its hard limit: twice what is kept at most."""
OPENED = 16_384
"""Files kept open for programs of the host, at most: each costs the guest's kernel and the server
about a KiB."""
EXITS = 1_024
"""Processes whose exit is waited for by a descriptor of each, at most: more than have marks on any
usual machine. The exits of others are seen by the slow timer."""


class Shares(NamedTuple):
    """What each use of descriptors may take; a quarter of the limit is left for the rest."""

    opened: int
    exits: int


def raise_limit() -> Shares:
    """Raise this process's limit as far as may be. Returns what each use may take of it."""
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
