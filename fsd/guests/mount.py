"""The mount guest: a mount whose agent replays events. Events wait here until they can be planned:
an OPEN until it is known how the file was opened, all others behind it. It is one module, as each
step has to keep the order of the others.
"""

from __future__ import annotations

import errno
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sized
from functools import partial

from protocol import frames
from protocol.frames import ALL_PROCESSES, Op
from protocol.masks import EVENTS, Mask

from ..events.event import Event
from ..events.watcher import HostWatcher
from ..files.inode import Inode
from ..files.passthrough import PassthroughFS
from ..linux.openers import File, Openers
from ..pacing import windows
from ..pacing.guard import Guard
from .guest import Guest
from .history import History, Place
from .ledger import Ledger, Step, Task, Way, Ways
from .openings import Evidence, Need, Wait, closes_of, judge
from .orders import Held, Orders
from .roles import HasState, KernelCache, Record

TASKS_LIMIT = 512
"""Orders made ahead of the agent; later events wait as events, which are smaller."""
PATHS_LIMIT = 60_000
"""Bytes of an order's paths, to fit a frame; beyond it, events are counted as failed."""
PLAN_TIME = 0.005
"""Seconds of planning at a time."""
ONLY_READ_LIMIT = 4096
"""Programs that run in the guest while the host writes to their files, whose CLOSE_WRITE is
counted."""
HINTS_LIMIT = 4096
"""Processes named to an agent that has not read: beyond it, it has to read the marks of all."""
WAYS_LIMIT = 8192
"""Look-ups in the ways that are kept, 1 MB: those to about 2,000 directories."""
HELD_COST = 1200
"""Bytes of an event that waits for an agent, and of what it keeps alive, without its names."""
STEP_COST = 100
"""Bytes of one look-up on the way to the place of an event."""
_OPEN, _MODIFY, _ACCESS = int(Mask.OPEN), int(Mask.MODIFY), int(Mask.ACCESS)
_CLOSE_WRITE, _CREATE = int(Mask.CLOSE_WRITE), int(Mask.CREATE)
_CLOSE = _CLOSE_WRITE | int(Mask.CLOSE_NOWRITE)
_OWN = _MODIFY | _ACCESS | _OPEN | _CLOSE | int(Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF)


