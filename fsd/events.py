"""Host events as the export routes them: resolved to inodes, renames as one unit."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.masks import Mask

from .inodes import Inode
from .listings import Known
from .watcher import Origin

RENAME = int(Mask.MOVED_FROM | Mask.MOVED_TO)


@dataclass(slots=True, eq=False)
class Event:
    """One event, or both halves of a rename (mask has MOVED_FROM and MOVED_TO).

    For MOVED_TO alone ``node``/``name`` is the new place. An empty name is an event of the
    watched object itself.
    """

    node: Inode
    mask: int
    name: bytes
    cookie: int
    origin: Origin
    stamp: float
    child: Inode | None = None  # what the name stood for as of the event
    nlink: int = 1  # links of a removed child (or of the replaced one) just before the event
    before: Known | None = None  # what was known under the name before
    node2: Inode | None = None  # of a rename: the new directory
    name2: bytes = b""
    replaced: Inode | None = None  # what a MOVED_TO overwrote
    implied: bool = False  # a guest's kernel makes it by itself, as part of what is replayed
    implied_by: Event | None = None  # as part of this one, told before; else of the next DELETE
    twin: bool = False  # the same event of the child itself goes with it
    exchanged: int = 0  # of a RENAME_EXCHANGE: cookie of the way back, that replaced goes

    @property
    def kind(self) -> int:
        """The event bits alone."""
        return self.mask & 0xFFF
