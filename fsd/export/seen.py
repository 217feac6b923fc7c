"""A file's attributes at its look-up, from which the changes up to its mark's arrival follow.

The directory of a file that was just looked up is watched, but gets no events for the file's other
names: links elsewhere that are made, removed or used. The file's own attributes show them.
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
    """The attributes of a file at its look-up."""

    nlink: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, attr: StatLike) -> Seen:
        """Of its attributes."""
        return cls(attr.st_nlink, attr.st_mtime_ns, attr.st_ctime_ns)


GONE = Seen(-1, 0, 0)


def look(table: InodeTable, inode: Inode) -> Seen | None:
    """A file's current attributes, or GONE; None if it cannot be looked at."""
    try:
        with table.reach.opened_by_any_name(inode) as fd:
            return Seen.of(os.fstat(fd))
    except OSError as error:
        is_gone = syscalls.is_gone(error) and table.reach.handle_opens(inode.identity)
        return GONE if is_gone else None


def self_events(inode: Inode, events: Iterable[Event], guest: object) -> int:
    """The object's self events among these, or that follow from them; of new links, only those that
    the guest has made.
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


def missing(before: Seen | None, now: Seen | None, delivered: int) -> int:
    """Self events that must have happened, besides those delivered, for a file to be as it is
    ``now``. Only its end if it was not seen ``before``.
    """
    if now is GONE:
        return (_ATTRIB | _DELETE_SELF) & ~delivered if not delivered & _DELETE_SELF else 0
    if before is None or now is None:
        return 0
    mask = 0
    if now.nlink != before.nlink:
        mask |= _ATTRIB & ~delivered
    if now != before and not delivered & _CHANGES:
        mask |= _ATTRIB if now.mtime_ns == before.mtime_ns else _MODIFY
    return mask
