"""Orders a guest's own requests after the host's earlier changes that it has not seen yet.

A guest's kernel makes its own events at once, and the host's when the agent replays them. So that
both come in the order of the changes, a request about a name with undelivered changes waits for
these (docs/decisions/one-history.md):

    look-up     answered at once, as the kernel holds the directory's lock: that thread's next
                request about the object found waits; if that opens a file, the kernel has to look
                the name up once more (ESTALE), as the replay has made the name again
    mutation    the kernel holds the lock that the replay needs: upon ESTALE it releases the lock
                and starts again, and the first request of that walk waits
    mark        the GETATTR of the object waits for what is undelivered there, or the new watcher
                would get what happened before its mark

A request that could not wait is reported a second time, after the changes before it
(``is_awaited``). It is one module, as each kind of wait needs the same three positions.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protocol.masks import STRUCTURE, Mask

from ..events.event import Event
from ..events.watcher import HostWatcher
from ..files.caller import Caller
from ..files.inode import Inode
from ..linux import threads

if TYPE_CHECKING:
    from .mount import MountGuest

PATIENCE = 0.25
"""Seconds that a request waits while nothing is delivered or prepared for the agent."""
LONGEST = 3.0
"""Seconds that it waits in all: for about 10,000 orders before it. If the events being delivered
are older than that, no request waits: it would wait in vain."""
PARKED_LIMIT = 24
"""Requests of one guest that may wait. Well below the number served at a time (99 by pyfuse3, 128
in the shortest usual virtqueue), as the agent's own must continue."""
WALKS_LIMIT = 256
"""Threads of one guest that are remembered, about 300 bytes each: those in the middle of a call.
And names that they have changed before earlier changes were delivered."""
RETRIED = 1.0
"""Seconds within which a call that was sent back comes again, even if others hold the directory;
after that it is another call, and may be sent back."""
_STRUCTURE = int(STRUCTURE)
_COUNTED = _STRUCTURE | int(Mask.MODIFY | Mask.ATTRIB)

_QUEUE_LOOK = 256
"""Events of the host's queue among which to search for those of one object."""

Place = tuple[Inode, bytes]
"""A directory, and a name in it; without a name, an object and all that happens in it."""


class Undelivered(Exception):
    """The request has to be served again, once ``wait`` is over."""

    def __init__(self, wait: Wait) -> None:
        super().__init__("changes before it are to be delivered")
        self.wait = wait


@dataclass(slots=True, eq=False)
class _Walk:
    """The state of the call that a thread of the guest is in."""

    places: tuple[Place, ...]
    nodeid: int = (
        0  # that it marks, or found at a place with changes under way; 0: it was sent back
    )
    number: int = 0  # of the next event of the host's as it began, while one before is not routed
    last: int = 0  # position of the last event that it waits for
    is_over: bool = False  # it waits no more
    is_cut: bool = False  # as that took too long
    until: float = field(default_factory=lambda: time.monotonic() + LONGEST + RETRIED)

    def finish(self) -> None:
        """It continues now."""
        self.is_over = True
        self.until = time.monotonic() + RETRIED


class Wait:
    """The wait of one request, which holds no lock of the guest's kernel."""

    def __init__(self, history: History, walk: _Walk) -> None:
        self._history = history
        self.walk = walk
        self._end = time.monotonic() + LONGEST
        self._seen = history.work
        self.wake: Callable[[], None] = _nobody

    def begin(self, wake: Callable[[], None]) -> None:
        """``wake`` is called once it is over, in the middle of other work."""
        self.wake = wake
        self._history.waits[self] = None

    def left(self) -> float:
        """After PATIENCE seconds: how many more to wait; 0 if it is over."""
        history = self._history
        if not history.is_awaiting(self.walk):
            return 0.0
        left = self._end - time.monotonic()
        if left > 0 and history.work != self._seen:
            self._seen = history.work
            return min(left, PATIENCE)
        history.stalled_at = history.progress
        self.cut()
        return 0.0

    def cut(self) -> None:
        """It is over, though something is still to be delivered."""
        self.walk.is_over = self.walk.is_cut = True
        self._history.count_cut()

    def end(self) -> None:
        """The request no longer waits."""
        self._history.waits.pop(self, None)


