"""Orders: an event as the system calls that the agent makes for it, and what it has open.

Apart from the mount guest, which decides when an event is ready for that. An event is replayed once
though the host queue has it twice (by name in the directory and without a name on the file).
DELETE_SELF and MOVE_SELF are made by the guest's kernel if the resolver says so; otherwise they are
replayed out of sight.
"""

from __future__ import annotations

import itertools
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from protocol import frames
from protocol.frames import ALIAS, FSD_DIR, STAGING, Op
from protocol.masks import Mask

from ..events.event import RENAME, Event
from ..files.inode import Inode
from ..files.table import InodeTable
from ..linux.syscalls import RENAME_EXCHANGE
from .ledger import Task, Way

_CREATE, _DELETE = int(Mask.CREATE), int(Mask.DELETE)
_MOVED_FROM, _MOVED_TO = int(Mask.MOVED_FROM), int(Mask.MOVED_TO)
_OPEN, _MODIFY, _ACCESS = int(Mask.OPEN), int(Mask.MODIFY), int(Mask.ACCESS)
_CLOSE_WRITE = int(Mask.CLOSE_WRITE)
_CLOSE = _CLOSE_WRITE | int(Mask.CLOSE_NOWRITE)
_DELETE_SELF, _MOVE_SELF = int(Mask.DELETE_SELF), int(Mask.MOVE_SELF)
_TOUCH = _MODIFY | _ACCESS | int(Mask.ATTRIB)

_Place = tuple[int, int, bytes]
_NOWHERE: _Place = (0, 0, b"")
_STAGED: _Place = (STAGING, 0, b"x")
"""The only name for files in the staging directory: each move out replaces the previous one. A
directory keeps a name of its own, so that later events in it can be replayed."""


LATE_LIMIT = 4096
"""Files that the agent could not open because it has too many open: each is opened right before its
close. Of more, watchers get a CLOSE without an OPEN."""
CREATED_LIMIT = 32
"""Files that the agent may have open for it to keep one open that it creates or modifies: for the
former it has room beyond its limit (guest_tools/agent/replayer.py)."""


class _Open(NamedTuple):
    """A file that the agent has open: which order opened it (0: it could not), under which name.
    ``called``: for an event of its own, by a name that nobody watches.
    """

    seq: int
    node: Inode
    name: bytes
    called: Called | None = None

    def renamed(self, old: tuple[Inode, bytes], new: tuple[Inode, bytes]) -> _Open:
        """The same after a replayed rename."""
        if (self.node, self.name) == old:
            return _Open(self.seq, *new)
        return self._replace(called=Called(*new)) if self.called == old else self


class Called(NamedTuple):
    """The name under which the event of a file's own mark is replayed, which fanotify groups
    report.
    """

    parent: Inode
    name: bytes

    @property
    def place(self) -> _Place:
        """The place of an order."""
        return self.parent.nodeid, self.parent.generation, self.name


class Held(NamedTuple):
    """An event to be planned, with time.monotonic() of its arrival and the ways to its places."""

    event: Event
    arrived: float
    way: Way
    way2: Way
    pinned: tuple[Inode, ...]
    cost: int
    position: int
    called: Called | None