class MountGuest(Guest):
    """A guest with an agent: a mount of this machine (``is_local``), or another machine. Its outbox
    consists of held events, planned tasks, and the ledger. ``interest`` returns the events that a
    guest's marks on an inode, or on all, ask for.
    """

    __slots__ = (
        "_held", "_hint", "_hinted", "_nodes", "_only_read", "_open_close", "_openers", "_orders",
        "_outgoing", "_record", "_scanning", "_table", "_tasks", "_watcher", "_way_steps",
        "_ways", "_ways_as_of", "began", "cache", "device", "history", "is_local", "is_paused",
        "keeps_created", "keeps_names", "ledger", "makes_lone_closes", "passthrough", "pid",
        "transport", "waiting_until",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        fs: PassthroughFS,
        watcher: HostWatcher,
        openers: Openers,
        interest: Callable[[Guest, Inode | None], Mask],
        *,
        limit: int,
        is_local: bool = False,
        record: Record | None = None,
    ) -> None:
        super().__init__(name, limit=limit)
        self._openers = openers
        self.is_local = is_local  # its users are this machine's, and no other's
        self.device = 0  # st_dev of the mount, if it is this machine's
        self.transport = ""  # what brings its requests, for people
        self.began = time.time()
        self._nodes: Sized = ()  # that its kernel holds
        self._table = fs.table
        self._watcher = watcher
        self.ledger = Ledger(fs, self._done)
        self.history = History(self, watcher)
        self.pid = 0  # of the agent's replaying thread; 0 while there is none
        self._record = record
        self.is_paused = False  # no orders are sent; sent ones are still answered
        self.keeps_names = False
        self.cache: KernelCache | None = None
        self.passthrough: HasState | None = None
        self._held: deque[Held] = deque()
        # For each inode the OPENs (None) and CLOSEs (True = for writing) among the held events, and
        # where; what has the name by now may be taken for the file
        self._open_close: dict[Inode, deque[tuple[Place, bool | None]]] = {}
        self._tasks: deque[Task] = deque()
        self._only_read: set[int] = set()  # OPENs for writing that the agent has open for reading
        self._orders = Orders(fs.table, partial(interest, self))
        self.makes_lone_closes = False  # the agent can
        self.keeps_created = False  # the agent can: files open that it creates
        self._hint = 0
        self._hinted: dict[int, int] = {}  # processes for the next hints, with their numbers
        # Processes that the agent is scanning: since which hint
        self._scanning: dict[int, int] = {}
        self._outgoing: deque[frames.Message] = deque()  # ahead of hints and orders
        self._ways: dict[Inode, Way] = {}
        self._ways_as_of = 0  # the table's ``moves``
        self._way_steps = 0  # in all of them
        self.waiting_until: float | None = None  # time.monotonic() at which to plan again

    def serve(self, nodes: Sized, *, keeps_names: bool, cache: KernelCache | None) -> None:
        """A session serves its kernel, which holds these nodes; ``keeps_names``: which may look a
        name up without a request; ``cache``: and keeps what is taken back.
        """
        self._nodes, self.keeps_names, self.cache = nodes, keeps_names, cache

    @property
    def nodes_held(self) -> int:
        """How many nodes its kernel holds."""
        return len(self._nodes)

    # The agent

    def connect(self, pid: int, hello: frames.Hello) -> None:
        """An agent took the control channel."""
        self.pid = pid
        self.sees_marks(False)  # until the agent says so
        self._note_agent()
        self.events = EVENTS & hello.events
        self.makes_lone_closes = self.keeps_created = False
        self._orders.clear()
        self._only_read.clear()
        self._outgoing.clear()
        self._scanning.clear()
        self.counts["agent_connects"] += 1

    def disconnect(self) -> None:
        """The agent is gone: its unexecuted orders wait for the next one."""
        self.agent_gone()
        self._count_done()
        self._tasks.extendleft(reversed(self.ledger.abandon()))

    def agent_gone(self) -> None:
        """There is no agent any more."""
        self.pid = 0
        self.sees_marks(True)  # those set meanwhile are read by the next agent
        self.history.check()
        self._note_agent()

    def sees_marks(self, sees: bool) -> None:
        """Whether the agent sees the calls that set marks, or there is none."""
        if self.cache is not None:
            self.cache.sees_marks(sees)

    def _note_agent(self) -> None:
        if self._record is not None:
            self._record.replayer(self.pid)

    def marked(self, inode: Inode | None, mask: int) -> None:
        """Its interest in an object (None = all) has changed."""
        if self.cache is not None and mask:
            self.cache.watched(inode)
        if self._record is not None:
            self._record.marked(0 if inode is None else inode.nodeid, mask)

    def hint(self, pid: int) -> int:
        """Make the agent read the marks of a process; returns the number of that hint. Each process
        has its own: the mark of one says nothing about what another has looked up.
        """
        if ALL_PROCESSES in self._hinted:
            pid = ALL_PROCESSES
        if pid not in self._hinted:
            if len(self._hinted) >= HINTS_LIMIT:
                self._hinted.clear()
                pid = ALL_PROCESSES
            self._hint += 1
            self._hinted[pid] = self._hint
            if pid not in self._scanning:
                self.wake()
        return self._hinted[pid]

    def scanned(self, hint: int) -> None:
        """The agent has answered its hints up to that one."""
        self._scanning = {pid: number for pid, number in self._scanning.items() if number > hint}
        if self._gives_hints:
            self.wake()

    @property
    def _gives_hints(self) -> bool:
        """Whether there are hints to send: not only for processes that the agent is scanning."""
        if not self._hinted or len(self._scanning) >= HINTS_LIMIT:
            return False
        return not self._hinted.keys() <= self._scanning.keys()

    def send(self, message: frames.Message) -> None:
        """Queue a message that is not an order."""
        self._outgoing.append(message)
        self.wake()

    @property
    def held(self) -> int:
        """Events that are not planned yet."""
        return len(self._held)

    @property
    def is_opening(self) -> bool:
        """Whether an OPEN has just come, whose CLOSE may be on its way."""
        return any(
            held.event.kind & _OPEN and time.monotonic() - held.arrived < windows.CLOSE_WAIT
            for held in itertools.islice(self._held, 8)
        )

    @property
    def has_outgoing(self) -> bool:
        """Whether ``take`` would return something."""
        overflowed = self.missing and not self._held  # a read then shows that the rest is done
        hints = self._gives_hints
        if self.is_paused:
            return bool(self._outgoing)
        tasks = self._tasks and self._may_announce
        return bool(self._outgoing or tasks or hints or overflowed)

    @property
    def _may_announce(self) -> bool:
        """Whether the guest's kernel has forgotten what events are about. Once it has, there is a
        ``wake``.
        """
        return self.cache is None or self.cache.is_settled

    def asked(self) -> None:
        """The agent asks for more: it has executed all its orders."""
        self.ledger.finish()
        self._count_done()

    def take(self, limit: int) -> list[frames.Message]:
        """The next messages for the agent, which has executed all its previous orders."""
        self.asked()
        messages: list[frames.Message] = []
        if self._gives_hints:
            messages += [frames.Hint(number, pid) for pid, number in self._hinted.items()]
            self._scanning.update(self._hinted)
            self._hinted.clear()
        while self._outgoing and len(messages) < limit:
            messages.append(self._outgoing.popleft())
        may_announce = self._tasks and not self.is_paused and self._may_announce
        while may_announce and self._tasks and len(messages) < limit:
            task = self._tasks.popleft()
            self.ledger.add(task)
            messages.append(task.order)
        if self._held:
            self.plan()
        return messages

    def leave(self) -> None:
        """The guest has disconnected."""
        super().leave()
        self._tasks.extendleft(reversed(self.ledger.abandon()))
        pinned = [*(task.pinned for task in self._tasks), *(held.pinned for held in self._held)]
        for inode in itertools.chain.from_iterable(pinned):
            self._table.unpin(inode)
        self._tasks.clear()
        self._held.clear()
        self._open_close.clear()
        self._orders.clear()
        self.history.clear()
        self._ways.clear()
        self._way_steps = 0
        self.waiting_until = None
        self._record = None  # it is of the next session now

    def undelivered(self) -> list[Event]:
        """Events that are not replayed yet, in order."""
        waiting = (task.event for task in (*self.ledger.tasks, *self._tasks))
        events = dict.fromkeys(event for event in waiting if event is not None)
        return [*events, *(held.event for held in self._held)]

    def acknowledge(self, seq: int, number: int) -> Event | None:
        """The agent's report on an order; returns the event if it could not be replayed."""
        if not number:
            self.ledger.executed(seq)
        task = self.ledger.failed(seq) if number else None
        if task is None and number == errno.ETXTBSY and len(self._only_read) < ONLY_READ_LIMIT:
            self._only_read.add(seq)
        self._count_done()
        if task is None or task.event is None:
            return None
        self._done(task)
        if task.order.op == Op.OPEN or task.creates_open:
            self._orders.not_opened(task.event, task.order)
        self.count("failed", task.event.mask)
        return task.event

    def _done(self, task: Task) -> None:
        if task.order.op == Op.OPEN or task.creates_open:
            self.history.opened(task.child)
        if task.event is not None:
            self.history.delivered(task.event, task.position)

    def _count_done(self) -> None:
        for task in self.ledger.done:
            if task.event is None:
                continue
            if task.order.op == Op.CLOSE and task.order.arg in self._only_read:
                self._only_read.remove(task.order.arg)
                self.count("failed", task.event.mask)
            else:
                self.delivered(task.event.mask, task.done - task.event.stamp)
        self.ledger.done.clear()

    # Events in

    @property
    def depth(self) -> int:
        """Events and orders queued."""
        return len(self._held) + len(self._tasks) + len(self.ledger)

    def enqueue(self, event: Event, halves: int, ways: Ways | None = None) -> None:
        """Queue an event to be planned, in order."""
        kind, child, replaced = event.kind, event.child, event.replaced
        if not event.name:
            if not kind & _OWN:
                return
            child = event.node
        assert child is not None
        if replaced is not None:
            replaced = self._table.revive(replaced)
        child = self._table.revive(child)
        event = event.about(child, replaced)
        if kind & (_OPEN | _CLOSE):
            what = None if kind & _OPEN else bool(kind & _CLOSE_WRITE)
            self._open_close.setdefault(child, deque()).append(((event.node, event.name), what))
        # A remembered event has the ways of its time, and the places may have other names now.
        called = self._orders.called(event) if ways is None else None
        way, way2 = ways or self.ways(event)
        if called is not None:
            way = self._way(called.parent)
        places = (child, replaced, event.node, event.node2, called and called.parent)
        pinned = tuple(i for i in places if i is not None)
        for inode in pinned:
            self._table.pin(inode)
        cost = HELD_COST + len(event.name) + len(event.name2)
        if not self._held or self._held[-1].way is not way:  # else it shares that of the last one
            cost += STEP_COST * len(way)
        cost += STEP_COST * len(way2)
        position = self.history.queued(event)
        self._held.append(Held(event, time.monotonic(), way, way2, pinned, cost, position, called))
        self._charge(cost)

    def ways(self, event: Event) -> Ways:
        """The current ways to the places of the event."""
        return self._way(event.node), self._way(event.node2) if event.node2 is not None else ()

    # Planning

    def plan(self) -> None:
        """Make orders of the held events, up to an OPEN of which too little is known yet."""
        end = time.monotonic() + PLAN_TIME
        while self._held and len(self._tasks) < TASKS_LIMIT:
            if time.monotonic() > end:
                self.waiting_until = end
                self.wake()
                return
            held = self._held[0]
            event, arrived = held.event, held.arrived
            opens: list[bool] = []
            assert event.child is not None
            if event.kind & _OPEN:
                known: list[bool] | None = [False]
                with Guard("finding out how a file was opened"):
                    known = self._how_opened(event.child, arrived)
                if known is None:
                    return
                opens = known
            self._held.popleft()
            self._charge(-held.cost)
            if event.kind & (_OPEN | _CLOSE):
                passed = self._open_close[event.child]
                passed.popleft()
                if not passed:
                    del self._open_close[event.child]
            lone_closes, keeps_open = self.makes_lone_closes, self._is_closed_next(event)
            for task in self._orders.of(
                held, opens, lone_closes=lone_closes, keeps_open=keeps_open
            ):
                self._add(task)
            for inode in held.pinned:
                self._table.unpin(inode)
        self.waiting_until = None
        self.wake()

    def _add(self, task: Task) -> None:
        if len(task.order.path) + len(task.order.path2) <= PATHS_LIMIT:
            self._tasks.append(task)
            return
        self.counts["failed"] += 1
        self._done(task)
        for inode in task.pinned:
            self._table.unpin(inode)

    def _is_closed_next(self, event: Event) -> bool:
        """For a CREATE or MODIFY: whether the agent should keep the file open from then on, as its
        CLOSE_WRITE is waiting. Else it is looked up for each event.
        """
        may_be = event.kind & _MODIFY or (event.kind & _CREATE and self.keeps_created)
        if not may_be or not event.name or event.child is None or event.unlinked:
            return False
        queued = self._open_close.get(event.child)
        if not queued or queued[0] != ((event.node, event.name), True):
            return False
        return self._orders.may_keep_open(event)

    def _how_opened(self, inode: Inode, arrived: float) -> list[bool] | None:
        """For the OPEN at the head: an item for each open that it stands for, True = for writing.
        None while that is unknown, and worth waiting for until ``waiting_until``.
        """
        before = {kind: self._orders.count(inode, kind) for kind in (False, True)}
        queued = self._open_close[inode]
        place, _ = queued[0]
        closes: list[bool] = []
        for named, anywhere in ((True, False), (True, True), (False, True)):
            # Else it was renamed while it was open; else to where its name is not watched.
            later = itertools.islice(queued, 1, windows.OPEN_AHEAD)
            fits = (w for p, w in later if p == place or (anywhere and bool(p[1]) >= named))
            closes = closes or closes_of(fits, before)
        known = Evidence(arrived, closes, inode.is_dir, inode.is_placeholder)
        while isinstance(verdict := judge(known, time.monotonic()), Need):
            if verdict is Need.PROC:
                known = known._replace(proc=self._openers.look(_file(inode), arrived))
                continue
            self._watcher.drain()  # time has passed, but the queue may not have been read since
            unread = self._watcher.backlog > 0 and len(self._held) < windows.OPEN_AHEAD
            known = known._replace(unread=unread, written=None if unread else self._written(inode))
        if isinstance(verdict, Wait):
            self.waiting_until = verdict.until
            return None
        return verdict.writing

    def _written(self, inode: Inode) -> bool | None:
        """Whether the next event of the file at the head is a MODIFY, not an ACCESS; None if there
        is none before another OPEN, of which it may be.
        """
        for later, *_ in itertools.islice(self._held, 1, None):
            if later.child is inode and later.kind & _OPEN:
                return None
            if later.child is inode and later.kind & (_MODIFY | _ACCESS):
                return bool(later.kind & _MODIFY)
        return None

    def lone_files(self) -> Iterator[File]:
        """Files with a waiting OPEN, among those that are planned next."""
        for held in itertools.islice(self._held, windows.OPEN_AHEAD):
            child = held.event.child
            if child is None or child.is_dir or child.is_placeholder:
                continue
            if held.event.kind & _OPEN:
                yield _file(child)

    def _way(self, node: Inode) -> Way:
        """The look-ups from the root to a directory, as they are now; kept until one moves."""
        if self._ways_as_of != self._table.moves or self._way_steps >= WAYS_LIMIT:
            self._ways.clear()
            self._ways_as_of, self._way_steps = self._table.moves, 0
        way = self._ways.get(node)
        if way is None:
            steps: list[Step] = []
            below = node if node.is_dir else None
            while below is not None and below.parent is not None:
                steps.append(Step(below.parent.nodeid, below.name, below))
                below = below.parent
            way = tuple(reversed(steps))
            self._ways[node] = way
            self._way_steps += len(way) + 1
        return way


def _file(inode: Inode) -> File:
    return inode.identity.device, inode.identity.ino
