"""The ledger: the orders of the replayer, and the answers to the requests that they cause.

The agent makes one real system call per order. The requests of that call are answered from the
order at the head, *as of the event*, and touch nothing on the host. Any other request of the
replayer gets EACCES (the safety rule, docs/protocol.md).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protocol import frames
from protocol.frames import ALIAS, FSD_DIR, Op
from protocol.masks import Mask

from ..events.event import Event
from ..files.attributes import StatLike, placeholder_attr, with_nlink
from ..files.inode import Inode
from ..files.passthrough import Entry, PassthroughFS
from ..linux import syscalls


class Step(NamedTuple):
    """One look-up on the way from the root to a directory."""

    parent: int  # nodeid
    name: bytes
    inode: Inode


Way = tuple[Step, ...]
Ways = tuple[Way, Way]
"""To both places of a rename; otherwise the second is empty."""


@dataclass(slots=True, eq=False)
class Task:
    """An order with what its answers need. ``event`` is None for orders of the server's own (a
    close).
    """

    order: frames.Order
    child: Inode
    event: Event | None = None
    target: Inode | None = None  # the object that a RENAME overwrites
    nlink: int = 1  # links of the removed or overwritten object before the event
    way: Way = ()  # look-ups on the way to the place of the order
    pinned: tuple[Inode, ...] = ()
    attr: StatLike | None = None  # of the child, once it was asked for
    position: int = 0  # of the event, among all that were queued
    away: bool | None = None  # whether the kernel has moved the directory's name out of the way
    kept: int = 0  # how often its name was not taken from it
    hidden: bool = False  # its last look-up was answered with "not there"
    done: float = 0.0  # time.monotonic() at which it was executed

    @property
    def creates_open(self) -> bool:
        """Whether its file stays open from its creation on."""
        return self.order.op == Op.CREATE and bool(self.order.arg)


MOVING = 0.1
"""Seconds from the answer to a look-up until the kernel has surely acted on it."""
FOUND_LIMIT = 64
"""Look-ups of directories by users that are remembered for that."""
KEPT_LIMIT = 2
"""How often a CREATE is started again because users look the directory up repeatedly: one less than
the agent's attempts."""


