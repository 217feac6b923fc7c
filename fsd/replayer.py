"""The replaying guest: a mount whose agent re-enacts events. Events become orders here.

Rules (DESIGN 2.2): an event is replayed once though the host queue has it twice (by name in the
directory and nameless on the file); DELETE_SELF and MOVE_SELF follow by the guest kernel's own
rules; an OPEN waits until it is known how the file was opened.
"""

from __future__ import annotations

import itertools
import stat
import time
from collections import deque
from collections.abc import Iterator

from protocol import frames
from protocol.frames import ALIAS, FSD_DIR, STAGING, HelloFlag, Op
from protocol.masks import Mask

from . import openers
from .events import RENAME, Event
from .guests import Guest
from .host import RENAME_EXCHANGE
from .inodes import Inode
from .ledger import Ledger, Task
from .passthrough import PassthroughFS
from .watcher import HostWatcher

OPEN_WAIT = 0.05
"""Seconds that an OPEN may wait for what tells reading from writing."""
_CREATE, _DELETE = int(Mask.CREATE), int(Mask.DELETE)
_MOVED_FROM, _MOVED_TO = int(Mask.MOVED_FROM), int(Mask.MOVED_TO)
_OPEN, _MODIFY, _ACCESS = int(Mask.OPEN), int(Mask.MODIFY), int(Mask.ACCESS)
_CLOSE_WRITE, _CLOSE_NOWRITE = int(Mask.CLOSE_WRITE), int(Mask.CLOSE_NOWRITE)
_CLOSE = _CLOSE_WRITE | _CLOSE_NOWRITE
_ATTRIB = int(Mask.ATTRIB)
_TOUCH = _MODIFY | _ACCESS | _ATTRIB
_TWINNED = _TOUCH | _OPEN | _CLOSE
_TWIN_AGE = 1.0
"""Seconds after which an expected twin has been merged or lost: the kernel queues both at once."""
_LOOK_AHEAD = 64
_STAGED = b"x"
"""The one name in the staging directory: each move out replaces the one before."""