class History:
    """Names of one guest with undelivered changes, and the requests that wait for them."""

    def __init__(self, guest: MountGuest, watcher: HostWatcher) -> None:
        self._guest = guest
        self._watcher = watcher
        self._is_served = False
        self._take_back: Callable[[Inode], None] | None = None
        # Position of the last event that is not delivered: by which the name comes, goes or moves;
        # and of others
        self._moves: dict[Place, int] = {}
        self._touches: dict[Place, int] = {}
        self._kept: Counter[Place] = Counter()  # the same of events that are not queued yet
        self._overtaken: dict[Place, float] = {}  # time.monotonic() of a request that did not wait
        self._queued = self._delivered = 0  # events, which are delivered in order
        self._lag = 0.0  # seconds from the last one delivered to when it happened
        self._walks: dict[int, _Walk] = {}  # by thread, the oldest first
        self.waits: dict[Wait, None] = {}
        self.progress = 0  # orders delivered
        self.stalled_at = -1  # progress at which a request has waited in vain: no other does

    def serve(self, take_back: Callable[[Inode], None] | None) -> None:
        """A request that raised Undelivered is served again. ``take_back`` makes the guest's kernel
        ask for an inode's attributes again; without it, those of the replayer have to expire.
        """
        self._is_served, self._take_back = True, take_back

    @property
    def work(self) -> int:
        """The progress of the agent and of the work before it: it grows."""
        return self.progress + self._queued

    # Orders

    def hold(self, event: Event) -> None:
        """An event will be queued later (fsd.export.arming)."""
        self._kept.update(_objects(event))
        if event.name and event.kind & _STRUCTURE:
            self._kept.update(_places(event))

    def unhold(self, event: Event) -> None:
        """It is queued next."""
        is_structure = event.name and event.kind & _STRUCTURE
        for place in (*_objects(event), *(_places(event) if is_structure else ())):
            self._kept[place] -= 1
            if self._kept[place] <= 0:
                del self._kept[place]

    def queued(self, event: Event) -> int:
        """An event waits for the agent. Returns its position."""
        if self._delivered == self._queued:
            self._lag = 0.0
        self._queued += 1
        if self._guest.device:
            for place in _objects(event):
                self._moves[place] = self._queued
        if event.name and event.kind & _COUNTED:
            lasts = self._lasts(event)
            for place in _places(event):
                lasts[place] = self._queued
        return self._queued

    def delivered(self, event: Event, position: int) -> None:
        """It was replayed, or dropped, and so were those before it."""
        self._delivered, self._lag = position, time.monotonic() - event.stamp
        lasts = self._lasts(event)
        for place in _places(event):
            if lasts.get(place, position + 1) <= position:
                del lasts[place]
        for place in _objects(event):
            if self._moves.get(place, position + 1) <= position:
                del self._moves[place]
        self.progress += 1
        self.check()

    def opened(self, inode: Inode) -> None:
        """The agent has opened an object, for which its attributes were valid."""
        if self._take_back is not None and not inode.is_dir:
            self._take_back(inode)

    def _lasts(self, event: Event) -> dict[Place, int]:
        return self._moves if event.kind & _STRUCTURE else self._touches

    def is_awaited(self, event: Event) -> bool:
        """Whether a change of this guest's own has overtaken others of the same name, and so has to
        be reported again after them.
        """
        if not event.name or not event.kind & _STRUCTURE:
            return False
        places = _places(event)
        # What it has overtaken may be delivered by now.
        overtaken = [place for place in places if self._has_overtaken(place, event.stamp)]
        return bool(overtaken) or any(map(self._is_undelivered, places))

    def _is_undelivered(self, place: Place) -> bool:
        """Whether a change of the name is routed and not delivered."""
        return place in self._moves or place in self._touches or place in self._kept

    def _has_overtaken(self, place: Place, stamp: float) -> bool:
        at = self._overtaken.get(place)
        if at is None or stamp < at:
            return False
        del self._overtaken[place]
        return stamp < at + RETRIED

    def clear(self) -> None:
        """The guest has disconnected."""
        self._moves.clear()
        self._touches.clear()
        self._kept.clear()
        self._overtaken.clear()
        self._delivered = self._queued
        self._walks.clear()
        self.check()

    # Requests of the guest's programs

    def begins_lookup(self, who: Caller, directory: Inode) -> None:
        """Before a LOOKUP. Raises Undelivered."""
        walk = self._walk(who)
        if walk is None:
            return
        if walk.nodeid:
            del self._walks[who.pid]
        elif any(directory is place[0] for place in walk.places):
            walk.finish()  # its kernel may hold the lock by now
        else:
            self._await(walk)

    def looked_up(self, who: Caller, directory: Inode, name: bytes, found: Inode) -> None:
        """After it."""
        if self._walk(who) is None and self._is_being_marked(who, found):
            self._begin_mark(who, found)
            if self._take_back is not None:
                self._take_back(found)
        place = directory, name
        if self._walk(who) is None and self._may_wait(who, place):
            self._remember(who, self._begun(_Walk((place,), found.nodeid)))

    def asks(self, who: Caller, inode: Inode) -> None:
        """Before GETATTR. Raises Undelivered."""
        walk = self._walk(who)
        if walk is None and self._is_being_marked(who, inode):
            walk = self._begin_mark(who, inode)
        if walk is not None and walk.nodeid in (0, inode.nodeid):
            self._await(walk)
            if (inode, b"") in walk.places:
                del self._walks[who.pid]

    def _begin_mark(self, who: Caller, inode: Inode) -> _Walk:
        walk = self._begun(_Walk(((inode, b""),), inode.nodeid))
        self._remember(who, walk)
        return walk

    def _is_being_marked(self, who: Caller, inode: Inode) -> bool:
        """Whether the thread sets a mark on an object about which there is something to deliver, on
        a mount of this machine: one on another machine's cannot be seen before it is set.
        """
        place = inode, b""
        if not self._guest.device or not self._is_changing(place):
            return False
        name = inode.name if inode.parent is not None else os.fsencode(self._guest.name)
        return threads.sets_mark(who.pid, os.path.basename(name)) and self._may_wait(who, place)

    @contextmanager
    def coming(self, who: Caller, again: bool) -> Iterator[None]:
        """Serve a call that comes for the first time, or ``again``."""
        try:
            yield
        except OSError as error:
            raise self.as_program_error(who, error, again=again) from None

    def as_program_error(self, who: Caller, error: OSError, *, again: bool = False) -> OSError:
        """The error of a call: on ESTALE the guest's kernel starts it again, once. After that, it
        is an error that programs know.
        """
        if error.errno == errno.ESTALE and (self._has_come_again(who) or again):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return error

    def _has_come_again(self, who: Caller) -> bool:
        """Whether it has; else it is remembered that it will."""
        walk = self._walk(who)
        if walk is not None and not walk.nodeid:
            return True
        if self._is_served and self._guest.pid and who.pid:
            self._remember(who, _retried())
        return False

    def opens(self, who: Caller, inode: Inode) -> bool:
        """Before OPEN and OPENDIR. Returns whether it has come again: an ESTALE would be passed on
        to the program. Raises Undelivered, OSError ESTALE.
        """
        walk = self._walk(who)
        if walk is None:
            return False
        if walk.nodeid == inode.nodeid:
            self._await(walk)
            if not walk.is_cut and not inode.is_dir:  # the kernel moves a directory's own name
                self._send_back(who, _retried())
        del self._walks[who.pid]
        return not walk.nodeid

    def changes(self, who: Caller, *places: Place) -> bool:
        """Before a mutation of names. Returns whether it has come again. Raises OSError ESTALE: it
        has to.
        """
        walk = self._walk(who)
        if walk is not None:
            del self._walks[who.pid]
        again = walk is not None and not walk.nodeid
        if not again and self._may_wait(who, *places):
            if self._take_back is not None:
                for directory, _ in places:
                    self._take_back(directory)
            self._send_back(who, self._begun(_Walk(places)))
        self.overtakes(*places, queued=again)
        return again

    def overtakes(self, *places: Place, queued: bool = True) -> None:
        """A mutation of names is carried out now, whatever is undelivered; ``queued``: some may not
        even be routed.
        """
        for place in places if self._guest.pid else ():
            if self._is_undelivered(place) or (queued and self._is_queued(place)):
                self._overtaken.pop(place, None)
                self._overtaken[place] = time.monotonic()
                if len(self._overtaken) > WALKS_LIMIT:
                    del self._overtaken[next(iter(self._overtaken))]

    def is_sought(self, directory: Inode) -> bool:
        """Whether a thread that was sent back will ask for the directory's attributes before its
        kernel takes the lock, or before it sets a mark: these must not be valid longer.
        """
        return any(
            (not walk.nodeid or (directory, b"") in walk.places)
            and not walk.is_over
            and any(directory is p[0] for p in walk.places)
            for walk in self._walks.values()
        )

    def _send_back(self, who: Caller, walk: _Walk) -> None:
        self._remember(who, walk)
        self._guest.counts["sent_back"] += 1
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _remember(self, who: Caller, walk: _Walk) -> None:
        self._walks.pop(who.pid, None)
        self._walks[who.pid] = walk
        if len(self._walks) > WALKS_LIMIT:
            del self._walks[next(iter(self._walks))]

    def _walk(self, who: Caller) -> _Walk | None:
        if not self._walks:
            return None
        walk = self._walks.get(who.pid)
        if walk is not None and time.monotonic() > walk.until:
            del self._walks[who.pid]
            return None
        return walk

    # Waiting

    def _may_wait(self, who: Caller, *places: Place) -> bool:
        """Whether changes of these names are undelivered, and worth waiting for."""
        guest = self._guest
        if not self._is_served or not guest.pid or not who.pid or guest.is_paused:
            return False
        if not any(map(self._is_changing, places)):
            return False
        is_stuck = self.progress == self.stalled_at or self._lag > LONGEST
        if is_stuck or len(self.waits) >= PARKED_LIMIT:
            self.count_cut()
            return False
        return True

    def _await(self, walk: _Walk) -> None:
        """Raises Undelivered if there is something to wait for."""
        if walk.is_over:
            return
        if self.is_awaiting(walk):
            if len(self.waits) < PARKED_LIMIT:
                self._guest.counts["waited"] += 1
                raise Undelivered(Wait(self, walk))
            walk.is_cut = True
            self.count_cut()
        walk.finish()

    def is_awaiting(self, walk: _Walk) -> bool:
        """Whether changes before a call are undelivered, and will be delivered."""
        if walk.is_over or not self._guest.pid or self._guest.is_paused:
            return False
        if walk.number:
            if not self._watcher.queue.is_past(walk.number):
                return True
            if any(place in self._kept for place in walk.places):
                return True
            walk.number, walk.last = 0, self._last(walk.places)
        return self._delivered < walk.last

    def _begun(self, walk: _Walk) -> _Walk:
        """It waits for everything that has happened up to now."""
        watcher = self._watcher
        walk.last = self._last(walk.places)
        if any(place in self._kept or self._is_queued(place) for place in walk.places):
            walk.number = watcher.queue.next_number
        return walk

    def _last(self, places: tuple[Place, ...]) -> int:
        return max((self._moves.get(place, 0) for place in places), default=0)

    def _is_changing(self, place: Place) -> bool:
        """Whether an undelivered change creates, removes or replaces the name."""
        if place in self._moves or place in self._kept:
            return True
        return self._is_queued(place)

    def _is_queued(self, place: Place) -> bool:
        """Whether such a change of another party's may not be routed yet."""
        inode, name = place
        if name:
            return self._watcher.is_changing(inode, name, self._guest)
        return self._watcher.is_touching(inode, self._guest, _QUEUE_LOOK)

    def check(self) -> None:
        """Let requests continue whose wait is over."""
        if not self.waits:
            return
        for wait in [wait for wait in self.waits if not self.is_awaiting(wait.walk)]:
            wait.end()
            wait.wake()

    def count_cut(self) -> None:
        """A request has waited in vain."""
        self._guest.counts["waits_cut"] += 1


def _places(event: Event) -> tuple[Place, ...]:
    place = event.node, event.name
    return (place,) if event.node2 is None else (place, (event.node2, event.name2))


def _objects(event: Event) -> Iterator[Place]:
    """What a new mark may be on that would get the event."""
    for inode in {event.node, event.node2, event.child, event.replaced}:
        if inode is not None:
            yield inode, b""


def _retried() -> _Walk:
    """The state of a call that has been sent back, with nothing left to wait for."""
    walk = _Walk(())
    walk.finish()
    return walk


def _nobody() -> None:
    """It does not wait yet."""
