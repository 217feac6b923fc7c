"""The nodes that one guest's kernel holds, and the entries and attributes that it gets.

A guest can use only nodes that it has looked up itself, and can return only those: all guests of an
export share the table of inodes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from protocol import fuse
from protocol.frames import FSD_DIR, FSD_NAME

from ..cache.coherent import DAY, CoherentCache
from ..files.attributes import StatLike
from ..files.caller import Caller
from ..files.forgotten import FORGOTTEN_LIMIT
from ..files.inode import ROOT_ID, Inode
from ..files.passthrough import Entry
from .operations import Operations
from .record import SessionRecord

NODES_LIMIT = 1 << 21
"""Nodes that one guest may hold, about 1.5 GB of memory. Beyond it a look-up gets ENFILE."""
REPLAYER_TIMEOUT_NS = 10_000_000
"""How long a directory's attributes are valid for the replayer, and those of a file that it opens:
else its kernel asks at every step. A change of a directory is replayed, which makes the kernel ask
again; those of the file are taken back once it is open (MountGuest)."""
WATCHED_TIMEOUT = 3600
"""The same in seconds for a directory with a host watch, where the kernel is notified of
changes (docs/decisions/timeouts.md)."""
_SECOND = 10**9
_BITS32 = 0xFFFF_FFFF
_STATX_BASIC, _STATX_BTIME = 0x7FF, 0x800


@dataclass(frozen=True)
class Caching:
    """What the guest's kernel may cache, and how long (docs/decisions/caching.md)."""

    entry_timeout: float = 0.0
    attr_timeout: float = 0.0
    keep_data: bool = False
    """File data outlives the close."""
    keep_listings: bool = False
    direct_io: bool = False
    """File data is never cached."""

    @property
    def keeps_attributes(self) -> bool:
        """Whether names or attributes are valid for any time at all."""
        return bool(self.entry_timeout or self.attr_timeout)


_DAY = 86400.0
CACHE_MODES = {
    "never": Caching(direct_io=True),
    "metadata": Caching(_DAY, _DAY, direct_io=True, keep_listings=True),
    "auto": Caching(1.0, 1.0),
    "always": Caching(_DAY, _DAY, keep_data=True, keep_listings=True),
}
"""The modes of virtiofsd, by their names in its --cache."""


