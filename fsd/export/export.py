"""The Export: one shared directory, its guests, and the way of an event between them.

host inotify -> HostWatcher -> Resolver -> here: own echo? interest? -> each guest's outbox. Also
here: which host watches the interest needs, and what is delivered after losses. Synchronous; the
transports call it, and call ``process`` when there is work (``next_deadline``).
"""

from __future__ import annotations

import errno
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import structlog

from protocol import masks
from protocol.handles import NodeKey
from protocol.masks import Mask

from ..events.compare import Comparer
from ..events.event import Event
from ..events.reading import Reader
from ..events.resolver import Resolver
from ..events.watcher import HostWatcher
from ..files.inode import Inode
from ..files.locks import LockWaiters
from ..files.passthrough import PassthroughFS
from ..files.table import InodeTable
from ..guests.guest import (
    BY_HAND,
    MARKS_LIMIT,
    OUTBOX_LIMIT,
    Guest,
    HandMarks,
    Observer,
)
from ..guests.mount import MountGuest
from ..guests.roles import Record
from ..linux.descriptors import share
from ..linux.openers import File, Openers
from ..pacing import windows
from ..pacing.chores import TURN, Chores, Job, finish
from ..pacing.guard import PAUSE, Guard
from ..pacing.turn import Turn
from .arming import Arming
from .interest import Interest
from .recovery import Recovery
from .routing import Router
from .steps import Steps
from .watches import Watches
from .watchlimit import default_limit
from .wholetree import WholeTree

log = structlog.get_logger()
_MOVED_FROM, _MOVED_TO = int(Mask.MOVED_FROM), int(Mask.MOVED_TO)
_CREATE = int(Mask.CREATE)
_OVERFLOW, _IGNORED = int(Mask.Q_OVERFLOW), int(Mask.IGNORED)
_UNMOUNT = int(Mask.UNMOUNT)