class UnexpectedCall(OSError):
    """The replayer made a request that no order covers."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EACCES, f"not in the ledger: {what}")


def _check_looked_up(task: Task) -> None:
    """Raises OSError ESTALE if the kernel has not looked up the order's name: it uses what it has
    cached from before the mark, and so would the watchers. Upon ESTALE it asks, within the same
    call of the agent (LOOKUP_REVAL of fs/namei.c), and drops outdated data.
    """
    if task.attr is None and task.order.name:
        raise OSError(errno.ESTALE, "not looked up")


def _is_apart(task: Task) -> bool:
    """Whether it is made through a descriptor of its own of a file that has lost its name."""
    return task.order.op in (Op.TOUCH, Op.LONE_CLOSE) and bool(task.order.generation2)


class Ledger:
    """Orders sent to the agent and not yet done, oldest first. Calls ``on_done`` with each order
    once the agent's call has returned, which its next request shows.
    """

    def __init__(self, fs: PassthroughFS, on_done: Callable[[Task], None]) -> None:
        self._fs = fs
        self._table = fs.table
        self._tasks: deque[Task] = deque()
        self._begun = False
        self._found: deque[tuple[int, bytes, float]] = deque(maxlen=FOUND_LIMIT)
        self.done: list[Task] = []  # taken over by the guest's counters
        self._on_done = on_done
        self._returning: Task | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """An order goes out to the agent."""
        if not self._tasks:
            self._begun = False
        self._tasks.append(task)

    @property
    def is_at_work(self) -> bool:
        """Whether the agent is executing orders: its next request comes at once."""
        return self._begun and bool(self._tasks)

    def is_opening(self, inode: Inode) -> bool:
        """Whether the call that the agent is in opens that file."""
        task = self._tasks[0] if self._tasks else None
        if task is not None and task.order.op == Op.OPEN and task.child is inode:
            return True
        return self._is_created(inode)

    def _is_created(self, inode: Inode) -> bool:
        """Whether it has just been created and opened: the kernel may yet check the latter."""
        task = self._returning
        return task is not None and task.child is inode and task.creates_open

    def finish(self) -> None:
        """The agent asks for more: all its orders are executed."""
        while self._tasks:
            self._pop()
        self._returned()

    def executed(self, seq: int) -> None:
        """The agent has executed the orders up to ``seq``."""
        while self._tasks and self._tasks[0].order.seq <= seq:
            self._pop()
        self._returned()

    def failed(self, seq: int) -> Task | None:
        """The agent could not execute order ``seq``; those before it are done."""
        while self._tasks and self._tasks[0].order.seq < seq:
            self._pop()
        self._returned()
        if self._tasks and self._tasks[0].order.seq == seq:
            task = self._tasks.popleft()
            self._release(task)
            return task
        return None

    @property
    def tasks(self) -> Sequence[Task]:
        """Orders that are not done, oldest first."""
        return self._tasks

    def abandon(self) -> list[Task]:
        """The agent is gone: returns the orders that it had not executed."""
        self._returned()
        rest = list(self._tasks)
        self._tasks.clear()
        return rest

    def _pop(self) -> None:
        task = self._tasks.popleft()
        task.done = time.monotonic()
        self.done.append(task)
        self._release(task)
        self._returned()
        self._returning = task

    def _returned(self) -> None:
        """The agent makes a request: the previous call has returned."""
        task, self._returning = self._returning, None
        if task is not None:
            self._on_done(task)

    def _release(self, task: Task) -> None:
        for inode in task.pinned:
            self._table.unpin(inode)

    def _head(self, *ops: Op) -> Task | None:
        """The order being executed. A CLOSE needs no answer, so the next order has begun."""
        self._begun = True
        self._returned()
        while self._tasks and self._tasks[0].order.op == Op.CLOSE:
            self._pop()
        if self._tasks and (not ops or self._tasks[0].order.op in ops):
            return self._tasks[0]
        return None

    # Answers

    def lookup(self, nodeid: int, name: bytes) -> Entry | None:
        """LOOKUP as of the event; None if no order is about that name.

        Raises OSError ESTALE for "..", with which the agent's kernel would look for the place of a
        directory that it knows only by handle: the agent then walks there, as of the event.
        """
        if name in (b".", b".."):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        task = self._head()
        if task is None:
            return None
        order = task.order
        if order.op == Op.RENAME and (order.nodeid2, order.name2) == (nodeid, name):
            if task.target is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self._entry(task.target, task.nlink)
        if order.op == Op.CREATE and (order.nodeid2, order.name2) == (nodeid, name):
            task.away = task.away is not None or not self._found_lately(task.order)
            return self._entry(task.child, None)
        if (order.nodeid, order.name) != (nodeid, name):
            return self._step(task, nodeid, name)
        if order.op == Op.CREATE:
            if task.away is False and task.kept < KEPT_LIMIT:
                task.kept += 1
                return self._entry(task.child, None)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if order.op == Op.REMOVE and nodeid == ALIAS:
            return self._death(task)
        if _is_apart(task) and task.attr is not None and not task.hidden:
            # The agent's second, or the kernel's own if it has cached another object by that name.
            # Then the agent starts again.
            task.hidden = True
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        task.hidden = False
        entry = self._entry(task.child, task.nlink if order.op == Op.REMOVE else None)
        task.attr = entry.attr
        return entry

    def found(self, nodeid: int, name: bytes) -> None:
        """A user has found a directory under a name. If its CREATE is being replayed, the kernel
        has moved it back, and it may be in use by now: "not there" would detach what is mounted on
        it.
        """
        self._found.append((nodeid, name, time.monotonic()))
        if self._tasks:
            task = self._tasks[0]
            if task.away and (task.order.nodeid, task.order.name) == (nodeid, name):
                task.away = False

    def _found_lately(self, order: frames.Order) -> bool:
        """Whether a user's kernel may just be about to move it there."""
        since = time.monotonic() - MOVING
        place = order.nodeid, order.name
        return any(found[:2] == place and found[2] > since for found in self._found)

    def _death(self, task: Task) -> Entry:
        """The end of an object without a name: first with no links, then not found."""
        if task.attr is not None:
            self._pop()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        entry = self._entry(task.child, 0)
        task.attr = entry.attr
        return entry

    def _step(self, task: Task, nodeid: int, name: bytes) -> Entry | None:
        """A look-up on the way to the order's directory: its path is as of the event, too."""
        for step in task.way:
            if (step.parent, step.name) == (nodeid, name) and step.inode.nodeid < FSD_DIR:
                return self._entry(step.inode, None)
        return None

    def create(self, nodeid: int, name: bytes, kind: int, *, opens: bool = False) -> Entry:
        """MKNOD, MKDIR, SYMLINK, or (``opens``) CREATE: the entry that the host has already
        made.
        """
        task = self._head(Op.CREATE)
        if task is None or (task.order.nodeid, task.order.name) != (nodeid, name):
            raise UnexpectedCall(f"create {name!r}")
        if stat.S_IFMT(task.order.mode) != kind:
            raise UnexpectedCall(f"create {name!r} of another type")
        if opens and not task.creates_open:
            raise UnexpectedCall(f"create and open {name!r}")
        entry = self._entry(task.child, None)
        self._pop()
        return entry

    def remove(self, nodeid: int, name: bytes) -> None:
        """UNLINK, RMDIR: done on the host already."""
        task = self._head(Op.REMOVE)
        if task is None or (task.order.nodeid, task.order.name) != (nodeid, name):
            raise UnexpectedCall(f"remove {name!r}")
        _check_looked_up(task)
        self._pop()

    def rename(self, nodeid: int, name: bytes, nodeid2: int, name2: bytes, flags: int) -> None:
        """RENAME: done on the host already."""
        task = self._head(Op.RENAME)
        expected = (nodeid, name, nodeid2, name2, flags)
        if task is None or expected != (
            task.order.nodeid, task.order.name, task.order.nodeid2, task.order.name2, task.order.arg
        ):  # fmt: skip
            raise UnexpectedCall(f"rename {name!r} to {name2!r}")
        _check_looked_up(task)
        self._pop()

    def setattr(self, nodeid: int) -> StatLike:
        """SETATTR that causes the event; the host's attributes do not change."""
        task = self._head(Op.TOUCH)
        if task is not None:
            _check_looked_up(task)
        if task is None or task.child.nodeid != nodeid:
            raise UnexpectedCall(f"setattr of node {nodeid}")
        self._pop()
        return task.attr or self.attributes(task.child)

    def getattr(self, inode: Inode) -> StatLike:
        """GETATTR. Raises OSError ESTALE for the object that the kernel has cached under the name
        of an order, so that it looks that name up; not for the directories on the way there.
        """
        task = self._tasks[0] if self._tasks else None
        if self._is_created(inode):
            return self.attributes(inode)
        is_meant = task is not None and (inode is task.child or not inode.is_dir)
        if task is not None and is_meant and task.order.op in (Op.TOUCH, Op.OPEN, Op.LONE_CLOSE):
            _check_looked_up(task)
        return self.attributes(inode)

    def touch(self, inode: Inode, event: Mask) -> None:
        """READ, WRITE of an open file that cause the event; no data is moved."""
        task = self._head(Op.TOUCH)
        if task is None or task.child is not inode or task.order.arg != event:
            raise UnexpectedCall(f"data of node {inode.nodeid}")
        self._pop()

    def open(self, nodeid: int) -> Inode:
        """OPEN, OPENDIR: the caller answers with a handle without data."""
        task = self._head(Op.OPEN, Op.TOUCH, Op.LONE_CLOSE)
        if task is not None:
            _check_looked_up(task)
        is_meant = task is not None and (task.order.op != Op.TOUCH or _is_apart(task))
        if task is None or not is_meant or task.child.nodeid != nodeid:
            raise UnexpectedCall(f"open of node {nodeid}")
        if task.order.op == Op.OPEN:
            self._pop()
        return task.child

    def attributes(self, inode: Inode, nlink: int | None = None) -> StatLike:
        """The current attributes; those of a placeholder if the object is gone. Raises OSError if
        it cannot be looked at: a guest's kernel would believe them.
        """
        attr = self._attributes(inode)
        return attr if nlink is None else with_nlink(attr, nlink)

    def _attributes(self, inode: Inode) -> StatLike:
        if inode.is_placeholder:
            return placeholder_attr(inode)
        if isinstance(inode.attr_given, os.stat_result):  # its watch has reported no change since
            return inode.attr_given
        try:
            return self._fs.getattr(inode)
        except OSError as error:
            if not syscalls.is_gone(error):
                raise
            return placeholder_attr(inode)

    def _entry(self, inode: Inode, nlink: int | None) -> Entry:
        inode = self._table.revive(inode)
        return self._fs.referenced(Entry(inode, self.attributes(inode, nlink)))
