"""What a look-up has shown of a file: by the time its mark arrives, what has happened since.

The directory of a file that was just looked up is watched, but says nothing of what is done by
another name of it: links elsewhere that come, go, or are used. The file's own attributes do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from protocol.masks import Mask

from ..events.event import RENAME, Event
from ..files.attributes import StatLike
from ..files.inode import Inode
from ..files.table import InodeTable
from ..linux import syscalls

_ATTRIB, _MODIFY = int(Mask.ATTRIB), int(Mask.MODIFY)
_MOVE_SELF, _DELETE_SELF = int(Mask.MOVE_SELF), int(Mask.DELETE_SELF)
_CREATE, _DELETE = int(Mask.CREATE), int(Mask.DELETE)
_CHANGES = _ATTRIB | _MODIFY | _MOVE_SELF


class Seen(NamedTuple):
    """A file as a look-up has shown it."""

    nlink: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, attr: StatLike) -> Seen:
        """Of its attributes."""
        return cls(attr.st_nlink, attr.st_mtime_ns, attr.st_ctime_ns)


GONE = Seen(-1, 0, 0)


def look(table: InodeTable, inode: Inode) -> Seen | None:
    """A file as it is now, or GONE; None where nobody could look."""
    try:
        with table.reach.opened_by_any_name(inode) as fd:
            return Seen.of(os.fstat(fd))
    except OSError as error:
        is_gone = syscalls.is_gone(error) and table.reach.handle_opens(inode.identity)
        return GONE if is_gone else None


def own_events(inode: Inode, events: Iterable[Event], guest: object) -> int:
    """The object's own events among these, or that follow of them; of links that came, only where
    the guest has made them.
    """
    mask = 0
    for event in events:
        if event.node is inode and not event.name:
            mask |= event.kind
        if event.child is inode:
            if event.kind & RENAME:
                mask |= _MOVE_SELF
            elif event.kind & _DELETE:
                mask |= _ATTRIB | _end(event)
            elif event.kind & _CREATE:
                mask |= _ATTRIB * (event.origin is guest)
            else:
                mask |= event.kind
        if event.replaced is inode:
            mask |= _MOVE_SELF if event.exchanged else _ATTRIB | _end(event)
    return mask


def _end(event: Event) -> int:
    return _DELETE_SELF * (event.nlink < 2)


def missing(before: Seen | None, now: Seen | None, told: int) -> int:
    """Own events that must have been, beside those ``told``, for a file to be as it is ``now``.
    Only its end where nobody has seen it ``before``.
    """
    if now is GONE:
        return (_ATTRIB | _DELETE_SELF) & ~told if not told & _DELETE_SELF else 0
    if before is None or now is None:
        return 0
    mask = 0
    if now.nlink != before.nlink:
        mask |= _ATTRIB & ~told
    if now != before and not told & _CHANGES:
        mask |= _ATTRIB if now.mtime_ns == before.mtime_ns else _MODIFY
    return mask
