"""The open files of one mount by number: kept in its record, taken over from another process.

Apart from what is done with them (openfiledata.py).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import structlog

from protocol.frames import CONTROL

from ..export.export import Export
from ..files.caller import Caller
from ..files.handle import Handle
from ..files.inode import Inode
from ..guests.ledger import UnexpectedCall
from ..guests.mount import MountGuest
from . import record
from .access import Access
from .hidden import HiddenHandle
from .hostlocks import GuestLocks
from .record import Opened, SessionRecord

log = structlog.get_logger()
_REOPENING = (
    os.O_ACCMODE | os.O_APPEND | os.O_DSYNC | os.O_SYNC | os.O_NOATIME | os.O_NONBLOCK
)  # fmt: skip
"""Flags with which a file is opened again."""


@dataclass(slots=True, eq=False)
class IdleHandle:
    """A handle without data: opened by the replayer, or a directory that is removed."""

    inode: Inode


@dataclass(slots=True, eq=False)
class LostHandle:
    """A handle of an earlier server process that this one could not restore: requests on it fail
    with ``errno``.
    """

    errno: int
    is_agents: bool = False


AnyHandle = Handle | IdleHandle | HiddenHandle


class Handles:
    """Those of one mount, and the locks that its processes hold through them."""

    def __init__(self, export: Export, guest: MountGuest, access: Access) -> None:
        self._export = export
        self._guest = guest
        self._access = access
        self._fs = export.fs
        self.kept: SessionRecord | None = None
        self._handles: dict[int, AnyHandle | LostHandle] = {}
        self.replayed: set[int] = set()
        """What the agent has open for programs of the host."""
        self._numbers = itertools.count(1)
        self.locks = GuestLocks(export.watcher, export.lock_waiters, self.has_room)
        self.pinned = 0
        """Directories that are pinned by a descriptor because the guest's kernel holds them."""

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._handles))

    def has_room(self) -> bool:
        """Whether the guest may have one more descriptor."""
        own = len(self._handles) - len(self.replayed)
        return own + self.locks.opened + self.pinned < self._export.descriptors

    def check_room(self) -> None:
        """Raises OSError ENFILE if it may not: before a file is opened."""
        if not self.has_room():
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def add(self, handle: AnyHandle, who: Caller) -> int:
        """The number of a new one."""
        fh = next(self._numbers)
        self._handles[fh] = handle
        if isinstance(handle, Handle):
            handle.fh, handle.opener, handle.uid = fh, who.pid, who.uid
        if self.kept is not None:
            self.kept.opened(fh, _opened(handle))
            if isinstance(handle, Handle) and not handle.inode.nlink:
                self.kept.hold(fh, handle.fd)
        return fh

    def handle(self, fh: int) -> AnyHandle:
        """The open file of a request. Raises OSError EBADF."""
        try:
            handle = self._handles[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
        if isinstance(handle, LostHandle):
            raise OSError(handle.errno, os.strerror(handle.errno))
        return handle

    def file(self, fh: int) -> Handle:
        """The open file or directory of a request about its data. Raises OSError EBADF, EACCES for
        the replayer's, which have none.
        """
        return self.with_data(self.handle(fh))

    def with_data(self, handle: AnyHandle) -> Handle:
        """The handle, if it has data: also what the replayer's thread opened before it was the
        replayer has no data for it: on the libfuse transport, READ and WRITE do not say who asks.
        """
        if not isinstance(handle, Handle) or 0 != handle.opener == self._guest.pid:
            raise self._access.refused(UnexpectedCall("data"))
        return handle

    def open_directory(self, inode: Inode) -> Handle | IdleHandle:
        """OPENDIR. Raises OSError."""
        try:
            return self._fs.opendir(inode)
        except FileNotFoundError:  # a removed one in which a program works: it is empty
            return IdleHandle(inode)

    def known(self, fh: int) -> AnyHandle | LostHandle | None:
        """The same of any number."""
        return self._handles.get(fh)

    def remove(self, fh: int) -> AnyHandle | LostHandle | None:
        """Its number is free again; closing it is the caller's."""
        self.replayed.discard(fh)
        if self.kept is not None:
            self.kept.released(fh)
        return self._handles.pop(fh, None)

    def file_fd(self, fh: int) -> int:
        """The descriptor to fsync; -1 if there is nothing to sync."""
        handle = self.handle(fh)
        return handle.fd if isinstance(handle, Handle) else -1

    # The server before, and the one after this

    def keep_no_longer(self) -> None:
        """Record nothing more: open files now belong to another session."""
        if self.kept is not None:
            self._fs.on_unlinked.remove(self._hold)
            self.kept = self.locks.kept = None

    def keep(self, kept: SessionRecord | None) -> None:
        """Record there what is open and locked."""
        self.kept = self.locks.kept = kept
        if kept is not None:
            self._fs.on_unlinked.append(self._hold)

    def resume(self, kept: SessionRecord, inodes: Mapping[int, Inode]) -> Iterator[int]:
        """Take over open files, by descriptor if there is one; else they are opened again."""
        for fh, opened in sorted(kept.handles.items()):
            fd = kept.fds.pop(fh, -1)
            self._handles[fh] = self._resumed(opened, fd, inodes)
            handle = self._handles[fh]
            if isinstance(handle, Handle):
                handle.fh = fh
            self._numbers = itertools.count(fh + 1)
            yield fh
        for number, owner in kept.owners.items():
            holder = self._handles.get(owner.fh)
            holder = holder if isinstance(holder, Handle) else None
            fd = holder.fd if holder is not None else kept.owned_fd(number)
            if fd >= 0 and owner.nodeid in inodes:
                self.locks.resume(number, inodes[owner.nodeid], owner, fd, holder)
            else:
                kept.disowned(number)

    def _resumed(
        self, opened: Opened, fd: int, inodes: Mapping[int, Inode]
    ) -> AnyHandle | LostHandle:
        kind, flags, nodeid = opened
        if kind == record.HIDDEN:
            return LostHandle(errno.ECONNRESET, is_agents=nodeid == CONTROL)
        inode = inodes.get(nodeid)
        if kind == record.IDLE and inode is not None:
            return IdleHandle(inode)
        try:
            if fd >= 0:
                return self._fs.resume(inode, fd, flags)
            if inode is None or inode.is_placeholder:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            if kind == record.DIRECTORY:
                return self.open_directory(inode)
            handle = self._fs.reopen(inode, flags & _REOPENING)
            handle.flags = flags
            return handle
        except OSError as error:
            log.warning("an open file was lost", nodeid=nodeid, error=str(error))
            return LostHandle(errno.ESTALE)

    def _hold(self, inode: Inode) -> None:
        """An open file has lost its last name: it cannot be opened again by name."""
        if self.kept is not None:
            for fh, handle in self._handles.items():
                if isinstance(handle, Handle) and handle.inode is inode:
                    self.kept.hold(fh, handle.fd)

    def descriptors(self) -> dict[int, int]:
        """Of all open files, by handle."""
        return {handle.fh: handle.fd for handle in self.files()}

    def files(self) -> Iterator[Handle]:
        """All open files and directories."""
        return (handle for handle in self._handles.values() if isinstance(handle, Handle))


def _opened(handle: AnyHandle) -> Opened:
    if isinstance(handle, HiddenHandle):
        return Opened(record.HIDDEN, 0, handle.nodeid)
    inode = handle.inode
    if isinstance(handle, IdleHandle):
        return Opened(record.IDLE, 0, inode.nodeid)
    kind = record.DIRECTORY if inode.is_dir else record.FILE
    return Opened(kind, handle.flags & 0xFFFF_FFFF, inode.nodeid)