class Nodes:
    """One guest's references on the export's inodes."""

    def __init__(
        self,
        operations: Operations,
        caching: Caching,
        *,
        submounts: bool,
        limit: int = NODES_LIMIT,
        kept: SessionRecord | None = None,
        is_local: bool = False,
        takes_back: bool = False,
        cache: CoherentCache | None = None,
    ) -> None:
        """``takes_back``: attributes that the kernel keeps can be withdrawn. ``cache``: and all
        else, so ``caching`` does not matter.
        """
        self._operations = operations
        self._table = operations.export.table
        self._entry_timeout = divmod(round(caching.entry_timeout * _SECOND), _SECOND)
        self._attr_timeout = divmod(round(caching.attr_timeout * _SECOND), _SECOND)
        self._cached = caching.keeps_attributes
        self._submounts = submounts
        self._limit = limit
        self._kept = kept
        self._held: dict[int, int] = {}  # nodeid -> its lookup count
        self._pinned: set[int] = set()  # of which the table keeps a descriptor
        if kept is not None:
            self._table.on_moved.append(self._moved)
        self._forgotten: OrderedDict[int, None] = OrderedDict()  # held once, the oldest first
        self._is_local = is_local
        self._takes_back = takes_back
        self._cache = cache
        operations.guest.serve(
            self, keeps_names=cache is not None or self._entry_timeout != (0, 0), cache=cache
        )

    def __len__(self) -> int:
        return len(self._held)

    def closing(self) -> Iterator[Callable[[], None]]:
        """Steps that return everything. The guest holds nothing from now on."""
        held, self._held = self._held, {}
        self._pinned.clear()
        self._operations.handles.pinned = 0
        return (partial(self._operations.forget, *node) for node in held.items())

    def end(self) -> None:
        """The session is over."""
        if self._kept is not None:
            self._table.on_moved.remove(self._moved)

    def _moved(self, inode: Inode) -> None:
        count = self._held.get(inode.nodeid)
        if count and self._kept is not None:
            self._kept.node(self._table, inode, count)

    def check(self, nodeid: int) -> None:
        """Raises OSError ESTALE for a node that the guest does not hold."""
        if nodeid not in self._held and nodeid != ROOT_ID:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def check_handle(self, nodeid: int) -> None:
        """The same for the node of a file handle: the guest may have forgotten it since."""
        if nodeid not in self._forgotten and not self._is_local:
            self.check(nodeid)

    def check_room(self) -> None:
        """Raises OSError ENFILE if the guest may hold no more nodes."""
        if self.is_full:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    @property
    def is_full(self) -> bool:
        """Whether the guest holds as many nodes as it may."""
        if len(self._held) >= self._limit:
            return True
        return bool(self._pinned) and not self._operations.handles.has_room()

    def forget(self, nodeid: int, count: int) -> None:
        """FORGET: at most what the guest holds."""
        held = self._held.get(nodeid, 0)
        count = min(held, count)
        if not count:
            return
        if count == held:
            del self._held[nodeid]
            if self._cache is not None:
                self._cache.forget(nodeid)
            if nodeid in self._pinned:
                self._pinned.remove(nodeid)
                self._operations.handles.pinned -= 1
            self._forgotten[nodeid] = None
            if len(self._forgotten) > FORGOTTEN_LIMIT:
                self._forgotten.popitem(last=False)
        else:
            self._held[nodeid] = held - count
        if self._kept is not None:
            self._kept.forgotten(nodeid, held - count)
        self._operations.forget(nodeid, count)

    def hold(self, inode: Inode) -> Callable[[], None]:
        """Record a reference that the core has counted already. Returns a function that drops
        it.
        """
        nodeid = inode.nodeid
        count = self._held[nodeid] = self._held.get(nodeid, 0) + 1
        if inode.fd >= 0:
            self._pin(inode)
        if self._kept is not None:
            self._kept.node(self._table, inode, count)
        return lambda: self.forget(nodeid, 1)

    def _pin(self, inode: Inode) -> None:
        if inode.nodeid not in self._pinned and inode.nodeid != ROOT_ID:
            self._pinned.add(inode.nodeid)
            self._operations.handles.pinned += 1

    # A server's restart

    def saved(self) -> dict[int, int]:
        """Lookup counts by nodeid, for the next server."""
        return dict(self._held)

    def restore(self, held: Mapping[int, int], inodes: Mapping[int, Inode]) -> None:
        """Take over what the guest's kernel holds, as ``saved`` by the previous server and found
        again by fsd.checkpoint.restore_inodes. Raises ValueError for impossible values.
        """
        for nodeid, count in held.items():
            if nodeid >= FSD_DIR:
                self._held[nodeid] = count
                continue
            if nodeid not in inodes or count < 1 or self.is_full:
                raise ValueError(f"{count} references on nodeid {nodeid}")
            if nodeid != ROOT_ID:
                inodes[nodeid].lookups += count
                self._held[nodeid] = self._held.get(nodeid, 0) + count
                if inodes[nodeid].fd >= 0:
                    self._pin(inodes[nodeid])

    # Replies

    def entry(self, who: Caller, entry: Entry, parent: int, name: bytes) -> bytes:
        """struct fuse_entry_out of a node found in or added to the directory ``parent``; without a
        name if it has none there.
        """
        inode, attr = entry
        seconds = nanoseconds = attr_seconds = attr_nanoseconds = 0
        if self._operations.access.is_replayer(who):
            if parent < FSD_DIR:  # else users may look at it next
                attr_seconds, attr_nanoseconds = self._replayer_timeout(inode, attr)
        elif not (self.is_watched_node(parent) or self.is_watched_node(inode.nodeid)):
            if self._cache is not None:
                if name and self._cache.keeps_name(self._table.get(parent), name, inode.nodeid):
                    seconds = DAY
                if self._cache.keeps_attributes(inode, attr):
                    attr_seconds = DAY
            elif self._cached:
                seconds, nanoseconds = self._entry_timeout
                attr_seconds, attr_nanoseconds = self._attr_timeout
        flags = 0
        if self._submounts and self._is_mountpoint(inode, parent):
            flags = fuse.ATTR_SUBMOUNT
        return fuse.ENTRY_OUT.pack(
            inode.nodeid, inode.generation, seconds, attr_seconds, nanoseconds, attr_nanoseconds
        ) + self._attr(inode, attr, flags)

    def no_entry(self, who: Caller, parent: int, name: bytes) -> bytes | None:
        """The same of a name that does not exist, if the kernel may keep that."""
        if self._cache is None or parent >= FSD_DIR or self._operations.access.is_replayer(who):
            return None
        if self.is_watched_node(parent) or (parent == ROOT_ID and name == FSD_NAME):
            return None
        if not self._cache.keeps_missing(self._table.get(parent), name):
            return None
        return fuse.ENTRY_OUT.pack(0, 0, DAY, 0, 0, 0) + bytes(fuse.ATTR.size)

    def looks_into(self, who: Caller, directory: int) -> None:
        """Before a user's look into a directory."""
        if self._cache is None or directory >= FSD_DIR or self._operations.access.is_replayer(who):
            return
        self._cache.prepare(self._table.get(directory))

    def catch_up(self) -> None:
        """Before attributes are read that the kernel may keep."""
        if self._cache is not None:
            self._cache.catch_up()

    def attributes(self, who: Caller, inode: Inode, attr: StatLike) -> bytes:
        """struct fuse_attr_out."""
        seconds, nanoseconds = self._attr_valid(who, inode, attr)
        flags = 0
        if self._submounts and inode.parent and self._is_mountpoint(inode, inode.parent.nodeid):
            flags = fuse.ATTR_SUBMOUNT
        return fuse.ATTR_OUT.pack(seconds, nanoseconds) + self._attr(inode, attr, flags)

    def _attr_valid(self, who: Caller, inode: Inode, attr: StatLike) -> tuple[int, int]:
        """How long attributes without a name are valid: seconds, nanoseconds."""
        if self._operations.access.is_replayer(who):
            return self._replayer_timeout(inode, attr)
        if self._cache is not None:
            keeps = not self.is_watched(inode) and self._cache.keeps_attributes(inode, attr)
            return (DAY if keeps else 0), 0
        return self._attr_timeout if self._cached and not self.is_watched(inode) else (0, 0)

    def _replayer_timeout(self, inode: Inode, attr: StatLike) -> tuple[int, int]:
        operations = self._operations
        if not stat.S_ISDIR(attr.st_mode):
            opens = self._takes_back and operations.guest.ledger.is_opening(inode)
            return 0, (REPLAYER_TIMEOUT_NS if opens else 0)
        if operations.guest.history.is_sought(inode):
            return 0, 0
        if self._takes_back:
            covers = operations.export.watcher.covers_attributes(inode)
            inode.attr_given = attr if covers else None
            if covers:
                return WATCHED_TIMEOUT, 0
        return 0, REPLAYER_TIMEOUT_NS

    def is_watched(self, inode: Inode) -> bool:
        """Whether the guest watches an object, or its directory."""
        parent = inode.parent
        return self.is_watched_node(inode.nodeid) or (
            parent is not None and self.is_watched_node(parent.nodeid)
        )

    def statx(self, who: Caller, inode: Inode, attr: StatLike, born_ns: int) -> bytes:
        """struct fuse_statx_out."""
        valid = self._attr_valid(who, inode, attr)
        times = attr.st_atime_ns, born_ns, attr.st_ctime_ns, attr.st_mtime_ns
        stamps = [part for ns in times for part in divmod(ns, _SECOND)]
        return fuse.STATX_OUT.pack(
            *valid, 0, _STATX_BASIC | (_STATX_BTIME if born_ns else 0), attr.st_blksize, 0,
            attr.st_nlink & _BITS32, attr.st_uid, attr.st_gid, attr.st_mode, self.ino(inode),
            attr.st_size, attr.st_blocks, 0, *stamps,
            os.major(attr.st_rdev), os.minor(attr.st_rdev), 0, 0,
        )  # fmt: skip

    def is_watched_node(self, nodeid: int) -> bool:
        """Whether the guest watches an object itself: then it has to see the new state at each
        event.
        """
        if nodeid >= FSD_DIR:
            return True
        interest, guest = self._operations.export.interest, self._operations.guest
        if not interest.count(guest):
            return False
        return bool(interest.of(guest, self._table.get(nodeid)) or interest.of(guest, None))

    def _is_mountpoint(self, inode: Inode, parent: int) -> bool:
        if not inode.is_dir or inode.is_placeholder or parent >= FSD_DIR:
            return False
        return self._mount(inode) != self._mount(self._table.get(parent))

    @staticmethod
    def _mount(inode: Inode) -> tuple[int, int]:
        return inode.identity.mount, inode.identity.device

    def ino(self, inode: Inode) -> int:
        """The st_ino that the guest sees: the host's, if that is unique in the mount. An announced
        mount has a device of its own there.
        """
        if self._submounts and not inode.is_placeholder:
            parent = inode.parent
            if inode.is_dir or parent is None or self._mount(parent) == self._mount(inode):
                return inode.identity.ino
        return inode.number

    def numbering(self, directory: Inode) -> Callable[[bytes, int], int] | None:
        """A function that makes the st_ino that the guest sees from a name and its number in the
        host's listing of a directory; None if they are the same.
        """
        return None if self._submounts else self._table.numbering(directory)

    def _attr(self, inode: Inode, attr: StatLike, flags: int) -> bytes:
        atime, atime_ns = divmod(attr.st_atime_ns, _SECOND)
        mtime, mtime_ns = divmod(attr.st_mtime_ns, _SECOND)
        ctime, ctime_ns = divmod(attr.st_ctime_ns, _SECOND)
        return fuse.ATTR.pack(
            self.ino(inode), attr.st_size, attr.st_blocks, atime, mtime, ctime,
            atime_ns, mtime_ns, ctime_ns, attr.st_mode, attr.st_nlink & _BITS32, attr.st_uid,
            attr.st_gid, attr.st_rdev & _BITS32, attr.st_blksize, flags,
        )  # fmt: skip
