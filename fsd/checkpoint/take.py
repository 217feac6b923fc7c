"""Takes the state of an export for the next server, as rows.

Apart from ``restore_inodes`` and ``restore``, which trust none of it.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from protocol.frames import FSD_DIR

from ..events.event import Event
from ..events.missed import CLOCK_LAG_NS
from ..events.sharedwatches import SharedWatches
from ..events.watcher import HostWatcher
from ..files.inode import Identity, Inode
from ..files.listing import Known, Listing
from ..files.saved import SavedTable, inode_table, saved_inode
from ..guests.guest import Guest, HandMarks, Observer
from ..guests.mount import MountGuest
from ..linux import syscalls
from .rows import (
    GuestKind,
    SavedEvent,
    SavedExport,
    SavedGuest,
    SavedMissed,
    SavedName,
)

if TYPE_CHECKING:
    from ..export.export import Export


def take(export: Export, nodes: Mapping[Guest, dict[int, int]] | None = None) -> SavedExport:
    """The state of an export, best after ``Export.settle``: waiting events are found again by
    comparing, without their order.

    ``nodes``: the mounts that continue across the restart, with what their kernels hold; other
    mounts are not saved, because their marks end with them.
    """
    return _Taking(export).take(nodes or {})


def identity_of(export: Export) -> SavedExport:
    """Which directory an image belongs to, and nothing else."""
    table = export.table
    _, ino, handle, _ = table.root.identity
    fsid = os.fstatvfs(table.reach.root_fd).f_fsid
    return SavedExport(export.source, ino, handle, fsid)


class _Taking:
    def __init__(self, export: Export) -> None:
        self._export = export
        self._table = export.table
        self._nodeids = {inode.nodeid: inode for inode in self._table}  # that can be named
        self._delivered_ns = 0  # time of the last delivered change in watched directories
        self._others: dict[Identity, Inode] = {}  # named below, and in the table no more

    def take(self, nodes: Mapping[Guest, dict[int, int]]) -> SavedExport:
        saved = identity_of(self._export)
        saved.saved_ns = time.time_ns()
        watcher = self._export.watcher
        watcher.drain()
        if not watcher.backlog:
            # File times lag: a file made right after this may seem older than it.
            self._delivered_ns = saved.saved_ns - CLOCK_LAG_NS
            self._confirm(watcher)
        for inode in watcher.inodes():
            if SharedWatches.is_real(watcher.wd_of(inode)):
                saved.watches.append((self._name(inode), watcher.wd_of(inode)))
            if inode.listing is not None and inode.listing.complete:
                saved.listed.append(inode.nodeid)
                saved.names += self._listing(inode, inode.listing)
        for guest in self._export.guests:
            if isinstance(guest, HandMarks) or guest in nodes:
                saved.guests.append(self._guest(guest, nodes.get(guest, {})))
            elif isinstance(guest, Observer) and guest.token:
                saved.guests.append(self._guest(guest, {}))
        saved.table = self._inode_table()
        return saved

    def _name(self, inode: Inode | None) -> int:
        """The nodeid for an inode in the image; 0 if it has none."""
        if inode is None:
            return 0
        if self._nodeids.get(inode.nodeid) is inode:
            return inode.nodeid
        inode = self._table.current(inode)
        if inode.nodeid >= FSD_DIR:
            return 0
        if not self._table.holds(inode):
            inode = self._others.get(inode.identity, inode)
            if self._nodeids.setdefault(inode.nodeid, inode) is not inode:
                return 0  # the number stands for another object now
            self._others[inode.identity] = inode
        return inode.nodeid

    def _known(self, node: Inode, name: bytes, known: Known) -> SavedName:
        nodeid = self._name(known.inode)
        return SavedName(self._name(node), name, known.ino, known.kind, known.seen_ns, nodeid)

    def _listing(self, node: Inode, known: Listing) -> Iterator[SavedName]:
        """The names of a directory; for watched ones all events are delivered up to now."""
        told_ns = 0 if node in self._export.watches.unwatched else self._delivered_ns
        for name, entry in known.names.items():
            yield self._known(node, name, entry._replace(seen_ns=max(told_ns, entry.seen_ns)))

    def _confirm(self, watcher: HostWatcher) -> None:
        """All events are delivered, so the object under a name is the current one: in a storm the
        server may have taken it for another.
        """
        try:
            right = [
                (node.listing, self._looked_at(node, node.listing))
                for node in watcher.inodes()
                if node.listing is not None and node.listing.complete
            ]
        except OSError:
            return  # it could not be looked at
        watcher.drain()
        if watcher.backlog:
            return  # some of it may be newer than the delivered events
        for known, names in right:
            known.names.update(names)
        self._export.confirmed_ns = self._delivered_ns

    def _looked_at(self, node: Inode, known: Listing) -> dict[bytes, Known]:
        since = self._export.confirmed_ns
        names = {name: entry for name, entry in known.names.items() if entry.seen_ns > since}
        if not names:
            return {}
        with syscalls.skipping_gone, self._table.reach.directory(node) as dir_fd:
            return {name: _as_it_is(dir_fd, name, entry) for name, entry in names.items()}
        return {}

    def _guest(self, guest: Guest, nodes: dict[int, int]) -> SavedGuest:
        kind = GuestKind.MOUNT
        saved = SavedGuest(kind, guest.name, events=int(guest.events), nodes=nodes)
        if isinstance(guest, Observer):
            saved.kind, saved.token, saved.sent = GuestKind.OBSERVER, guest.token, guest.sent
            saved.outbox = guest.undelivered()
        elif isinstance(guest, MountGuest):
            waiting = [*guest.undelivered(), *self._export.arming.held(guest)]
            events = (self._event(event) for event in waiting)
            saved.held = [event for event in events if event.node]
        else:
            saved.kind = GuestKind.BY_HAND
            if guest.via is not None:
                saved.name = guest.via.name
        for inode, mask in self._export.interest.marks(guest).items():
            if inode is None or self._name(inode):
                saved.marks.append((self._name(inode), int(mask)))
        for (node, name), missed in guest.missed.items():
            if not self._name(node):
                continue
            before = missed.before and self._known(node, name, missed.before)
            saved.missed.append(SavedMissed(self._name(node), name, missed.mask, before))
        return saved

    def _event(self, event: Event) -> SavedEvent:
        return SavedEvent(
            self._name(event.node), event.mask, event.name, event.cookie, self._name(event.child),
            event.nlink, self._name(event.node2), event.name2, self._name(event.replaced),
            event.has_self, event.exchanged,
        )  # fmt: skip

    def _inode_table(self) -> SavedTable:
        table = self._table
        saved = inode_table(table)
        saved.inodes.extend(saved_inode(table, inode) for inode in self._others.values())
        return saved


def _as_it_is(dir_fd: int, name: bytes, known: Known) -> Known:
    """The current entry of a name. Raises OSError if it cannot be looked at."""
    with syscalls.skipping_gone:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        handle = known.inode.identity.handle if known.inode is not None else b""
        is_same = not handle or syscalls.file_handle(dir_fd, name) == handle
        now = Known(status.st_ino, stat.S_IFMT(status.st_mode), known.seen_ns)
        return known if is_same and known.may_be(now) else now
    return known
