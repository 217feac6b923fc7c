"""The state of an export as plain rows, which refer to inodes by nodeid.

Apart from those that make them (``take``), store them (``image``) and use them (``restore``), which
so need not know one another. The rows of the inode table are in ``fsd.files.saved``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from protocol import frames

from ..files.saved import SavedTable


class SavedName(NamedTuple):
    """One name of a listing, or the known state of a name that a guest missed."""

    directory: int
    name: bytes
    ino: int
    kind: int
    seen_ns: int
    nodeid: int  # 0: nobody looked it up


class SavedMissed(NamedTuple):
    """A name with events that a guest did not get."""

    directory: int
    name: bytes
    mask: int
    before: SavedName | None


class SavedEvent(NamedTuple):
    """An event that a mount's agent has not replayed."""

    node: int
    mask: int
    name: bytes
    cookie: int
    child: int
    nlink: int
    node2: int
    name2: bytes
    replaced: int
    has_self: bool
    exchanged: int


class GuestKind(IntEnum):
    """The kind of a guest."""

    MOUNT = 1
    OBSERVER = 2
    BY_HAND = 3


@dataclass(slots=True)
class SavedGuest:
    """One guest: its interest, its undelivered events, its kernel's references."""

    kind: GuestKind
    name: str
    token: bytes = b""  # by which an observer shows that it is the one
    events: int = 0
    sent: int = 0  # events that were handed out
    marks: list[tuple[int, int]] = field(default_factory=list)  # nodeid (0 = whole), mask
    outbox: list[frames.Event] = field(default_factory=list)
    held: list[SavedEvent] = field(default_factory=list)
    missed: list[SavedMissed] = field(default_factory=list)
    nodes: dict[int, int] = field(default_factory=dict)  # nodeid -> lookup count


@dataclass(slots=True)
class SavedExport:
    """The whole state, and the directory that it belongs to."""

    source: str
    root_ino: int
    root_handle: bytes
    file_system: int  # f_fsid of statvfs(3); 0 if there is none
    saved_ns: int = 0
    table: SavedTable = field(default_factory=lambda: SavedTable([], [], []))
    watches: list[tuple[int, int]] = field(default_factory=list)  # nodeid, wd
    listed: list[int] = field(default_factory=list)  # directories whose names are all known
    names: list[SavedName] = field(default_factory=list)
    guests: list[SavedGuest] = field(default_factory=list)
