"""The record of one guest's FUSE session for the next server process: which nodes its kernel holds,
what it has open, what was agreed. Current at every moment, in a journal that a descriptor store
holds.

At a clean exit the open files themselves go into the store, as the same open file descriptions. A
server that is killed leaves those that could not be opened again: unlinked ones, and those that
carry locks.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import structlog

from ..files.inode import Inode
from ..files.saved import SavedInode, saved_inode
from ..files.table import InodeTable
from ..linux import fdpassing
from ..process.journal import Journal, JournalError
from ..process.systemd import Store

log = structlog.get_logger()
_AGREED, _NODE, _HANDLE, _AGENT, _OWNER, _MARK = 1, 2, 3, 5, 6, 7
_INIT = struct.Struct("<IQ")  # minor version, flags
_ROW = struct.Struct("<IqQIIQB")  # SavedInode without nodeid, handle and name
_OPEN = struct.Struct("<BIQ")  # type, flags, nodeid
_LOCKS = struct.Struct("<QQIQ")  # Owner
HELD_LIMIT = 256
"""Descriptors of open files in the store while the server runs: a service manager has limits."""
_SO_SNDBUFFORCE = 32
_OWNS = 1 << 63
"""Number of an owner's own descriptor, among those of open files."""
_BATCH = 200  # descriptors in one message, of at most fdpassing.MOST


class Agreed(NamedTuple):
    """The result of INIT."""

    minor: int
    flags: int


class Opened(NamedTuple):
    """An open file, directory or hidden file."""

    kind: int
    flags: int
    nodeid: int


class Owner(NamedTuple):
    """A process of the guest that has locks. ``fh`` is the handle whose descriptor has them; 0 if
    the process has a descriptor of its own.
    """

    nodeid: int
    owner: int
    pid: int
    fh: int


FILE, DIRECTORY, IDLE, HIDDEN = range(4)


