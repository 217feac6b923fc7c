"""Locks of a guest's processes, held on the host, where the host and other guests see them.

flock(2) belongs to the open file. A fcntl(2) lock belongs to a process in the guest and to an open
file description here (F_OFD_SETLK): each owner in the guest has a description of its own, borrowed
from the handle it locks through if no other owner has that. Nothing here waits.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from protocol.masks import Mask

from ..events.event import SERVER
from ..events.watcher import HostWatcher
from ..files import locks
from ..files.handle import Handle
from ..files.inode import Inode
from ..files.locks import OFFSET_MAX, Lock, LockWaiters
from ..linux import syscalls
from .record import Owner, SessionRecord

OWNERS_LIMIT = 1 << 16
"""Lock owners of one guest, with a file's own descriptor or one of their own."""


SEARCHED = 1024
"""Owners among which to search for the process that has a lock: a conflicting one that is not found
has no process number. Each is a system call."""


@dataclass(slots=True, eq=False)
class _Owner:
    number: int
    fd: int
    handle: Handle | None  # the handle whose descriptor it is; None = its own
    pid: int


class GuestLocks:
    """Locks of one guest."""

    def __init__(
        self, watcher: HostWatcher, waiters: LockWaiters, has_room: Callable[[], bool]
    ) -> None:
        """``has_room``: whether the guest may have one more descriptor."""
        self._watcher = watcher
        self._has_room = has_room
        self.opened = 0
        """Descriptors that belong to owners."""
        self.waiters = waiters
        self._owners: dict[Inode, dict[int, _Owner]] = {}
        self._count = 0
        self._numbers = itertools.count(1)
        self.kept: SessionRecord | None = None
        """Records the owners of locks."""

    # POSIX locks

    def get(self, handle: Handle, owner: int, lock: Lock) -> Lock:
        """GETLK: a lock that conflicts with this one, else its type is F_UNLCK."""
        mine = self._owner(handle, owner, lock.pid)
        kind, start, end, pid = locks.blocking(mine.fd, lock)
        if kind == fcntl.F_UNLCK:
            return Lock(kind, 0, 0, 0)
        for other in islice(self._owners[handle.inode].values(), SEARCHED):
            if other is mine:
                continue
            in_its_way = locks.blocking(other.fd, Lock(kind, start, end, 0))
            if in_its_way.kind == fcntl.F_UNLCK:  # it is the holder
                pid = other.pid
        return Lock(kind, start, end, max(pid, 0))

    def set(self, handle: Handle, owner: int, lock: Lock) -> None:
        """SETLK. Raises BlockingIOError if a lock conflicts."""
        if lock.kind == fcntl.F_UNLCK:
            known = self._owners.get(handle.inode, {}).get(owner)
            if known is not None:
                locks.set_lock(known.fd, lock)
                self.waiters.wake(handle.inode)
            return
        mine = self._owner(handle, owner, lock.pid)
        try:
            locks.set_lock(mine.fd, lock)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            self._widen(mine, handle)
            locks.set_lock(mine.fd, lock)
        if self.kept is not None:
            fh = mine.handle.fh if mine.handle is not None else 0
            self.kept.owns(mine.number, Owner(handle.inode.nodeid, owner, mine.pid, fh), mine.fd)

    def resume(
        self, number: int, inode: Inode, owner: Owner, fd: int, handle: Handle | None
    ) -> None:
        """Locks of another process of the server, which ``fd`` still has."""
        self._owners.setdefault(inode, {})[owner.owner] = _Owner(number, fd, handle, owner.pid)
        self._count += 1
        self.opened += handle is None
        self._numbers = itertools.count(max(number + 1, next(self._numbers)))

    def descriptors(self) -> dict[int, int]:
        """Those that belong to owners."""
        owners = (mine for found in self._owners.values() for mine in found.values())
        return {mine.number: mine.fd for mine in owners if mine.handle is None}

    def drop(self, inode: Inode, owner: int) -> None:
        """FLUSH: a process has closed the object, which releases all its locks."""
        owners = self._owners.get(inode)
        mine = owners.pop(owner, None) if owners else None
        if mine is None:
            return
        self._count -= 1
        if not owners:
            del self._owners[inode]
        self._dropped(inode, mine)

    def _dropped(self, inode: Inode, mine: _Owner) -> None:
        if self.kept is not None:
            self.kept.disowned(mine.number)
        if mine.handle is None:
            self._close(inode, mine.fd)
        else:
            locks.set_lock(mine.fd, Lock(fcntl.F_UNLCK, 0, OFFSET_MAX, 0))
        self.waiters.wake(inode)

    def released(self, handle: Handle) -> None:
        """RELEASE: the handle is about to be closed, its own locks with it."""
        for owner, mine in list(self._owners.get(handle.inode, {}).items()):
            if mine.handle is handle:
                self.drop(handle.inode, owner)

    def close(self) -> None:
        """The guest has disconnected, and its locks end."""
        for step in self.closing():
            step()

    def closing(self) -> Iterator[Callable[[], None]]:
        """The same in steps: for the guest, no owner has locks from now on."""
        left, self._owners = self._owners, {}
        self._count = 0
        return (
            partial(self._dropped, inode, mine)
            for inode, owners in left.items()
            for mine in owners.values()
        )

    def _owner(self, handle: Handle, owner: int, pid: int) -> _Owner:
        owners = self._owners.get(handle.inode, {})
        mine = owners.get(owner)
        if mine is None:
            if self._count >= OWNERS_LIMIT:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            if any(other.handle is handle for other in owners.values()):
                mine = _Owner(0, self._open(handle, handle.flags & os.O_ACCMODE), None, pid)
            else:
                mine = _Owner(0, handle.fd, handle, pid)
            mine.number = next(self._numbers)
            self._owners.setdefault(handle.inode, owners)[owner] = mine
            self._count += 1
        return mine

    def _widen(self, mine: _Owner, handle: Handle) -> None:
        """The owner's description is not open for this type of lock: move to one that is."""
        fd = self._open(handle, os.O_RDWR)
        for lock in locks.held(mine.fd):
            locks.set_lock(mine.fd, lock._replace(kind=fcntl.F_UNLCK))
            locks.set_lock(fd, lock)
        if mine.handle is None:
            self._close(handle.inode, mine.fd)
        mine.fd, mine.handle = fd, None

    def _open(self, handle: Handle, mode: int) -> int:
        """Another description of the handle's file, whose OPEN event belongs to no party. Raises
        OSError: ENOLCK if the guest may have no more descriptors.
        """
        if not self._has_room():
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        inode = handle.inode
        opened = (inode.parent, inode.name, Mask.OPEN), (inode, b"", Mask.OPEN)
        with self._watcher.attributed(SERVER, *opened):
            fd = os.open(syscalls.fd_path(handle.fd), mode | os.O_CLOEXEC)
        self.opened += 1
        return fd

    def _close(self, inode: Inode, fd: int) -> None:
        mask = Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
        closed = (inode.parent, inode.name, mask), (inode, b"", mask)
        self.opened -= 1
        with self._watcher.attributed(SERVER, *closed):
            os.close(fd)

    # flock

    def flock(self, handle: Handle, kind: int) -> None:
        """SETLK with LK_FLOCK. Raises BlockingIOError if a lock conflicts."""
        locks.flock(handle.fd, kind)
        if kind == fcntl.F_UNLCK:
            self.waiters.wake(handle.inode)