class Export:
    """One shared directory. Raises OSError if ``source`` cannot be opened.

    ``read_only``: for its guests; the host's changes are still reported. ``overflow_after_loss``:
    observers get IN_Q_OVERFLOW also for losses that a comparison recovers. The export calls
    ``on_work`` when there may be work for ``process``, or an earlier deadline; ``on_change`` at the
    first change of its state after a checkpoint; ``on_name`` for each new name, with its directory
    and its object.
    """

    def __init__(
        self,
        source: str,
        *,
        read_only: bool = False,
        outbox_limit: int = OUTBOX_LIMIT,
        watch_limit: int | None = None,
        overflow_after_loss: bool = False,
        on_work: Callable[[], None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
        on_name: Callable[[Inode, bytes, Inode], None] | None = None,
    ) -> None:
        self.source = source
        self.read_only = read_only
        self.watch_limit = default_limit() if watch_limit is None else watch_limit
        self.table = InodeTable(source)
        self.fs = PassthroughFS(self.table)
        self.on_work = on_work
        self.watcher = HostWatcher(self.table, watch_limit=self.watch_limit, on_arrival=on_work)
        self.reader = Reader(self.table, self.watcher)
        self._resolver = Resolver(self.fs, self.watcher)
        self.interest = Interest()
        self.guests: list[Guest] = []
        self.lock_waiters = LockWaiters()
        self.descriptors = share()
        """Descriptors that each guest may have, for its open files."""
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, int]] = Counter()
        self.chores = Chores()
        self._own_chores = self.chores.of(self)
        self.turn = Turn()
        """The turn in which events are processed: what waits for them is answered at its end."""
        self._steps = Steps(self.counts)
        self.watches = Watches(
            self.table,
            self.watcher,
            self.reader,
            self.interest,
            guests=self.guests,
            limit=self.watch_limit,
            chores=self._own_chores,
            counts=self.counts,
        )
        self.arming = Arming(
            self,
            self.table,
            self.watcher,
            self.interest,
            self.watches,
            self.counts,
            on_work,
        )
        self.router = Router(self.interest, self.arming, self.counts)
        self._tree = WholeTree(
            self.fs, self.watcher, self.interest, self.watches, self.router, self._own_chores
        )
        self.comparer = Comparer(self.fs, self.watcher, self.reader, self.watches.look_later)
        self.recovery = Recovery(
            self.table,
            self.watcher,
            self.comparer,
            self.interest,
            self.watches,
            self._tree,
            self.router,
            self._steps,
            self.counts,
        )
        self.waiting: dict[bytes, Observer] = {}  # by token: observers that may come back
        self.is_stopping = False  # channels that end now may come back
        self.is_changed = False  # since the state was saved
        self.confirmed_ns = 0  # up to then, listings are known to be right
        self._on_change = on_change
        self._on_name = on_name
        self._outbox_limit = outbox_limit
        self._overflow_after_loss = overflow_after_loss
        self._give_up_at = math.inf  # when to give up waiting observers
        self._openers = Openers(self._lone_files)
        self._paused_until = 0.0  # after a fault
        self.started = time.time()

    def close(self) -> None:
        """Drop watches and descriptors."""
        self.chores.close()
        self._steps.close()
        self.fs.successors.close()
        self.watcher.close()
        self.table.close()

    # Guests

    def add_mount_guest(
        self, name: str, *, is_local: bool = False, record: Record | None = None
    ) -> MountGuest:
        """Add a mount guest: another machine's, or (``is_local``) one of this machine. ``record``
        notes its state.
        """
        guest = MountGuest(
            name,
            self.fs,
            self.watcher,
            self._openers,
            self.interest.of,
            limit=self._outbox_limit,
            is_local=is_local,
            record=record,
        )
        self.guests.append(guest)
        return guest

    def add_observer(self, name: str) -> Observer:
        """A guest that reads events."""
        losses = self._overflow_after_loss
        guest = Observer(name, limit=self._outbox_limit, reports_losses=losses)
        self.guests.append(guest)
        return guest

    def hand_marks(self, via: MountGuest | None = None) -> HandMarks:
        """The guest that holds marks set by hand in the mount ``via``: each machine has one, and
        this host has one for all its mounts and sockets.
        """
        if via is not None and via.is_local:
            via = None
        found = self._hand_marks_of(via)
        if found is None:
            found = HandMarks(BY_HAND)
            found.via = via
            self.guests.append(found)
        return found

    def _hand_marks_of(self, via: MountGuest | None) -> HandMarks | None:
        marks = (guest for guest in self.guests if isinstance(guest, HandMarks))
        return next((guest for guest in marks if guest.via is via), None)

    def drop_hand_marks(self, via: MountGuest) -> None:
        """The machine has disconnected or restarted: drop its marks set by hand."""
        marks = self._hand_marks_of(via)
        if marks is not None:
            self.remove_guest(marks)

    def remove_guest(self, guest: Guest) -> None:
        """The guest has disconnected; its marks are removed, a few at a time if there are many."""
        if isinstance(guest, MountGuest):
            self.drop_hand_marks(guest)
        self.arming.forget(guest)
        self.guests.remove(guest)
        if isinstance(guest, MountGuest):
            for inode in self.interest.marks(guest):
                guest.marked(inode, 0)
        guest.leave()
        self._own_chores.do(self._dropping_marks(guest))

    def _dropping_marks(self, guest: Guest) -> Job[None]:
        for inode in list(self.interest.marks(guest)):
            self._set_interest(guest, inode, Mask(0))
            yield None
        if not self.guests and not self.is_stopping:  # nobody has a file handle any more
            self.table.forgotten.clear()

    def update(self, guest: Guest, key: NodeKey, bits: int) -> Inode | None:
        """fsnotify_update. Raises MaskError (EINVAL), OSError: ESTALE for an unknown node, ENOSPC
        if the guest has too many marks or the host gives no watch (the mark holds: the directory is
        compared periodically).
        """
        mask = masks.requested(bits) & guest.events
        if bits and not mask:
            raise masks.MaskError(f"no negotiated event in mask {bits:#x}")
        inode = None if key.nodeid == 0 else self.table.find(key)
        new = mask and not self.interest.of(guest, inode)
        if new and self.interest.count(guest) >= MARKS_LIMIT:
            raise OSError(errno.ENOSPC, "too many marks")
        self._set_interest(guest, inode, mask)
        if mask:
            self.watches.check(inode)
        return inode

    def _set_interest(self, guest: Guest, inode: Inode | None, mask: Mask) -> None:
        self._change()
        had = self.interest.of(guest, inode)
        before, after = self.interest.update(guest, inode, mask)
        if inode is None:
            if before != after:
                self._tree.bring_in_line(after)
        else:
            if mask and not had:
                self.table.pin(inode)
            if before != after:
                self.watches.follow_name(inode)
                self.watches.set_watch(inode)
        if isinstance(guest, MountGuest) and had != mask:
            guest.marked(inode, int(mask))
        if inode is not None and had and not mask:
            self.table.unpin(inode)

    def is_arming(self, inode: Inode | None) -> bool:
        """Whether interest in an inode is not in force yet: a huge directory's names are still to
        be read, or (None) the watches of the whole tree to be brought in line.
        """
        return self._tree.is_arming if inode is None else self.watches.is_reading(inode)

    # Events

    def process(self, budget: int) -> None:
        """Route up to ``budget`` events, do what is due, and a turn of longer work."""
        self.route(budget)
        self._due("planning", self._plan)
        now = time.monotonic()
        self._due("ending a watch", partial(self.arming.expire, now))
        self._due("forgetting successors", partial(self.fs.successors.expire, now))
        if now >= self._give_up_at:
            self._due("giving up an observer", self._give_up)
        if now >= self.watches.look_again_at:
            self.watches.look_again_at = math.inf
            self._own_chores.add(self.recovery.looking_again())
        if self.chores:
            self.counts["faults"] += self.chores.run()
        for guest in self.guests:
            if isinstance(guest, MountGuest):
                guest.history.check()

    def _due(self, what: str, do: Callable[[], None]) -> None:
        """Work that is due: if it fails, the rest is done, and it is tried again later."""
        with Guard(what) as guard:
            do()
        if guard.failed:
            self.counts["faults"] += 1
            self._paused_until = time.monotonic() + PAUSE

    def route(self, budget: int) -> None:
        """Route up to ``budget`` events, within a turn if one of them makes much work."""
        end = time.monotonic() + TURN
        while budget and (self._steps or self.watcher.backlog):
            budget -= 1
            if not self._steps:
                self._steps.add(self._arriving())
            if not self._steps.work(end) or self._resolver.waiting_until is not None:
                break

    def _arriving(self) -> Job[None]:
        for event in self._resolver.next():
            yield from self._handle(event)

    @property
    def is_waiting(self) -> bool:
        """Whether the next event waits for the other half of its call."""
        return self._resolver.waiting_until is not None

    @property
    def is_behind(self) -> bool:
        """Whether something that has happened is not routed yet."""
        return bool(self._steps or self.watcher.backlog)

    def has_routed(self, stamp: float) -> bool:
        """Whether everything is routed that was read from the host up to then."""
        waiting = self.watcher.queue.peek(1)
        return not self._steps and (not waiting or waiting[0].stamp > stamp)

    @property
    def is_busy(self) -> bool:
        """Whether there is work for the next turn."""
        return self.is_behind or bool(self.chores)

    def _plan(self) -> None:
        """Let mount guests make orders, once they see as far ahead as possible."""
        guests = [g for g in self.guests if isinstance(g, MountGuest) and g.held]
        if not guests:
            return
        if not self.watcher.backlog and any(guest.is_opening for guest in guests):
            time.sleep(windows.SETTLE)
            self.watcher.drain()
        waiting = self.watcher.backlog and self._resolver.waiting_until is None
        for guest in guests:
            if guest.held >= (windows.PLAN_AHEAD if waiting else 1):
                self._due("planning for a guest", guest.plan)

    def _lone_files(self) -> Iterator[File]:
        for guest in self.guests:
            if isinstance(guest, MountGuest):
                yield from guest.lone_files()

    @property
    def next_deadline(self) -> float:
        """time.monotonic() at which ``process`` has something to do; inf if never."""
        if self._steps or self.chores:
            return 0.0
        if self.watcher.backlog and self._resolver.waiting_until is None:
            return 0.0
        due = [
            self._resolver.waiting_until or math.inf,
            self.arming.deadline,
            self.watches.look_again_at,
        ]
        due += [self._give_up_at, self.fs.successors.deadline]
        due += [g.waiting_until or math.inf for g in self.guests if isinstance(g, MountGuest)]
        return max(min(due), self._paused_until)

    def _handle(self, event: Event) -> Job[None]:
        self.counts["in"] += 1
        self._change()
        self.kinds["in", event.kind] += 1
        if event.mask & _OVERFLOW:
            self.counts["overflows"] += 1
            for guest in self.guests:
                guest.events_lost()
            yield from self.recovery.resyncing(self.watcher.inodes())
            return
        if event.mask & _UNMOUNT:  # of a file on another mount than the share
            self.recovery.died(event.node)
            self.table.retire(event.node)
            return
        if event.mask & _IGNORED:
            self.watches.ended(event.node)
            return
        self.router.route(event)
        child = event.child
        if child is not None and event.name:
            if event.mask & (_MOVED_FROM | _MOVED_TO):
                self.watches.follow_names(child, event.replaced)
            yield from self._tree.cover_arrival(event, child)
            if self._on_name is not None:
                if event.node2 is not None:
                    self._on_name(event.node2, event.name2, child)
                elif event.mask & (_CREATE | _MOVED_TO):
                    self._on_name(event.node, event.name, child)
        for inode in (child, event.replaced):
            if inode is not None:
                self.table.release(inode)

    def _change(self) -> None:
        if not self.is_changed:
            self.is_changed = True
            self._on_change()

    def restore_marks(
        self, marks: Iterable[tuple[Guest, Inode | None, Mask]], order: Iterable[Inode]
    ) -> None:
        """Marks that were set in the previous server: all of them first, then each watch once, in
        that order as far as it goes.
        """
        inodes: dict[Inode, None] = {}
        for guest, inode, mask in marks:
            if not mask:
                continue
            if inode is not None and not self.interest.of(guest, inode):
                self.table.pin(inode)
                inodes[inode] = None
            self.interest.update(guest, inode, mask)
        self.watches.restore(inodes, order)
        if self.interest.aggregate(None):
            finish(self._tree.covering(self.table.root, announce=False))

    def wait_for_observers(self, patience: float) -> None:
        """Drop observers that do not reconnect within so many seconds."""
        self._give_up_at = time.monotonic() + patience if self.waiting else math.inf

    def reconnect(self, token: bytes, received: int) -> Observer | None:
        """The observer that waits for this token, if there is one."""
        guest = self.waiting.pop(token, None)
        self._change()
        if guest is not None:
            guest.received(received)
        return guest

    def _give_up(self) -> None:
        self._give_up_at = math.inf
        while self.waiting:
            _, guest = self.waiting.popitem()
            self._due("giving up an observer", partial(self.remove_guest, guest))