class SessionRecord:
    """The record of one guest. The previous server's state is in the attributes, until
    ``taken``.
    """

    def __init__(self, store: Store, name: str) -> None:
        """``name`` begins the names of its descriptors in the store. Raises OSError."""
        self._store = store
        self._name = name
        self._held: set[int] = set()
        self._places: dict[int, tuple[int, bytes]] = {}
        self._journal = self._resumed() or self._new()
        self.nodes: dict[int, tuple[SavedInode, int]] = {}
        self.handles: dict[int, Opened] = {}
        self.owners: dict[int, Owner] = {}
        self.marks: dict[int, int] = {}
        """The marks of the guest's agent: nodeid (0 = all), mask."""
        self.agreed: Agreed | None = None
        self.agent = 0
        """The process number of the guest's agent."""
        try:
            for (kind, number), record in self._journal.records.items():
                self._read(kind, number, record.value, record.count)
        except (struct.error, ValueError, TypeError) as error:  # of another version
            log.error("cannot take over a guest's session", share=name, error=str(error))
            self.clear()
        self._journal.records.clear()
        self.fds = self._descriptors()
        """Open files of the previous server, by handle: the code that takes one out owns it."""

    def _new(self) -> Journal:
        journal = Journal()
        self._store.put(f"{self._name}-session", journal.fd)
        return journal

    def _resumed(self) -> Journal | None:
        fd = self._store.take(f"{self._name}-session")
        if fd < 0:
            return None
        try:
            return Journal(fd)
        except (JournalError, OSError) as error:
            log.error("cannot take over a guest's session", share=self._name, error=str(error))
            os.close(fd)
            self._store.drop(f"{self._name}-session")
            return None

    def _read(self, kind: int, number: int, value: bytes, count: int) -> None:
        if kind == _NODE:
            self.nodes[number] = _row(number, value), count
        elif kind == _HANDLE:
            self.handles[number] = Opened(*_OPEN.unpack(value))
        elif kind == _OWNER:
            self.owners[number] = Owner(*_LOCKS.unpack(value))
        elif kind == _MARK:
            self.marks[number] = count
        elif kind == _AGREED:
            self.agreed = Agreed(*_INIT.unpack(value))
        elif kind == _AGENT:
            self.agent = number

    def _descriptors(self) -> dict[int, int]:
        fds: dict[int, int] = {}
        bag = self._store.take(f"{self._name}-files")
        if bag >= 0:
            self._store.drop(f"{self._name}-files")
            with socket.socket(fileno=bag) as files:
                fds = dict(_unpacked(files))
        for fh in (*self.handles, *(_OWNS | number for number in self.owners)):
            fd = self._store.take(f"{self._name}-fh{fh}")
            if fd >= 0:
                self._held.add(fh)
                if fh in fds:
                    os.close(fd)
                else:
                    fds[fh] = fd
        return fds

    def owned_fd(self, number: int) -> int:
        """An owner's own descriptor from the previous server, which the caller owns now. -1: it is
        lost.
        """
        return self.fds.pop(_OWNS | number, -1)

    def taken(self) -> None:
        """Everything possible is taken over: drop the rest."""
        for fd in self.fds.values():
            os.close(fd)
        for left in (
            self.fds,
            self.nodes,
            self.handles,
            self.owners,
            self.marks,
        ):
            left.clear()

    # Recording

    def agree(self, agreed: Agreed) -> None:
        """INIT: everything starts from the beginning."""
        self.clear()
        self._journal.put(_AGREED, 0, _INIT.pack(*agreed))

    def clear(self) -> None:
        """The guest holds nothing any more."""
        for fh in list(self._held):
            self._release(fh)
        self._places.clear()
        self._journal.clear()
        self.agreed = None

    def node(self, table: InodeTable, inode: Inode, count: int) -> None:
        """The guest's kernel holds so many references."""
        parent = inode.parent
        place = (parent.nodeid if parent is not None else 0, inode.name)
        if self._places.get(inode.nodeid) == place:
            self._journal.count(_NODE, inode.nodeid, count)
            return
        self._places[inode.nodeid] = place
        self._journal.put(_NODE, inode.nodeid, _packed(saved_inode(table, inode)), count)

    def forgotten(self, nodeid: int, count: int) -> None:
        """It has returned references; ``count`` are left."""
        self._journal.count(_NODE, nodeid, count)
        if not count:
            self._places.pop(nodeid, None)

    def opened(self, fh: int, opened: Opened) -> None:
        """OPEN, CREATE, OPENDIR."""
        self._journal.put(_HANDLE, fh, _OPEN.pack(*opened))

    def released(self, fh: int) -> None:
        """RELEASE, RELEASEDIR."""
        self._journal.remove(_HANDLE, fh)
        if fh in self._held:
            self._release(fh)

    def hold(self, fh: int, fd: int) -> None:
        """The open file could not be opened again by the next server after a kill."""
        if fh not in self._held and len(self._held) < HELD_LIMIT:
            self._held.add(fh)
            self._store.put(f"{self._name}-fh{fh}", fd)

    def owns(self, number: int, owner: Owner, fd: int) -> None:
        """A process has locks, on a descriptor."""
        self._journal.put(_OWNER, number, _LOCKS.pack(*owner))
        self.hold(owner.fh or _OWNS | number, fd)

    def disowned(self, number: int) -> None:
        """It has none any more. A descriptor held for a handle stays."""
        self._journal.remove(_OWNER, number)
        if _OWNS | number in self._held:
            self._release(_OWNS | number)

    def _release(self, fh: int) -> None:
        self._held.discard(fh)
        self._store.drop(f"{self._name}-fh{fh}")

    def marked(self, nodeid: int, mask: int) -> None:
        """The guest's interest in a node; 0 = none any more."""
        if (_MARK, nodeid) in self._journal or not mask:
            self._journal.count(_MARK, nodeid, mask)
        else:
            self._journal.put(_MARK, nodeid, b"", mask)

    def replayer(self, pid: int) -> None:
        """The agent's process, whose calls must not reach the host; 0 = there is none."""
        if self.agent:
            self._journal.remove(_AGENT, self.agent)
        self.agent = pid
        if pid:
            self._journal.put(_AGENT, pid, b"")

    def leave(self, handles: Mapping[int, int], owned: Mapping[int, int]) -> None:
        """A clean exit, with all descriptors: of handles, and of owners that have one."""
        files = {**handles, **{_OWNS | number: fd for number, fd in owned.items()}}
        if files:
            bag = _packed_files(files)
            self._store.put(f"{self._name}-files", bag.fileno())
            bag.close()


def _packed(row: SavedInode) -> bytes:
    return (
        _ROW.pack(row.generation, row.device, row.ino, row.kind, row.nlink, row.parent,
                  len(row.handle))
        + row.handle + row.name
    )  # fmt: skip


def _row(nodeid: int, value: bytes) -> SavedInode:
    generation, device, ino, kind, nlink, parent, size = _ROW.unpack_from(value)
    handle, name = value[_ROW.size : _ROW.size + size], value[_ROW.size + size :]
    return SavedInode(nodeid, generation, device, ino, handle, kind, nlink, parent, name)


def _packed_files(files: Mapping[int, int]) -> socket.socket:
    """A socket with descriptors in flight, which exist as long as the socket is held: one name in
    the store for all of them.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    numbers = list(files)
    with ours:
        ours.setblocking(False)
        with suppress(OSError):
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 26)
        for start in range(0, len(numbers), _BATCH):
            some = numbers[start : start + _BATCH]
            fds = fdpassing.ancillary([files[fh] for fh in some])
            data = struct.pack(f"<{len(some)}Q", *some)
            try:
                ours.sendmsg([data], fds)
            except OSError as error:
                log.error("open files were lost", count=len(numbers) - start, error=str(error))
                break
    return theirs


def _unpacked(files: socket.socket) -> Iterator[tuple[int, int]]:
    files.setblocking(False)
    while True:
        try:
            data, fds = fdpassing.receive(files, 8 * _BATCH, _BATCH)
        except BlockingIOError:
            return
        if not data:
            return
        yield from zip(struct.unpack(f"<{len(data) // 8}Q", data), fds, strict=False)
