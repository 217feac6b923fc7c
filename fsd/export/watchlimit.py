"""How many host watches one server may hold, and which guest gets the last ones.

The kernel counts the inotify watches of all programs of a user together (inotify(7)): a server run
by root that took all would leave none for root's other programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..guests.mount import MountGuest
from ..linux import syscalls

if TYPE_CHECKING:
    from ..guests.guest import Guest
    from .interest import Interest

SHARE = 3, 4
"""The part of the host's limit that a server takes at most, unless --max-watches is given."""
FREE = 3, 4
"""The part of the server's limit that any guest may use up; the rest is for guests that have less
than their fair part."""
_LIMITS = ("/proc/sys/fs/inotify/max_user_watches", "/proc/sys/user/max_inotify_watches")


def default_limit() -> int | None:
    """Watches that a server may hold: a share of what the host allows this user. None if that is
    not visible, as in a sandbox.
    """
    if not syscalls.sees_processes():
        return None
    found = []
    for path in _LIMITS:
        with suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return max(min(found) * SHARE[0] // SHARE[1], 1) if found else None


def has_part(
    interested: Iterable[Guest], guests: Iterable[Guest], interest: Interest, used: int, limit: int
) -> bool:
    """Whether one more watch is allowed for one of the interested guests: for any until FREE of the
    limit is used; then for one that has less than its fair part, counting all of its observers
    together.
    """
    if used < limit * FREE[0] // FREE[1] or used >= limit:  # there is none for any guest
        return True
    parts: dict[Guest, int] = {}
    for guest in guests:
        count = used if interest.of(guest, None) else interest.count(guest)
        parts[_owner(guest)] = parts.get(_owner(guest), 0) + count
    fair = max(limit // max(len(parts), 1), 1)
    return any(parts.get(_owner(guest), 0) <= fair for guest in interested)


def _owner(guest: Guest) -> Guest:
    if isinstance(guest, MountGuest) or guest.via is None:
        return guest
    return guest.via
