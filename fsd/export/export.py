"""The Export: one shared directory, its guests, and the way of an event between them.

host inotify -> HostWatcher -> Resolver -> here: own echo? interest? -> each guest's outbox.
Here too: which host watches that interest asks for, and what is told after events were lost.
Synchronous; the transports call it, and call ``process`` when there is work (``next_deadline``).
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import structlog

from protocol import masks
from protocol.handles import NodeKey
from protocol.masks import EVENTS, Mask

from ..events.compare import Changes, Comparer
from ..events.event import RENAME, Event
from ..events.missed import CLOCK_LAG_NS
from ..events.reading import Reader
from ..events.resolver import Resolver
from ..events.watcher import DIRECTORY, HOST, MARKED, SERVER, HostWatcher
from ..files.inode import Inode
from ..files.listing import Known, listing, of_inode
from ..files.locks import LockWaiters
from ..files.passthrough import PassthroughFS
from ..files.table import InodeTable
from ..guests.guest import (
    BY_HAND,
    FIRST,
    MARKS_LIMIT,
    OUTBOX_LIMIT,
    SECOND,
    Guest,
    HandMarks,
    Observer,
)
from ..guests.mount import MountGuest
from ..linux import syscalls
from ..linux.descriptors import share
from ..linux.openers import File, Openers
from ..pacing import windows
from ..pacing.chores import TURN, Chores, Job, Pause, begin, finish
from ..pacing.guard import PAUSE, Guard
from ..pacing.turn import Turn
from .arming import Arming
from .interest import Interest
from .watchlimit import default_limit, has_part

log = structlog.get_logger()
_LEAVES = int(Mask.DELETE | Mask.DELETE_SELF | Mask.MOVED_FROM | Mask.MOVED_TO)
_MOVED_FROM, _MOVED_TO = int(Mask.MOVED_FROM), int(Mask.MOVED_TO)
_OWN = int(Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE)
_CREATE, _ISDIR = int(Mask.CREATE), int(Mask.ISDIR)
_OVERFLOW, _IGNORED = int(Mask.Q_OVERFLOW), int(Mask.IGNORED)
_UNMOUNT = int(Mask.UNMOUNT)
_SETTLING = 2 * CLOCK_LAG_NS / 1e9
"""Seconds without a change after which file times tell later changes from earlier ones."""
COMPARE_EVERY = 2.0
"""Seconds between comparisons of a directory that the host gave no watch for (ENOSPC)."""
COMPARE_SHARE = 9
"""Comparing them all is followed by at least this many times its own duration of rest."""
CHANGES_LIMIT = 4096
"""Changed names that such comparisons gather before they are told, to find moves among them."""
CHUNKS_AT_ONCE = 8
"""Reads of a directory's names at once, before the rest becomes a chore: 8,000 names, 10 ms."""


