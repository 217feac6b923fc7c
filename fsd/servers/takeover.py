"""Takes over the virtual machines of the previous server process, from the state it left behind.

The image of the export may be some seconds old if that server was killed. What each guest's kernel
holds is in its session's journal (fuse.record), which is always current.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import structlog

from protocol.frames import FSD_DIR
from protocol.images import ImageError
from protocol.masks import EVENTS

from ..checkpoint import image
from ..checkpoint.restore import Resumption
from ..checkpoint.rows import GuestKind, SavedExport, SavedGuest, SavedName
from ..checkpoint.saver import Saver
from ..checkpoint.take import identity_of
from ..export.export import Export
from ..files.inode import ROOT_ID, Inode
from ..files.saved import SavedInode, SavedTable
from ..fuse.record import SessionRecord
from ..guests.guest import Guest
from ..process.journal import Journal, JournalError
from ..process.systemd import Store
from ..transports.virtiofs import GuestTransport

log = structlog.get_logger()
_IMAGE, _IS_LAST, _NAME = 1, 2, 3
_ARRIVED = struct.Struct("<QQIQ")  # directory's nodeid, ino, type, time in ns
EVERY, PATIENCE = 0.1, 0.02
"""Seconds between images in memory, and to wait for a moment without changes."""


class ImageMemory:
    """The image of an export and the names added since, in journals that the store holds."""

    path = Path("in memory")

    def __init__(self, store: Store) -> None:
        """Raises OSError."""
        self._store = store
        self._image = self._journal("image")
        self._names = self._journal("names")
        image, names = self._image.records, self._names.records
        self._data = image[_IMAGE, 0].value if (_IMAGE, 0) in image else None
        self.is_last = (_IS_LAST, 0) in image
        """It was made at a clean exit: nothing happened after it."""
        self.names = [_arrived(record.value) for record in names.values()]
        """Names added after it was made: guests may know them."""
        self._first = self._next = self._written = 0
        image.clear()
        self._names.clear()

    def _journal(self, name: str) -> Journal:
        fd = self._store.take(name)
        if fd >= 0:
            try:
                return Journal(fd)
            except JournalError as error:
                log.error("the previous server's state cannot be used", reason=str(error))
                self._store.drop(name)
                os.close(fd)
        journal = Journal()
        self._store.put(name, journal.fd)
        return journal

    def read(self) -> bytes | None:
        """The image of an earlier process; returned once."""
        data, self._data = self._data, None
        return data

    def write(self, data: bytes) -> None:
        """Replace it, in any thread. Raises OSError."""
        self._image.put(_IMAGE, 0, data)

    def mark(self, *, last: bool) -> None:
        """Whether nothing can happen after it."""
        if last:
            self._image.put(_IS_LAST, 0, b"")
        else:
            self._image.remove(_IS_LAST, 0)

    def note_name(self, directory: Inode, name: bytes, child: Inode) -> None:
        """A name has come."""
        row = _ARRIVED.pack(directory.nodeid, child.identity.ino, child.kind, time.time_ns())
        self._names.put(_NAME, self._next, row + name)
        self._next += 1
        while self._first < self._written:
            self._names.remove(_NAME, self._first)
            self._first += 1

    @property
    def noted(self) -> int:
        """How many names were added."""
        return self._next

    def has_names(self, count: int) -> None:
        """An image contains the first ``count`` of them; called in any thread."""
        self._written = count


class MemorySaver(Saver):
    """Saves to an ImageMemory."""

    def __init__(
        self,
        export: Export,
        memory: ImageMemory,
        mounts: Callable[[], Mapping[Guest, dict[int, int]]],
    ) -> None:
        super().__init__(export, memory, mounts)
        self._memory = memory

    def take(self) -> Callable[[], int]:
        """The current state, and a function that writes it, also in another thread."""
        noted = self._memory.noted
        write = super().take()

        def written() -> int:
            size = write()
            self._memory.has_names(noted)
            return size

        return written


def _arrived(value: bytes) -> SavedName:
    directory, ino, kind, seen_ns = _ARRIVED.unpack_from(value)
    return SavedName(directory, value[_ARRIVED.size :], ino, kind, seen_ns, 0)


def open_export(
    make: Callable[[], Export],
    memory: ImageMemory,
    store: Store,
    transports: Sequence[GuestTransport],
) -> Export:
    """The export with the guests that continue; a new one if there are none. Raises OSError."""
    going = {transport.name: transport for transport in transports if transport.known is not None}
    inotify = store.take("inotify")
    if inotify >= 0:
        store.drop("inotify")
    saved, is_last = _read(memory), memory.is_last
    for state in _states(make, saved, is_last, going) if going else ():
        export = make()
        try:
            resumption = Resumption(export, state)
        except ImageError as error:
            log.error("the previous server's state cannot be used", reason=str(error))
            export.close()
            continue
        memory.mark(last=False)
        resumption.came_later(memory.names)
        for transport in transports:
            transport.export = export
        for transport in going.values():
            try:
                transport.resume(resumption.mount, resumption.table.inodes)
            except ValueError as error:
                log.error(
                    "a guest's session cannot be continued", share=transport.name, reason=str(error)
                )
        resumption.finish(inotify if state is saved and is_last else -1)
        return export
    export = make()
    for transport in transports:
        transport.export = export
    return export


def _read(memory: ImageMemory) -> SavedExport | None:
    data = memory.read()
    try:
        return None if data is None else image.decode(data)
    except ImageError as error:
        log.error("the previous server's state cannot be used", reason=str(error))
        return None


def _states(
    make: Callable[[], Export],
    saved: SavedExport | None,
    is_last: bool,
    going: Mapping[str, GuestTransport],
) -> Iterator[SavedExport]:
    """States that may be restored, the best first."""
    kept = {name: transport.kept for name, transport in going.items() if transport.kept is not None}
    if saved is not None:
        yield _merged(saved, kept, is_last=is_last)
    export = make()
    alone = identity_of(export)
    export.close()
    alone.saved_ns = saved.saved_ns if saved is not None else 0
    yield _merged(alone, kept, is_last=False)


def _merged(saved: SavedExport, kept: Mapping[str, SessionRecord], *, is_last: bool) -> SavedExport:
    """The image, with what guests hold now; if they differ, the later one is right."""
    rows: dict[int, SavedInode] = {}
    objects: set[tuple[int, int, bytes]] = set()
    now = [row for session in kept.values() for row, _ in session.nodes.values()]
    sources = [saved.table.inodes, now] if is_last else [now, saved.table.inodes]
    for row in (row for source in sources for row in source):
        # One object is two nodes if it is seen through two mounts.
        identity = (row.device and row.nodeid, row.ino, row.handle)
        if row.nodeid not in rows and identity not in objects and ROOT_ID < row.nodeid < FSD_DIR:
            rows[row.nodeid] = row
            objects.add(identity)
    guests = [guest for guest in saved.guests if guest.kind != GuestKind.MOUNT]
    mounts = {guest.name: guest for guest in saved.guests if guest.kind == GuestKind.MOUNT}
    for name, session in kept.items():
        guest = mounts.get(name) or SavedGuest(GuestKind.MOUNT, name, events=int(EVENTS))
        guest.nodes = {nodeid: count for nodeid, (_, count) in session.nodes.items()}
        if not is_last:
            marks = session.marks.items()
            guest.marks = [mark for mark in marks if mark[0] in rows or mark[0] <= ROOT_ID]
        guests.append(guest)
    saved.guests = guests
    saved.names = [row for row in saved.names if row.directory in rows or row.directory == ROOT_ID]
    forgotten = [row for row in saved.table.forgotten if row.nodeid not in rows]
    links = [link for link in saved.table.links if link.nodeid in rows]
    saved.table = SavedTable(list(rows.values()), links, forgotten)
    return saved