class ReplayGuest(Guest):
    """A guest with an agent. Its outbox is held events, then planned tasks, then the ledger."""

    __slots__ = (
        "_closes", "_flags", "_held", "_hint", "_hinted", "_opened", "_outgoing", "_seq", "_table",
        "_tasks", "_twins", "_watcher", "ledger", "pid", "waiting_until",
    )  # fmt: skip

    def __init__(self, name: str, fs: PassthroughFS, watcher: HostWatcher, *, limit: int) -> None:
        super().__init__(name, limit=limit)
        self._table = fs.table
        self._watcher = watcher
        self.ledger = Ledger(fs)
        self.pid = 0  # of the agent's replaying thread; 0 while there is none
        self._flags = HelloFlag(0)
        self._held: deque[tuple[Event, float]] = deque()
        self._closes: dict[Inode, deque[bool]] = {}  # CLOSEs among the held: True = for writing
        self._tasks: deque[Task] = deque()
        self._opened: dict[tuple[Inode, bool], deque[int]] = {}  # orders whose file is open
        self._twins: dict[tuple[Inode, int], tuple[int, float]] = {}
        self._seq = itertools.count(1)
        self._hint = 0
        self._hinted: set[int] = set()  # pids in hints that the agent has not taken up yet
        self._outgoing: deque[frames.Message] = deque()  # hints and results, ahead of orders
        self.waiting_until: float | None = None  # time.monotonic() at which to plan again

    # The agent

    def connect(self, pid: int, hello: frames.Hello) -> None:
        """An agent took the control channel."""
        self.pid, self._flags = pid, HelloFlag(hello.flags)
        self._opened.clear()
        self._hinted.clear()
        self._outgoing.clear()
        self.counts["agent_connects"] += 1

    def disconnect(self) -> None:
        """The agent is gone: what it had not executed waits for the next one."""
        self.pid = 0
        self._settle()
        self._tasks.extendleft(reversed(self.ledger.abandon()))

    def hint(self, pid: int) -> int:
        """Have the agent read the marks of a process; returns the number of the latest hint."""
        if pid not in self._hinted:
            self._hint += 1
            self._hinted.add(pid)
            self.send(frames.Hint(self._hint, pid))
        return self._hint

    def scan_begun(self) -> None:
        """The agent reads marks from now on: later look-ups need a hint of their own."""
        self._hinted.clear()

    def send(self, message: frames.Message) -> None:
        """Queue a message that is no order."""
        self._outgoing.append(message)
        self.wake()

    @property
    def has_outgoing(self) -> bool:
        """Whether ``take`` would return something."""
        return bool(self._outgoing or self._tasks)

    def take(self, limit: int) -> list[frames.Message]:
        """The next messages for the agent, which has executed all it was given before."""
        self.ledger.finish()
        self._settle()
        messages: list[frames.Message] = []
        while self._outgoing and len(messages) < limit:
            messages.append(self._outgoing.popleft())
        while self._tasks and len(messages) < limit:
            task = self._tasks.popleft()
            self.ledger.add(task)
            messages.append(task.order)
        return messages

    def acknowledge(self, seq: int, errno: int) -> Event | None:
        """The agent reports an order; returns the event that could not be replayed, if so."""
        task = self.ledger.failed(seq) if errno else None
        self._settle()
        if task is None or task.event is None:
            return None
        self.counts["failed"] += 1
        self.counts[f"failed.{Op(task.order.op).name.lower()}"] += 1
        return task.event

    def _settle(self) -> None:
        for task in self.ledger.done:
            if task.event is not None:
                self.delivered(task.event.mask, task.event.stamp)
        self.ledger.done.clear()

    # Events in

    @property
    def depth(self) -> int:
        """Events and orders queued."""
        return len(self._held) + len(self._tasks) + len(self.ledger)

    def enqueue(self, event: Event, halves: int) -> None:
        """Queue an event to be planned, in order."""
        kind = event.kind
        if not event.name:
            if not kind & _TWINNED or self._is_twin(event):
                return
            event.child = event.node
        assert event.child is not None
        if event.name and kind & _TWINNED:
            self._expect_twin(event.child, kind, event.stamp)
        if event.replaced is not None:
            # Its lost link is announced on the object itself; the guest's kernel does so too.
            self._expect_twin(event.replaced, _ATTRIB, event.stamp)
            event.replaced = self._pinned(event.replaced)
        event.child = self._pinned(event.child)
        if kind & _CLOSE:
            self._closes.setdefault(event.child, deque()).append(bool(kind & _CLOSE_WRITE))
        self._held.append((event, time.monotonic() + OPEN_WAIT))
        self.plan()

    def _pinned(self, inode: Inode) -> Inode:
        inode = self._table.revive(inode)
        self._table.pin(inode)
        return inode

    def _expect_twin(self, inode: Inode, kind: int, stamp: float) -> None:
        if int(self._watcher.mask_of(inode)) & kind:
            count, _ = self._twins.get((inode, kind), (0, 0.0))
            self._twins[inode, kind] = (count + 1, stamp)

    def _is_twin(self, event: Event) -> bool:
        """Whether the nameless event repeats a named one that is replayed already."""
        count, stamp = self._twins.pop((event.node, event.kind), (0, 0.0))
        if not count or event.stamp - stamp > _TWIN_AGE:
            return False
        if count > 1:
            self._twins[event.node, event.kind] = (count - 1, stamp)
        self.counts["coalesced"] += 1
        return True

    # Planning

    def plan(self) -> None:
        """Make orders of the held events, up to an OPEN of which too little is known yet."""
        self.waiting_until = None
        while self._held:
            event, deadline = self._held[0]
            writing = False
            if event.kind & _OPEN and event.child is not None and not event.child.is_dir:
                known = self._opened_for_writing(event.child)
                if known is None:
                    if time.monotonic() < deadline:
                        self.waiting_until = deadline
                        return
                    known = openers.is_open_for_writing(*event.child.identity[:2])
                writing = known
            self._held.popleft()
            self._tasks.extend(self._orders(event, writing))
            for inode in (event.child, event.replaced):
                if inode is not None:
                    self._table.unpin(inode)
        self.wake()

    def _opened_for_writing(self, inode: Inode) -> bool | None:
        """How the file of the OPEN at the head was opened, from what happened to it after."""
        closes = self._closes.get(inode, ())
        already_open = sum(len(self._opened.get((inode, kind), ())) for kind in (False, True))
        if len(closes) > already_open:
            return closes[already_open]
        for later, _ in itertools.islice(self._held, 1, _LOOK_AHEAD):
            if later.child is inode:
                if later.kind & _MODIFY:
                    return True
                if later.kind & _ACCESS:
                    return False
        return None

    def _orders(self, event: Event, writing: bool) -> Iterator[Task]:
        kind, child = event.kind, event.child
        assert child is not None
        if kind == RENAME:
            yield self._rename(event, child)
        elif kind & _MOVED_FROM:
            yield self._task(event, Op.RENAME, child, to=(STAGING, 0, _STAGED))
        elif kind & _MOVED_TO:
            yield self._task(event, Op.RENAME, child, at=(STAGING, 0, _STAGED), to=_place(event))
        elif kind & _CREATE:
            yield self._task(event, Op.CREATE, child)
        elif kind & _DELETE:
            yield self._task(event, Op.REMOVE, child)
        elif kind & _TOUCH:
            yield self._task(event, Op.TOUCH, child, arg=kind & _TOUCH)
        elif child.kind in (stat.S_IFREG, stat.S_IFDIR):
            # An open of a FIFO or a device would make the agent its peer.
            if kind & _OPEN:
                yield self._open(event, child, writing)
            elif kind & _CLOSE:
                yield from self._close(event, child, bool(kind & _CLOSE_WRITE))

    def _rename(self, event: Event, child: Inode) -> Task:
        assert event.node2 is not None
        flags = RENAME_EXCHANGE if event.exchanged else 0
        to = (event.node2.nodeid, event.node2.generation, event.name2)
        return self._task(event, Op.RENAME, child, to=to, arg=flags)

    def _open(
        self, event: Event | None, child: Inode, writing: bool, at: _Place | None = None
    ) -> Task:
        task = self._task(event, Op.OPEN, child, at=at, arg=int(writing))
        self._opened.setdefault((child, writing), deque()).append(task.order.seq)
        return task

    def _close(self, event: Event, child: Inode, writing: bool) -> Iterator[Task]:
        kinds = self._closes[child]
        kinds.popleft()
        if not kinds:
            del self._closes[child]
        key = (child, writing)
        if not self._opened.get(key):  # opened before anybody was interested
            yield self._open(None, child, writing, _place(event))
        seq = self._opened[key].popleft()
        if not self._opened[key]:
            del self._opened[key]
        yield self._task(event, Op.CLOSE, child, arg=seq)

    def _task(
        self,
        event: Event | None,
        op: Op,
        child: Inode,
        *,
        at: _Place | None = None,
        to: _Place = (0, 0, b""),
        arg: int = 0,
    ) -> Task:
        nodeid, generation, name = at or _place(event)
        target = event.replaced if event is not None and op == Op.RENAME else None
        for inode in (child, target):
            if inode is not None:
                self._table.pin(inode)
        by_path = bool(self._flags & HelloFlag.BY_PATH)
        order = frames.Order(
            next(self._seq), op, child.kind, 0, nodeid, generation, to[0], to[1], arg, name, to[2],
            self._path(nodeid) if by_path else b"", self._path(to[0]) if by_path else b"",
        )  # fmt: skip
        return Task(order, child, event, target, event.nlink if event is not None else 1)

    def _path(self, nodeid: int) -> bytes:
        return self._table.get(nodeid).path() if 0 < nodeid < FSD_DIR else b""


_Place = tuple[int, int, bytes]


def _place(event: Event | None) -> _Place:
    """Where an order acts: the name; the directory itself; or a file apart from any name."""
    assert event is not None
    node = event.node
    if event.name or node.is_dir:
        return node.nodeid, node.generation, event.name
    return ALIAS, 0, b"%d" % node.nodeid