class Orders:
    """Of one mount guest. ``asks`` returns the events that its marks on an inode, or on all, ask
    for.
    """

    __slots__ = ("_asks", "_late", "_opened", "_seq", "_table")

    def __init__(self, table: InodeTable, asks: Callable[[Inode | None], Mask]) -> None:
        self._table = table
        self._asks = asks
        self._seq = itertools.count(1)
        self._opened: dict[tuple[Inode, bool], list[_Open]] = {}
        self._late = 0  # of them, that the agent could not open

    def clear(self) -> None:
        """The agent has nothing open: it is a new one, or gone."""
        self._opened.clear()
        self._late = 0

    def count(self, inode: Inode, writing: bool) -> int:
        """How often a file is open so, as far as watchers know."""
        return len(self._opened.get((inode, writing), ()))

    def of(
        self,
        held: Held,
        opens: list[bool],
        *,
        lone_closes: bool = False,
        keeps_open: bool = False,
    ) -> Iterator[Task]:
        """The orders of an event, with what the ledger answers them by. ``opens``: for an OPEN, an
        item for each open that it stands for, True = for writing. ``lone_closes``: the agent can
        make them. ``keeps_open``: it keeps a file open that it creates or modifies, until the CLOSE
        that is known to come.
        """
        event = held.event
        kind, child = event.kind, event.child
        flags = RENAME_EXCHANGE if event.exchanged else 0
        assert child is not None
        if kind == RENAME:
            assert event.node2 is not None
            to = (event.node2.nodeid, event.node2.generation, event.name2)
            yield self._task(held, Op.RENAME, child, to=to, arg=flags)
            old, new = (event.node, event.name), (event.node2, event.name2)
            self._reopen_as(child, old, new)
            if event.exchanged and event.replaced is not None:
                self._reopen_as(event.replaced, new, old)
        elif kind & _MOVED_FROM:
            out = _out_of_sight(child, b"") if child.is_dir else _STAGED
            yield self._task(held, Op.RENAME, child, to=out)
        elif kind & _MOVED_TO:
            turned = held._replace(way=(), way2=held.way)
            yield self._task(turned, Op.RENAME, child, at=_STAGED, to=_place(event), arg=flags)
        elif kind & _CREATE:
            away = _out_of_sight(child, b"") if child.is_dir else _NOWHERE
            task = self._task(held, Op.CREATE, child, to=away, arg=int(keeps_open))
            if keeps_open:
                self._note_open(held, child, task)
            yield task
        elif kind & (_DELETE | _DELETE_SELF):
            yield self._task(held, Op.REMOVE, child)
        elif kind & _MOVE_SELF:
            yield self._task(
                held, Op.RENAME, child, at=_out_of_sight(child, b""), to=_out_of_sight(child, b"+")
            )
        elif kind & _TOUCH:
            if keeps_open:
                yield self._open(held, child, writing=True)
            yield self._touch(held, child)
        elif kind & _OPEN:
            yield from (self._open(held, child, writing) for writing in opens)
        elif kind & _CLOSE:
            yield from self._close(held, child, bool(kind & _CLOSE_WRITE), lone_closes)

    def _touch(self, held: Held, child: Inode) -> Task:
        bits = held.event.kind & _TOUCH
        through = (0, 0, b"")
        if bits in (_MODIFY, _ACCESS):
            # Through what the agent has open, without a look-up. If that lost the name, so has its
            # descriptor: IN_EXCL_UNLINK goes by that.
            place = (held.event.node, held.event.name)
            files = self._opened.get((child, bits == _MODIFY), ())
            seq = next((file.seq for file in files if (file.node, file.name) == place), 0)
            apart = held.event.unlinked and not seq and self._is_apart(held.event, child)
            through = (seq, int(apart), b"")
        return self._task(held, Op.TOUCH, child, to=through, arg=bits)

    def _is_apart(self, event: Event, child: Inode) -> bool:
        """Whether the file may be opened for an event, because no watcher sees that, nor the
        name.
        """
        marks = self._asks(event.node) | self._asks(child) | self._asks(None)
        return not marks & (_OPEN | _CLOSE) and event.name not in event.node.children

    def _open(self, held: Held, child: Inode, writing: bool) -> Task:
        task = self._opening(held, child, writing)
        self._note_open(held, child, task)
        return task

    def _note_open(self, held: Held, child: Inode, task: Task) -> None:
        opened = _Open(task.order.seq, held.event.node, held.event.name, held.called)
        self._opened.setdefault((child, bool(task.order.arg)), []).append(opened)

    def may_keep_open(self, event: Event) -> bool:
        """Whether a file may be open from its CREATE or MODIFY on: no watcher sees that. Not one
        with several names, whose CLOSE may come by another.
        """
        child = event.child
        if child is None or child.kind != stat.S_IFREG or child.nlink > 1:
            return False
        if len(self._opened) >= CREATED_LIMIT:
            return False
        if (child, True) in self._opened or (child, False) in self._opened:
            return False
        return not (self._asks(event.node) | self._asks(child) | self._asks(None)) & _OPEN

    def _opening(self, held: Held, child: Inode, writing: bool) -> Task:
        # Opening a real FIFO or device would make the agent its peer: a file stands in for it.
        file = child
        if child.kind not in (stat.S_IFREG, stat.S_IFDIR):
            file = self._stand_in(held.event, stat.S_IFREG)
        return self._task(held, Op.OPEN, file, arg=int(writing))

    def not_opened(self, event: Event, order: frames.Order) -> None:
        """The agent could not open it: it is opened right before its close, if possible then."""
        assert event.child is not None
        key = (event.child, bool(order.arg))
        files = self._opened.pop(key, [])
        for file in [file for file in files if file.seq == order.seq]:
            files.remove(file)
            if self._late < LATE_LIMIT:
                self._late += 1
                files.append(file._replace(seq=0))
        if files:
            self._opened[key] = files

    def _reopen_as(self, child: Inode, old: tuple[Inode, bytes], new: tuple[Inode, bytes]) -> None:
        """An open file is closed under the name that it has by then."""
        for writing in (False, True):
            files = self._opened.get((child, writing), [])
            files[:] = [file.renamed(old, new) for file in files]

    def _stand_in(self, event: Event, kind: int) -> Inode:
        return self._table.placeholder(kind, event.node, event.name)

    def _close(self, held: Held, child: Inode, writing: bool, lone_closes: bool) -> Iterator[Task]:
        place = (held.event.node, held.event.name)
        key = (child, writing)
        if place not in self._places(key):  # the name stood for another object by then
            keys = (k for k in self._opened if k[1] == writing and place in self._places(k))
            other = next(keys, None)
            if other is not None and key not in self._opened:
                key = other
            elif other is not None and held.event.has_self:
                # Opened separately, under the name and as itself.
                yield self._task(held, Op.CLOSE, child, arg=self._closed(other, place))
        seq = 0
        if key in self._opened:
            if lone_closes and self._came_into_sight(held.event, child, writing):
                yield self._lone_close(held, child, writing)  # by name, which comes first
            seq = self._closed(key, place)
        elif lone_closes and self._closes_alone(held.event, child):
            yield self._lone_close(held, child, writing)
            return
        if not seq:
            yield (opening := self._opening(held, child, writing))
            seq = opening.order.seq
        yield self._task(held, Op.CLOSE, child, arg=seq)

    def _closes_alone(self, event: Event, child: Inode) -> bool:
        """Whether a CLOSE has to be replayed without an OPEN, as watchers would see that, and can
        be. For a file that is by a FIFO under its name: a mark on the file would get nothing, and a
        program that has it open would lose the name.
        """
        own = self._asks(child)
        if not (own | self._asks(event.node) | self._asks(None)) & _OPEN:
            return False
        return child.is_dir or not (own & (_OPEN | _CLOSE) or child.open_fds)

    def _came_into_sight(self, event: Event, child: Inode, writing: bool) -> bool:
        """Whether a file with a mark was opened as itself, as nobody watched its name, and is
        closed by a name that somebody watches: what the agent has open has no such name.
        """
        if not event.name or child.is_dir or child.open_fds:
            return False
        place = (event.node, event.name)
        files = self._opened.get((child, writing), ())
        by_name = any(file.name or file.called == place or not file.seq for file in files)
        return bool(files) and not by_name and bool(self._asks(event.node) & event.kind)

    def _lone_close(self, held: Held, child: Inode, writing: bool) -> Task:
        file = child if child.is_dir else self._stand_in(held.event, stat.S_IFIFO)
        event = held.event
        has_lost = event.unlinked or child.is_placeholder  # its name, which IN_EXCL_UNLINK goes by
        to = (0, int(has_lost and event.name not in event.node.children), b"")
        return self._task(held, Op.LONE_CLOSE, file, to=to, arg=int(writing))

    def _closed(self, key: tuple[Inode, bool], place: tuple[Inode, bytes]) -> int:
        """The order that opened it: of several links of one file, the one under this name."""
        places = self._places(key)
        seq = self._opened[key].pop(places.index(place) if place in places else 0).seq
        self._late -= not seq
        if not self._opened[key]:
            del self._opened[key]
        return seq

    def called(self, event: Event) -> Called | None:
        """The name of a file that is known only by its mark, if it has exactly one and its
        directory has no watcher: an ATTRIB upon a new link is reported for the file only.
        """
        node, parent = event.node, event.node.parent
        if event.name or node.kind != stat.S_IFREG or node.is_placeholder or node.nlink != 1:
            return None
        if parent is None or parent.nodeid >= FSD_DIR or parent.children.get(node.name) is not node:
            return None
        return None if self._asks(parent) or self._asks(None) else Called(parent, node.name)

    def _places(self, key: tuple[Inode, bool]) -> list[tuple[Inode, bytes]]:
        return [(file.node, file.name) for file in self._opened.get(key, ())]

    def _task(
        self,
        held: Held,
        op: Op,
        child: Inode,
        *,
        at: _Place | None = None,
        to: _Place = _NOWHERE,
        arg: int = 0,
    ) -> Task:
        event = held.event
        nodeid, generation, name = at or _place(event)
        if held.called is not None and op in (Op.TOUCH, Op.OPEN):
            nodeid, generation, name = held.called.place
        lost = held.way and held.way[-1].parent == STAGING
        if at is None and not event.name and event.node.is_dir and lost:
            # Not if the guest's kernel has it, whose parent's watchers would see this.
            nodeid, generation, name = _out_of_sight(event.node, b"")
        target = event.replaced if op == Op.RENAME else None
        if target is child:  # two links of one file: the kernel would do nothing
            exchanged = event.exchanged
            target = self._table.placeholder(child.kind, None, b"") if exchanged else None
        pinned = (*held.pinned, child) if target is None else (*held.pinned, child, target)
        for inode in pinned:
            self._table.pin(inode)
        order = frames.Order(
            next(self._seq), op, child.kind, nodeid, generation, to[0], to[1], arg, name, to[2],
            _path(held.way), _path(held.way2),
        )  # fmt: skip
        counted = None if op == Op.OPEN and not event.kind & _OPEN else event
        way = held.way + held.way2
        position = held.position
        return Task(order, child, counted, target, event.nlink, way, pinned, position=position)


def _path(way: Way) -> bytes:
    return b"/".join([step.name for step in way]) if way else b""


def _out_of_sight(inode: Inode, suffix: bytes) -> _Place:
    return STAGING, 0, b"%d" % inode.nodeid + suffix


def _place(event: Event) -> _Place:
    """The place of an order: the name; the object itself; or a file separately, without a name."""
    node = event.node
    if event.kind & _DELETE_SELF and node.is_dir:
        return _out_of_sight(node, b"")
    if event.name or node.is_dir:
        return node.nodeid, node.generation, event.name
    return ALIAS, 0, b"%d" % node.nodeid
