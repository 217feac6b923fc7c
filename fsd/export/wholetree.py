"""Interest in the whole file system: watches every directory of the tree, and new ones.

Apart from the watches because walking the tree may take long.
"""

from __future__ import annotations

import stat
import time

from protocol.masks import Mask

from ..events.event import HOST, Event
from ..events.watcher import HostWatcher
from ..files.inode import Inode
from ..files.listing import Known, listing, of_inode
from ..files.passthrough import PassthroughFS
from ..linux import syscalls
from ..pacing.chores import Job, OwnChores
from .interest import Interest
from .routing import Router
from .watches import Watches

_CREATE, _ISDIR = int(Mask.CREATE), int(Mask.ISDIR)
_MOVED_TO = int(Mask.MOVED_TO)


class WholeTree:
    """That of one export."""

    def __init__(
        self,
        fs: PassthroughFS,
        watcher: HostWatcher,
        interest: Interest,
        watches: Watches,
        router: Router,
        chores: OwnChores,
    ) -> None:
        self._fs = fs
        self._table = fs.table
        self._watcher = watcher
        self._interest = interest
        self._watches = watches
        self._router = router
        self._chores = chores
        self.uncovered: dict[Inode, bool] = {}
        """Trees to cover once more, and whether to report their files."""
        self._walk: Job[None] | None = None  # brings the watches of the tree in line

    @property
    def is_arming(self) -> bool:
        """Whether the watches of the tree are still to be brought in line."""
        return self._walk is not None

    def bring_in_line(self, mask: Mask) -> None:
        """Interest in the whole file system has changed. There is only ever one walk, the
        latest.
        """
        if self._walk is not None:
            self._walk.close()
        self._walk = job = self._covering_all(mask)
        self._chores.do(job)

    def _covering_all(self, mask: Mask) -> Job[None]:
        try:
            if mask:
                yield from self.covering(self._table.root, announce=False)
                return
            for node in [*self._watcher.inodes(), *self._watches.unwatched]:
                self._watches.set_watch(node)
                yield None
        finally:
            self._walk = None

    def covering(self, top: Inode, *, announce: bool) -> Job[None]:
        """Watch a tree for whole-file-system interest; report files that were in it before the
        watch.
        """
        self._table.pin(top)
        todo = [top]
        try:
            while todo and self._interest.aggregate(None):
                node = todo.pop()
                try:
                    yield from self._covering_one(node, todo, announce=announce)
                finally:
                    self._table.unpin(node)
        finally:
            for node in todo:
                self._table.unpin(node)

    def _covering_one(self, node: Inode, todo: list[Inode], *, announce: bool) -> Job[None]:
        known = set(listing(node).names) if announce else set()
        self._watches.set_watch(node)
        yield None
        if not listing(node).complete:
            yield from self._watches.reading(node)
            if node in self._watches.unwatched:
                self.uncovered[node] = announce
        names = listing(node).names
        if announce:
            wanted = [n for n, entry in names.items() if n not in known or _may_be_dir(entry)]
        else:
            wanted = [n for n, entry in names.items() if _may_be_dir(entry)]
        for name in sorted(wanted):
            entry = names.get(name)
            if entry is None:
                continue  # gone since
            try:
                child = self._fs.peek(node, name).inode
            except OSError as error:
                if not syscalls.is_gone(error):
                    self._watches.look_later(node, error)
                    self.uncovered[node] = announce
                continue
            if announce and name not in known:
                mask = _CREATE | (_ISDIR if child.is_dir else 0)
                event = Event(node, mask, name, 0, HOST, time.monotonic(), child)
                names[name] = of_inode(child)
                self._router.route(event)
            if child.is_dir and child.kind == (entry.kind or child.kind):
                self._table.pin(child)
                todo.append(child)
            else:
                self._table.release(child)
            yield None

    def cover_arrival(self, event: Event, child: Inode) -> Job[None]:
        """Whole-file-system interest extends to a new directory."""
        if event.mask & (_CREATE | _MOVED_TO) and child.is_dir and self._interest.aggregate(None):
            yield from self.covering(child, announce=bool(event.mask & _CREATE))


def _may_be_dir(entry: Known) -> bool:
    return entry.kind in (stat.S_IFDIR, 0)