class Export:
    """One shared directory. Raises OSError where ``source`` cannot be opened.

    ``read_only``: to its guests; what the host changes is announced all the same.
    ``overflow_after_loss``: observers get IN_Q_OVERFLOW for losses that are made up for, too.
    """

    def __init__(
        self,
        source: str,
        *,
        read_only: bool = False,
        outbox_limit: int = OUTBOX_LIMIT,
        watch_limit: int | None = None,
        overflow_after_loss: bool = False,
    ) -> None:
        self.source = source
        self.read_only = read_only
        self.watch_limit = default_limit() if watch_limit is None else watch_limit
        self.table = InodeTable(source)
        self.fs = PassthroughFS(self.table)
        self.watcher = HostWatcher(self.table, watch_limit=self.watch_limit)
        self.reader = Reader(self.table, self.watcher)
        self.comparer = Comparer(self.fs, self.watcher, self.reader, self.look_later)
        self._resolver = Resolver(self.fs, self.watcher)
        self.interest = Interest()
        self.guests: list[Guest] = []
        self.lock_waiters = LockWaiters()
        self.descriptors = share()
        """That each guest may have, for files that it has open."""
        self.arming = Arming(self)
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, int]] = Counter()
        self.unwatched: dict[Inode, str] = {}  # wanted, but the host gave no watch: why
        self._uncovered: dict[Inode, bool] = {}  # to cover once more: whether to announce
        self._unchecked = False  # whether the kernel has ended watches, and the news was lost
        self._care: dict[Inode, Inode] = {}  # watched object -> the directory that names it
        self._cared_for: Counter[Inode] = Counter()
        self.waiting: dict[bytes, Observer] = {}  # by token: observers that may come back
        self.is_stopping = False  # channels that end now may come back
        self.is_changed = False  # since the state was saved
        self.confirmed_ns = 0  # up to then, listings are known to be right
        self.on_change: Callable[[], None] = _nobody
        self.on_name: Callable[[Inode, bytes, Inode], None] = _unnoted
        """Told of each name that comes: its directory, it, and what it stands for."""
        self.checkpoint: Callable[[], dict[str, Any]] | None = None  # saves it, where that may be
        self._outbox_limit = outbox_limit
        self._overflow_after_loss = overflow_after_loss
        self._give_up_at = math.inf  # on those who wait
        self._compare_at = math.inf
        self._openers = Openers(self._lone_files)
        self.chores = Chores()
        self.turn = Turn()
        """In which events are processed: what waits for them is answered at its end."""
        self._steps: deque[Job[None]] = deque()  # of the way of events: no event goes on before
        self._whole: Job[None] | None = None  # brings the watches of the whole tree in line
        self._unread: dict[Inode, None] = {}  # watched directories whose names are still to be read
        self._paused_until = 0.0  # after a fault
        self.started = time.time()

    def close(self) -> None:
        """Drop watches and descriptors."""
        self.chores.close()
        for step in self._steps:
            step.close()
        self.fs.successors.close()
        self.watcher.close()
        self.table.close()

    # Guests

    def add_mount_guest(self, name: str, *, is_local: bool = False) -> MountGuest:
        """A mount with an agent: another machine's, or (``is_local``) one of this machine."""
        limit, openers = self._outbox_limit, self._openers
        guest = MountGuest(name, self.fs, self.watcher, openers, limit=limit, is_local=is_local)
        guest.asks = partial(self.interest.of, guest)
        self.guests.append(guest)
        return guest

    def add_observer(self, name: str) -> Observer:
        """A guest that reads events."""
        hears = self._overflow_after_loss
        guest = Observer(name, limit=self._outbox_limit, hears_losses=hears)
        self.guests.append(guest)
        return guest

    def hand_marks(self, via: MountGuest | None = None) -> HandMarks:
        """The guest that stands for marks set by hand in the mount ``via``: each machine has one,
        and this host has one for all its mounts and sockets.
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
        """The machine has gone, or has started anew: its marks by hand go with it."""
        marks = self._hand_marks_of(via)
        if marks is not None:
            self.remove_guest(marks)

    def remove_guest(self, guest: Guest) -> None:
        """The guest has gone, and its marks with it: many of them a few at a time."""
        if isinstance(guest, MountGuest):
            self.drop_hand_marks(guest)
        self.arming.forget(guest)
        self.guests.remove(guest)
        if isinstance(guest, MountGuest):
            for inode in self.interest.marks(guest):
                guest.on_mark(0 if inode is None else inode.nodeid, 0)
        guest.leave()
        self.chores.do(self, self._dropping_marks(guest))

    def _dropping_marks(self, guest: Guest) -> Job[None]:
        for inode in list(self.interest.marks(guest)):
            self._set_interest(guest, inode, Mask(0))
            yield None
        if not self.guests and not self.is_stopping:  # nobody is left who could hold a file handle
            self.table.forgotten.clear()

    def update(self, guest: Guest, key: NodeKey, bits: int) -> Inode | None:
        """fsnotify_update. Raises MaskError (EINVAL), OSError ESTALE for an unknown node, ENOSPC
        where the guest has too many marks or the host gives no watch (the mark holds all the
        same: the directory is compared periodically).
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
            self.check_watched(inode)
        return inode

    def check_watched(self, inode: Inode | None) -> None:
        """Raises OSError ENOSPC where the host gave no watch for an inode; of None, for any."""
        if inode in self.unwatched or (inode is None and self.unwatched):
            reason = next(iter(self.unwatched.values())) if inode is None else self.unwatched[inode]
            raise OSError(errno.ENOSPC, reason)

    def _set_interest(self, guest: Guest, inode: Inode | None, mask: Mask) -> None:
        self._change()
        had = self.interest.of(guest, inode)
        before, after = self.interest.update(guest, inode, mask)
        if isinstance(guest, MountGuest) and had != mask:
            guest.on_mark(0 if inode is None else inode.nodeid, int(mask))
        if inode is None:
            if before != after:
                self._bring_in_line(after)
            return
        if mask and not had:
            self.table.pin(inode)
        if before != after:
            self._set_care(inode)
            self.set_watch(inode)
        if had and not mask:
            self.table.unpin(inode)

    # Host watches

    def _wanted(self, inode: Inode) -> Mask:
        """What the host is to be watched for: the aggregate, and what keeps names right."""
        mask = self.interest.aggregate(inode) | self.arming.files.coming(inode)
        if mask:
            mask |= MARKED
        if inode.is_dir:
            mask |= self.interest.aggregate(None)
            if inode in self.arming:
                mask = EVENTS
            if mask or inode in self._cared_for:
                mask |= DIRECTORY
        return mask

    def set_watch(self, inode: Inode) -> None:
        """Bring the host watch of an inode in line with what is wanted."""
        mask = self._wanted(inode)
        try:
            if mask and not self.watcher.mask_of(inode):
                self._check_part(inode)
            self.watcher.set_mask(inode, mask)
        except OSError as error:
            if syscalls.is_gone(error):  # its events say so
                self._allowed(inode)
                return
            self.counts["watch_failures"] += 1
            self.look_later(inode, error)
        else:
            self._allowed(inode)
        if not mask:
            inode.listing = None
            self._unread.pop(inode, None)
        elif inode.is_dir and (self._is_armed(inode) or inode in self._cared_for):
            self._take_listing(inode)

    def _check_part(self, inode: Inode) -> None:
        """Raises OSError ENOSPC where all who want the watch have had their part."""
        interested = self.interest.guests(inode) | self.interest.guests(None)
        used, limit = len(self.watcher), self.watch_limit
        if limit is None or not interested:
            return
        if not has_part(interested, self.guests, self.interest, used, limit):
            raise OSError(errno.ENOSPC, "the guest's part of the host watches is used up")

    def _allowed(self, inode: Inode) -> None:
        """The host refuses no watch of it any more."""
        if self.unwatched.pop(inode, None) is not None:
            self.table.unpin(inode)

    def _is_armed(self, inode: Inode) -> bool:
        return bool(self.interest.aggregate(inode) or self.interest.aggregate(None))

    def _take_listing(self, inode: Inode) -> None:
        """Know the names of a directory that somebody watches, to compare with later: those of a
        huge one by and by.
        """
        if listing(inode).complete or inode in self._unread:
            return
        reading = self._reading(inode)
        if not begin(reading, CHUNKS_AT_ONCE):
            reading.close()
            if not self._unread:
                self.chores.add(self, self._reading_on())
            self._unread[inode] = None

    def look_later(self, inode: Inode, error: OSError) -> None:
        """Nobody could look at it, which says nothing of it: it is tried again, and compared."""
        self.counts["looks_failed"] += 1
        if inode not in self.unwatched:
            self.table.pin(inode)
        self.unwatched[inode] = error.strerror or str(error)
        self._compare_at = min(self._compare_at, time.monotonic() + COMPARE_EVERY)

    def _reading_on(self) -> Job[None]:
        """One after the other, as each needs a descriptor."""
        while self._unread:
            inode = next(iter(self._unread))
            yield from self._reading(inode)
            self._unread.pop(inode, None)

    def _reading(self, inode: Inode) -> Job[None]:
        """Take in the names of a directory. What its events say meanwhile holds: a part is taken in
        as soon as it is read, so that no event is handled between.
        """
        known = listing(inode)
        try:
            for names in self.reader.names_in(inode):
                if inode.listing is not known:
                    return  # nobody watches it any more
                for name, entry in names.items():
                    known.names.setdefault(name, entry.of(inode.children.get(name)))
                yield None
        except OSError as error:
            self.look_later(inode, error)
        else:
            known.complete = True

    def _set_care(self, inode: Inode) -> None:
        """A watched object's directory is watched too, so that its removal comes with a name."""
        parent = inode.parent if self.interest.aggregate(inode) else None
        old = self._care.pop(inode, None)
        if parent is not None:
            self._care[inode] = parent
        if old is parent:
            return
        for directory, step in ((parent, 1), (old, -1)):
            if directory is None:
                continue
            self._cared_for[directory] += step
            if not self._cared_for[directory]:
                del self._cared_for[directory]
            self.set_watch(directory)

    def is_arming(self, inode: Inode | None) -> bool:
        """Whether interest in an inode is not in force yet: a huge directory's names are still to
        be read, or (None) the watches of the whole tree to be brought in line.
        """
        return inode in self._unread if inode is not None else self._whole is not None

    def _bring_in_line(self, mask: Mask) -> None:
        """Interest in the whole file system has changed. However often it does, one walk is under
        way: the latest.
        """
        if self._whole is not None:
            self._whole.close()
        self._whole = job = self._covering_all(mask)
        self.chores.do(self, job)

    def _covering_all(self, mask: Mask) -> Job[None]:
        try:
            if mask:
                yield from self._covering(self.table.root, announce=False)
                return
            for node in [*self.watcher.inodes(), *self.unwatched]:
                self.set_watch(node)
                yield None
        finally:
            self._whole = None

    def _covering(self, top: Inode, *, announce: bool) -> Job[None]:
        """Watch a tree for whole-file-system interest; announce what was in it before the watch."""
        self.table.pin(top)
        todo = [top]
        try:
            while todo and self.interest.aggregate(None):
                node = todo.pop()
                try:
                    yield from self._covering_one(node, todo, announce=announce)
                finally:
                    self.table.unpin(node)
        finally:
            for node in todo:
                self.table.unpin(node)

    def _covering_one(self, node: Inode, todo: list[Inode], *, announce: bool) -> Job[None]:
        known = set(listing(node).names) if announce else set()
        self.set_watch(node)
        yield None
        if not listing(node).complete:
            yield from self._reading(node)
            if node in self.unwatched:
                self._uncovered[node] = announce
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
                child = self.fs.peek(node, name).inode
            except OSError as error:
                if not syscalls.is_gone(error):
                    self.look_later(node, error)
                    self._uncovered[node] = announce
                continue
            if announce and name not in known:
                mask = _CREATE | (_ISDIR if child.is_dir else 0)
                event = Event(node, mask, name, 0, HOST, time.monotonic(), child)
                names[name] = of_inode(child)
                self._route(event)
            if child.is_dir and child.kind == (entry.kind or child.kind):
                self.table.pin(child)
                todo.append(child)
            else:
                self.table.release(child)
            yield None

    # Events

    def process(self, budget: int) -> None:
        """Route up to ``budget`` events, do what is due, and a turn of what takes longer."""
        self.route(budget)
        self._due("planning", self._plan)
        now = time.monotonic()
        self._due("ending a watch", partial(self.arming.expire, now))
        self._due("forgetting successors", partial(self.fs.successors.expire, now))
        if now >= self._give_up_at:
            self._due("giving up an observer", self._give_up)
        if now >= self._compare_at:
            self._compare_at = math.inf
            self.chores.add(self, self._looking_again())
        if self.chores:
            self.counts["faults"] += self.chores.run()
        for guest in self.guests:
            if isinstance(guest, MountGuest):
                guest.history.check()

    def _due(self, what: str, do: Callable[[], None]) -> None:
        """Work that is due: where it fails, the rest is done, and it is tried again later."""
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
                self._steps.append(self._arriving())
            if not self._step(end) or self._resolver.waiting_until is not None:
                break

    def _step(self, end: float) -> bool:
        """Work on the first step until then; whether it is done."""
        try:
            for _ in self._steps[0]:
                if time.monotonic() >= end:
                    return False
        except Exception:  # a fault in one event never ends the process
            self.counts["faults"] += 1
            log.exception("event failed")
        self._steps.popleft()
        return True

    def _arriving(self) -> Job[None]:
        for event in self._resolver.next():
            yield from self._handle(event)

    @property
    def is_behind(self) -> bool:
        """Whether something that has happened is not routed yet."""
        return bool(self._steps or self.watcher.backlog)

    def has_routed(self, stamp: float) -> bool:
        """Whether everything is routed that was read from the host up to then."""
        waiting = self.watcher.peek(1)
        return not self._steps and (not waiting or waiting[0].stamp > stamp)

    @property
    def is_busy(self) -> bool:
        """Whether there is work for the next turn."""
        return self.is_behind or bool(self.chores)

    def _looking_again(self) -> Job[None]:
        """Try again what the host has refused, and tell what has changed there since. The next time
        comes the later, the longer this takes.
        """
        begun = time.monotonic()
        refused, uncovered = list(self.unwatched), self._uncovered
        self._uncovered = {}
        if self._unchecked:
            self._check_watches()
        changes: Changes = {}
        for node in refused:
            self.set_watch(node)  # a watch may have become free
            yield from self._between_events(self._comparing(node, changes, at_once=True))
            if len(changes) >= CHANGES_LIMIT:
                yield from self._between_events(self._telling(changes))
                changes = {}
        for node, announce in uncovered.items():
            yield from self._between_events(self._covering(node, announce=announce))
        self.counts["resyncs"] += 1
        yield from self._between_events(self._telling(changes))
        if self.unwatched:
            now = time.monotonic()
            pause = max(COMPARE_EVERY, COMPARE_SHARE * (now - begun))
            self._compare_at = min(self._compare_at, now + pause)

    def _between_events(self, job: Job[None]) -> Job[None]:
        """Do a job before the next event is handled."""
        self._steps.append(job)
        while job in self._steps:
            yield Pause.LATER

    def _plan(self) -> None:
        """Let replaying guests make orders, once they see as far ahead as there is to see."""
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
        """time.monotonic() at which ``process`` has something to do; inf at rest."""
        if self._steps or self.chores:
            return 0.0
        if self.watcher.backlog and self._resolver.waiting_until is None:
            return 0.0
        due = [self._resolver.waiting_until or math.inf, self.arming.deadline, self._compare_at]
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
            yield from self._resyncing(self.watcher.inodes())
            return
        if event.mask & _UNMOUNT:  # of what lies on another mount than the share
            self._died(event.node)
            self.table.retire(event.node)
            return
        if event.mask & _IGNORED:
            self._watch_ended(event.node)
            return
        self._route(event)
        child = event.child
        if child is not None and event.name:
            if event.mask & (_MOVED_FROM | _MOVED_TO):
                for moved in (child, event.replaced):
                    if moved is not None and moved in self._care:
                        self._set_care(moved)
            yield from self._cover_arrival(event, child)
            if event.node2 is not None:
                self.on_name(event.node2, event.name2, child)
            elif event.mask & (_CREATE | _MOVED_TO):
                self.on_name(event.node, event.name, child)
        for inode in (child, event.replaced):
            if inode is not None:
                self.table.release(inode)

    def _cover_arrival(self, event: Event, child: Inode) -> Job[None]:
        """Whole-file-system interest extends to a directory that has come."""
        if event.mask & (_CREATE | _MOVED_TO) and child.is_dir and self.interest.aggregate(None):
            yield from self._covering(child, announce=bool(event.mask & _CREATE))

    def _watch_ended(self, inode: Inode) -> None:
        """The host's kernel removed a watch: the object is gone, or its file system is."""
        inode.listing = None
        self._allowed(inode)

    def _route(self, event: Event) -> None:
        if event.origin is SERVER:
            self.counts["own"] += 1
            return
        self.arming.remember(event)
        for guest in self._candidates(event):
            halves = self.wanted_halves(guest, event)
            if not halves:
                continue
            if guest is event.origin:
                if not isinstance(guest, MountGuest) or not guest.history.is_awaited(event):
                    guest.count("echo", event.mask)
                    continue
                guest.count("repeated", event.mask)
            self.counts["forwarded"] += 1
            guest.count("forwarded", event.mask)
            if self.follows(guest, event):
                guest.count("coalesced", event.mask)
                continue
            if not self.arming.holds(guest, event, halves):
                guest.offer(event, halves)

    def follows(self, guest: Guest, event: Event) -> bool:
        """Whether a guest's kernel makes the event by itself, from what it is told by name."""
        named = event.part_of
        if named is None or not isinstance(guest, MountGuest):
            return False
        return bool(self.wanted_halves(guest, named))

    def _candidates(self, event: Event) -> list[Guest]:
        """Guests with a mark on anything that the event touches (a rename touches four)."""
        guests: dict[Guest, Mask] = dict(self.interest.guests(None))
        for inode in (event.node, event.node2, event.child, event.replaced):
            if inode is not None:
                guests |= self.interest.guests(inode)
        return list(guests)

    def wanted_halves(self, guest: Guest, event: Event) -> int:
        """Which halves of an event the guest asked for; 0 = none.

        A replaying guest also gets what removes, moves or replaces an object that it watches:
        its kernel makes the object's own events of that.
        """
        of = self.interest.of
        whole = int(of(guest, None))
        kind = event.kind
        if kind == RENAME:
            assert event.node2 is not None
            halves = FIRST if (int(of(guest, event.node)) | whole) & _MOVED_FROM else 0
            if (int(of(guest, event.node2)) | whole) & _MOVED_TO:
                halves |= SECOND
        else:
            halves = FIRST if (int(of(guest, event.node)) | whole) & kind else 0
        if halves or not isinstance(guest, MountGuest) or not kind & _LEAVES:
            return halves
        ends = (event.child, event.replaced) if event.name else (event.node,)
        return FIRST if any(i is not None and of(guest, i) for i in ends) else 0

    # After lost events

    def _resync(self, directories: list[Inode]) -> None:
        """``_resyncing`` in one go."""
        finish(self._resyncing(directories))

    def _resyncing(self, directories: list[Inode]) -> Job[None]:
        """Compare directories with what was told of them, and tell everyone the difference."""
        self.counts["resyncs"] += 1
        self._check_watches()
        yield from self._comparing_all(directories)

    def _comparing_all(self, directories: list[Inode]) -> Job[None]:
        changes: Changes = {}
        for node in directories:
            yield from self._comparing(node, changes)
            yield None
        yield from self._telling(changes)

    def _comparing(self, node: Inode, changes: Changes, *, at_once: bool = False) -> Job[None]:
        if node.is_dir and node.listing is not None and node.listing.complete:
            compare = self.comparer.comparing_at_once if at_once else self.comparer.comparing
            changes.update((yield from compare(node, node.listing)))

    def _telling(self, changes: Changes) -> Job[None]:
        for event in self.comparer.told(changes):
            yield None
            self._route(event)
            if event.child is not None and event.name:
                yield from self._cover_arrival(event, event.child)
                mask = int(Mask.MOVE_SELF) if event.kind == RENAME else event.mask
                if event.kind & (_OWN | _MOVED_FROM) and self.interest.aggregate(event.child):
                    own = Event(event.child, mask, b"", 0, HOST, event.stamp, event.child)
                    own.part_of = event
                    self._route(own)

    def _check_watches(self) -> None:
        """Notice watches that ended while events were lost, their IN_IGNORED among them."""
        self._unchecked = False
        try:
            ended = self.watcher.ended()
        except OSError:
            self.counts["looks_failed"] += 1
            self._unchecked = True
            self._compare_at = min(self._compare_at, time.monotonic() + COMPARE_EVERY)
            return
        for inode, wd in ended:
            self._died(inode)
            self.watcher.forget(wd)
            self._watch_ended(inode)

    def _died(self, inode: Inode) -> None:
        mask = int(Mask.DELETE_SELF)  # never with ISDIR
        self._route(Event(inode, mask, b"", 0, HOST, time.monotonic(), inode))

    # After a restart (fsd.checkpoint.restore)

    def _change(self) -> None:
        if not self.is_changed:
            self.is_changed = True
            self.on_change()

    def settle(self, patience: float) -> None:
        """Tell all that has happened, before the state is saved. Waits up to ``patience`` seconds
        for a moment in which nothing does: what changed just before would be told again.
        """
        deadline = time.monotonic() + patience
        self.watcher.drain()
        while not self.is_settled and time.monotonic() < deadline:
            self.process(self.watcher.backlog + 1)
            time.sleep(_SETTLING / 10)
            self.watcher.drain()

    def hand_over(self, patience: float) -> int:
        """Tell all that has happened, and leave to the next process what happens from now on.
        Returns the inotify instance in which that is queued; -1 where something could not be told
        within ``patience`` seconds. Nothing but the state may be asked for afterwards.
        """
        deadline = time.monotonic() + patience
        self._work_off(deadline, drain=True)
        root_fd = self.table.reach.root_fd
        # As the end of this process would close it.
        with self.reader.looking(self.table.root, root_fd):
            path_fd = os.open(syscalls.fd_path(root_fd), os.O_PATH | os.O_CLOEXEC)
            os.dup2(path_fd, root_fd, inheritable=False)
            os.close(path_fd)
        inotify = self.watcher.hand_over()
        self._work_off(deadline + patience, drain=False)
        return -1 if self.is_behind else inotify

    def _work_off(self, deadline: float, *, drain: bool) -> None:
        while time.monotonic() < deadline:
            if drain:
                self.watcher.drain()
            if not self.is_busy:
                break
            self.process(self.watcher.backlog + 1)
            if self._resolver.waiting_until is not None:
                time.sleep(0.001)

    @property
    def is_settled(self) -> bool:
        """Whether all is told, and nothing has changed for a moment."""
        quiet = time.monotonic() - self.watcher.last_activity > _SETTLING
        return quiet and not self.is_behind

    def resume_marks(
        self, marks: Iterable[tuple[Guest, Inode | None, Mask]], order: Iterable[Inode]
    ) -> None:
        """Marks that were set in the server before: all of them first, then each watch once, in
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
        for inode in inodes:
            if inode.parent is not None:
                self._care[inode] = inode.parent
                self._cared_for[inode.parent] += 1
        for inode in dict.fromkeys((*order, *inodes, *self._cared_for)):
            self.set_watch(inode)
        if self.interest.aggregate(None):
            finish(self._covering(self.table.root, announce=False))

    def drop_watches(self, inodes: Iterable[Inode]) -> None:
        """Watch none of these that nobody is interested in."""
        for inode in inodes:
            if not self._wanted(inode):
                self.set_watch(inode)

    def resume(self, patience: float, *, compare: bool = True) -> None:
        """Tell what happened since the listings were saved. Observers that do not come back within
        ``patience`` seconds are given up.
        """
        watched, refused = self.watcher.mask_of, self.unwatched
        missing = [i for i in self.interest.inodes() if not watched(i) and i not in refused]
        # What is reached by its path alone may only have moved: the comparison finds it again.
        dead = [inode for inode in missing if self.table.reach.handle_opens(inode.identity)]
        if compare:
            self._compare([*self.watcher.inodes(), *dead])
        for inode in missing:
            self.set_watch(inode)
            if inode not in dead:
                self._compare([inode])
            if not self.watcher.mask_of(inode) and inode not in self.unwatched:
                self._died(inode)
        self._give_up_at = time.monotonic() + patience if self.waiting else math.inf

    def _compare(self, nodes: list[Inode]) -> None:
        changes: Changes = {}
        for node in nodes:
            if node.is_dir and node.listing is not None and node.listing.complete:
                changes.update(finish(self.comparer.comparing_at_once(node, node.listing)))
        finish(self._telling(changes))

    def come_back(self, token: bytes, received: int) -> Observer | None:
        """The observer that waits for whoever has the token, if it is one."""
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

    def catch_up(self, guest: Guest) -> None:
        """Tell a guest what it missed, now that its outbox is empty, before any other event."""
        changes, since_ns = guest.caught_up()
        guest.counts["resyncs"] += 1
        catching_up = self._catching_up(guest, changes, since_ns)
        if self._steps or not begin(catching_up):
            self._steps.append(catching_up)

    def _catching_up(self, guest: Guest, changes: Changes, since_ns: int) -> Job[None]:
        if since_ns:
            whole = self.interest.of(guest, None)
            nodes = self.watcher.inodes() if whole else list(self.interest.marks(guest))
            for node in nodes:
                if node is not None and node.is_dir:
                    changes.update((yield from self.comparer.changed_lately(node, since_ns)))
        for event in self.comparer.told(changes):
            halves = self.wanted_halves(guest, event)
            if halves:
                guest.offer(event, halves)
            yield None


def _unnoted(directory: Inode, name: bytes, child: Inode) -> None:
    """Nobody writes down what comes."""


def _nobody() -> None:
    """Nobody keeps the state."""


def _may_be_dir(entry: Known) -> bool:
    return entry.kind in (stat.S_IFDIR, 0)
