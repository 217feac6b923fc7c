"""The host watcher: inotify watches on inodes, and their events in queue order with an origin.

pyinotify sets the watches (through /proc/self/fd/N, so that a rename cannot mislead them). Events
are read here in large buffers, because pyinotify's own reader is slow and fails on names that are
not UTF-8. Origin is decided by attribution: an event that arrives while one of the server's own
system calls runs, and matches it, belongs to the call's caller (docs/decisions/attribution.md).
It is one module, as what sets, changes and ends a watch has to agree.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import pyinotify

from protocol.fdinfo import parse_fdinfo
from protocol.inotify import RawEvent, parse_events
from protocol.masks import SELF, STRUCTURE, Mask

from ..files.inode import Inode
from ..files.table import InodeTable
from ..linux import syscalls
from ..linux.ioctls import FIONREAD, SETNEXTWD
from ..linux.libc import last_error
from .attribution import LOOKS, Bits, CallsElsewhere, Expected, Finds, expected_among, look_among
from .backed import TOUCHES, BackedFiles
from .backlog import Backlog
from .event import HOST, SERVER, Origin
from .sharedwatches import SharedWatches

_READ_SIZE = 256 * 1024
_LONGEST_EVENT = 16 + 256
"""Bytes: read(2) fails with room for less than the next."""
LONG_BACKLOG = 8192
"""Waiting events, about 0.3 s of work, beyond which requests no longer read the queue for their own
sake."""
_MASK_ADD = 0x2000_0000
"""IN_MASK_ADD of inotify(7)."""
_HIGHEST_WD = (1 << 31) - 1
_NOTHING = Mask(0)
DIRECTORY = STRUCTURE | Mask.ATTRIB
"""What a directory is always watched for: its names, and all changes of its attributes."""
MARKED = SELF | Mask.ATTRIB
"""What a marked object is always watched for: its end, moves and links, which prove what its names
stood for."""
_CHANGING = int(DIRECTORY | Mask.Q_OVERFLOW)
_TOUCHES = int(TOUCHES)
_OVERFLOW = int(Mask.Q_OVERFLOW)
logging.getLogger("pyinotify").setLevel(logging.CRITICAL)  # errors are raised here instead


_UNWATCHED: AbstractContextManager[None] = nullcontext()


class HostWatcher:
    """One inotify instance. Owns its descriptor. ``on_arrival`` is called when events were read."""

    def __init__(
        self,
        table: InodeTable,
        *,
        watch_limit: int | None = None,
        on_arrival: Callable[[], None] = lambda: None,
    ) -> None:
        self._table = table
        self._manager = pyinotify.WatchManager()
        self.fd: int = self._manager.get_fd()
        os.set_blocking(self.fd, False)
        os.set_inheritable(self.fd, False)
        self._by_wd: dict[int, Inode] = {}
        self._shared = SharedWatches()
        self._wd_of: dict[Inode, int] = {}
        self._mask_of: dict[Inode, Mask] = {}
        self._since: dict[Inode, int] = {}
        self._limit = watch_limit
        self._old_wds: dict[Inode, int] = {}
        self._highest_wd = 0
        self._next_wd = 1  # the kernel's next one
        self._sets_wd = True  # the kernel knows SETNEXTWD, as far as is known
        self._is_handed_over = False
        self.queue = Backlog()
        """What was read and is not processed yet."""
        self._is_attributing = False
        self.last_activity = 0.0  # time.monotonic() of the last event, or of a new watch
        self.events_in = 0
        self.own_events = 0  # that the server itself has made
        self._elsewhere = CallsElsewhere()
        self.backed: BackedFiles | None = None
        """Files that a guest's kernel uses itself, if there may be any."""
        self.on_arrival = on_arrival
        self._report_change: Callable[[Inode], None] = _ignore_change

    def report_changes(self, report: Callable[[Inode], None]) -> None:
        """Call ``report`` when a directory's own attributes have changed, which a kernel may cache
        for long.
        """
        self._report_change = report

    def close(self) -> None:
        """Drop all watches."""
        self._manager.close()

    def __len__(self) -> int:
        return len(self._mask_of)

    def mask_of(self, inode: Inode) -> Mask:
        """The host mask of an inode, 0 if it is not watched."""
        return self._mask_of.get(inode, _NOTHING)

    def covers_attributes(self, inode: Inode) -> bool:
        """Whether a change of a directory's attributes, its own rename included, causes an
        event.
        """
        nodes = (inode, inode.parent)
        return all(node is None or DIRECTORY in self.mask_of(node) for node in nodes)

    def wd_of(self, inode: Inode) -> int:
        """The watch descriptor of an inode, -1 if it has none."""
        return self._wd_of.get(inode, -1)

    def would_queue(self, inode: Inode, bits: int, number: int) -> bool:
        """Whether the events ``bits`` of an inode would be in the queue next to the arrival of that
        number: the watch covers them, and already did then.
        """
        watched = bool(int(self.mask_of(inode)) & bits)
        return watched and number >= self._since.get(inode, 0)

    def inodes(self) -> list[Inode]:
        """Everything that is watched."""
        return list(self._mask_of)

    def inode_of(self, wd: int) -> Inode | None:
        """The inode of a watch descriptor; None once the kernel has removed it."""
        return self._by_wd.get(wd)

    def set_mask(self, inode: Inode, mask: Mask) -> None:
        """Add, modify or (mask 0) remove the host watch of an inode.

        Raises OSError: ENOSPC at the watch limit, ESTALE if the object is gone.
        """
        if mask == self.mask_of(inode):
            return
        if not mask:
            self._remove(inode)
            return
        if self._limit is not None and inode not in self._wd_of and len(self) >= self._limit:
            raise OSError(errno.ENOSPC, "limit on host watches reached")
        with self._table.reach.opened_by_any_name(inode) as fd:
            path = syscalls.fd_path(fd)
            if inode in self._old_wds:
                self._set_next_wd(self._old_wds[inode])
            if self.backed and mask & ~self.mask_of(inode):
                self.backed.watches(inode, int(mask))
            # Another inode's watch may be the same, seen through another mount.
            below = self._table.mounts.below
            wd = self._add(path, int(mask) | (_MASK_ADD if below else 0))
            is_less = self.mask_of(inode) & ~mask
            wd = self._joined(inode, wd)
            if below and is_less and self._shared.real(wd) not in self._shared:
                self._add(path, int(mask))
        if inode not in self._wd_of and self._shared.is_real(wd):
            self._next_wd = wd + 1
        if self._by_wd.get(wd) is not inode:
            self._table.pin(inode)
        self._by_wd[wd] = inode
        self._wd_of[inode] = wd
        if mask & ~self.mask_of(inode):
            if not self._old_wds:
                self.drain()
            self.last_activity = time.monotonic()
            self._since[inode] = self.queue.next_number
        self._note_mask(inode, mask)
        if inode.attr_given and not self.covers_attributes(inode):
            self._withdraw(inode)

    def _note_mask(self, inode: Inode, mask: Mask) -> None:
        if mask:
            self._mask_of[inode] = mask
        else:
            self._mask_of.pop(inode, None)
        if self.backed:
            self.backed.watches_less(inode)
        if inode.is_dir and mask & LOOKS:
            self._table.reach.visibly_read.add(inode)
        else:
            self._table.reach.visibly_read.discard(inode)

    def _add(self, path: str, mask: int) -> int:
        wd: int = self._manager.add_watch(path, mask, quiet=True)[path]
        if wd < 0:
            raise last_error()
        return wd

    def _joined(self, inode: Inode, wd: int) -> int:
        """The number for an inode whose watch descriptor is ``wd``."""
        had = self._wd_of.get(inode)
        if had is not None and self._shared.real(had) == wd:
            return had
        other = self._by_wd.get(wd)
        if other is None:
            return self._shared.join(wd, is_taken=False) if wd in self._shared else wd
        if other is inode or not other.identity.is_object_of(inode.identity):
            return wd
        return self._shared.join(wd, is_taken=True)

    def _wants(self, wd: int, mask: int) -> bool:
        inode = self._by_wd.get(wd)
        return inode is not None and bool(int(self.mask_of(inode)) & mask)

    def remember(self, wds: Mapping[Inode, int]) -> None:
        """Set the watches of these inodes under the descriptors that they had in another server."""
        self._old_wds = dict(wds)
        self._highest_wd = max(wds.values(), default=0)

    def remembered(self) -> None:
        """All of them are set; further watches get higher numbers."""
        self._old_wds.clear()
        self.drain()
        if self._highest_wd < _HIGHEST_WD:
            self._set_next_wd(self._highest_wd + 1)

    def hand_over(self) -> int:
        """Another process continues with this instance: read nothing any more. Returns its
        descriptor.
        """
        self._is_handed_over = True
        return self.fd

    def adopt(self, fd: int, wds: Mapping[Inode, int]) -> None:
        """Continue with the instance of another process, with these watches and the events queued
        there. Takes ``fd``. Raises OSError.
        """
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        masks = {wd: Mask(mask) for wd, mask in self._watched_for().items()}
        for inode, wd in wds.items():
            if wd in masks:
                self._by_wd[wd] = inode
                self._wd_of[inode] = wd
                self._note_mask(inode, masks[wd])
                self._table.pin(inode)
        self.drain()
        self._own_opening()

    def _own_opening(self) -> None:
        """This process has just opened the root, which belongs to no party."""
        wd = self.wd_of(self._table.root)
        self.queue.attribute_last(RawEvent(wd, int(Mask.OPEN | Mask.ISDIR), 0, b""), SERVER)

    def _set_next_wd(self, wd: int) -> None:
        if self._sets_wd and wd != self._next_wd:
            try:
                fcntl.ioctl(self.fd, SETNEXTWD, wd)
            except OSError:  # no CONFIG_CHECKPOINT_RESTORE: other numbers do as well
                self._sets_wd = False

    def _remove(self, inode: Inode) -> None:
        self._note_mask(inode, _NOTHING)
        self._since.pop(inode, None)
        wd = self._wd_of.pop(inode)
        self._withdraw(inode)
        if self._by_wd.get(wd) is inode:
            del self._by_wd[wd]
            if (real := self._shared.leave(wd)) >= 0:
                self._manager.rm_watch(real, quiet=True)
            self._table.unpin(inode)

    def ended(self) -> list[tuple[Inode, int]]:
        """Inodes whose watches the kernel has removed, possibly with a lost event; with their watch
        descriptors. From the kernel's own list, because failing to reach an object does not prove
        its end. Raises OSError.
        """
        there, real = self._watched_for(), self._shared.real
        return [(inode, wd) for wd, inode in self._by_wd.items() if real(wd) not in there]

    def _watched_for(self) -> dict[int, int]:
        """Masks by watch descriptor, as the kernel has them: proc_pid_fdinfo(5)."""
        with open(syscalls.fdinfo_path(self.fd)) as info:
            return {mark.wd: mark.mask for mark in parse_fdinfo(info.read())}

    def forget(self, wd: int) -> Inode | None:
        """IN_IGNORED: the kernel has removed the watch itself. Returns its inode."""
        self._manager.del_watch(wd)
        self._shared.leave(wd)
        inode = self._by_wd.pop(wd, None)
        if inode is not None:
            self._wd_of.pop(inode, None)
            self._note_mask(inode, _NOTHING)
            self._withdraw(inode)
            self._since.pop(inode, None)
            self._table.unpin(inode)
        return inode

    # Reading

    def _read(self, size: int) -> list[RawEvent]:
        """Read at least that many bytes, if available; not everything that comes meanwhile, which
        may be without an end.
        """
        events: list[RawEvent] = []
        while size > 0:
            try:
                buffer = os.read(self.fd, max(min(size, _READ_SIZE), _LONGEST_EVENT))
            except OSError:  # there is no more, or it stays queued
                break
            events.extend(parse_events(buffer))
            size -= len(buffer)
        self.events_in += len(events)
        if self._shared:
            events = list(self._shared.copies(events, self._wants))
        return events

    def _readable(self) -> int:
        """How many bytes of events are queued. If that is unknown, 0: a call whose events these are
        must not fail for it.
        """
        if self._is_handed_over:
            return 0
        try:
            (size,) = struct.unpack("i", fcntl.ioctl(self.fd, FIONREAD, b"\0\0\0\0"))
        except OSError:
            return 0
        return int(size)

    def drain(self, most: int = 1 << 62) -> None:
        """Read everything that is queued as the host's, or about ``most`` bytes. Raises
        RuntimeError within ``attributed``, to which these events would belong.
        """
        if self._is_attributing:
            raise RuntimeError("the queue is read while a call's own events are expected")
        self._take_in(None, most)

    def catch_up(self) -> None:
        """The same for a request, unless the backlog is long: if the host makes events as fast as
        they are read, guests would wait in vain.
        """
        if self.backlog < LONG_BACKLOG:
            self.drain()

    def _take_in(self, call: tuple[Origin, Finds] | None, most: int = 1 << 62) -> None:
        """Read queued events; those that are ``call``'s belong to it, the others to other
        parties.
        """
        readable, backed = self._readable(), self.backed or None
        size = min(readable, most)
        if not size and backed is None:
            return
        now = time.monotonic()
        events = self._read(size)
        if backed is not None:
            backed.read()
            if not events and not backed.has_rest:
                return
        own = call[1](events) if call is not None else ()
        for index, raw in enumerate(events):
            if call is not None and index in own:
                origin = call[0]
            else:
                origin = self._elsewhere.origin_of(raw) if self._elsewhere else HOST
            if backed is not None and raw.mask & _TOUCHES:
                origin = backed.origin_of(self._by_wd.get(raw.wd), raw, origin)
            if origin is SERVER:  # no guest gets it, and comparisons do not wait for it
                self.own_events += 1
                continue
            self._push(raw, origin, now)
        if backed is not None and size == readable:
            for inode, name, mask in backed.rest():
                if (wd := self.wd_of(inode)) >= 0:
                    self._push(RawEvent(wd, mask, 0, name), HOST, now)
        self.on_arrival()

    def _push(self, raw: RawEvent, origin: Origin, now: float) -> None:
        if self.queue.push(raw, origin, now):
            self.last_activity = now
            if raw.mask & _CHANGING:
                self._note_change(raw)

    @property
    def backlog(self) -> int:
        """How many events wait to be processed."""
        return len(self.queue)

    def _note_change(self, raw: RawEvent) -> None:
        """A directory's attributes have changed, or those of one in it."""
        if raw.mask & _OVERFLOW:
            self._withdraw(*self._mask_of)
        elif (inode := self._by_wd.get(raw.wd)) is not None:
            self._withdraw(inode, inode.children.get(raw.name))

    def _withdraw(self, *inodes: Inode | None) -> None:
        for inode in inodes:
            if inode is not None and inode.attr_given:
                inode.attr_given = None
                self._report_change(inode)

    def insert(self, events: Iterable[tuple[Inode, RawEvent]]) -> None:
        """Put events of watched inodes before all others that wait: they are older than the
        watches, except for those that these have reported, too.
        """
        self.drain()
        reported = Counter(arrival.raw for arrival in self.queue.peek(len(self.queue)))
        older: list[RawEvent] = []
        for inode, event in events:
            raw = event._replace(wd=self.wd_of(inode))
            if reported[raw] > 0:
                reported[raw] -= 1
            elif raw.wd >= 0:
                older.append(raw)
        if older:
            self.queue.put_before(older, time.monotonic())
            self.on_arrival()

    def discard(self, wds: Set[int]) -> None:
        """Drop the events of these watches: a comparison will find what they report."""
        self.drain()
        self.queue.discard(wds)

    def is_changing(self, directory: Inode, name: bytes, besides: Origin) -> bool:
        """Whether an unprocessed event of another party than that guest creates, removes or moves
        the name. Reads what is queued.
        """
        wd = self._wd_of.get(directory)
        if wd is None:
            return False
        self.catch_up()
        return self.queue.is_changing(wd, name, besides)

    def is_touching(self, inode: Inode, besides: Origin, within: int) -> bool:
        """Whether an unprocessed event of another party than that guest may concern an object, or a
        file's directory. Reads what is queued; more than ``within`` events are not searched.
        """
        nodes = (inode,) if inode.is_dir else (inode, inode.parent)
        wds = {self._wd_of[node] for node in nodes if node in self._wd_of}
        if not wds:
            return False
        self.catch_up()
        return len(self.queue) > within or self.queue.has_any(wds, besides)

    def is_watched_directly_or_by_name(self, inode: Inode) -> bool:
        """Whether there is a watch on an object, or on its directory."""
        return inode in self._wd_of or inode.parent in self._wd_of

    def looking(self, inode: Inode, name: bytes, mask: Mask) -> AbstractContextManager[None]:
        """Run a call of the server that opens, reads or closes a directory: ``mask`` is the event
        of that. It and its like belong to no party, neither those of its own watch nor those on its
        directory, wherever that is. Does not nest.
        """
        self._check_no_call()
        if not self._table.reach.visibly_read:
            return _UNWATCHED
        return self._during(SERVER, partial(look_among, self.wd_of(inode), name, int(mask)))

    def _check_no_call(self) -> None:
        if self._is_attributing:
            raise RuntimeError("the events of a call are expected within another's")

    def attributed(self, origin: Origin, *expected: Expected) -> AbstractContextManager[None]:
        """Run one of the server's own calls: its expected events get this origin, others HOST.

        Does not nest: the inner one would read the outer one's events as the host's. Raises
        RuntimeError.
        """
        self._check_no_call()
        bits = self._bits(expected)
        return self._during(origin, partial(expected_among, bits)) if bits else _UNWATCHED

    def _bits(self, expected: Iterable[Expected]) -> Bits:
        bits: Bits = {}
        for inode, name, mask in expected:
            if inode is not None and (wd := self._wd_of.get(inode)) is not None:
                bits[wd, name] = bits.get((wd, name), 0) | int(mask)
        return bits

    def expect(self, origin: Origin, expected: Iterable[Expected]) -> Callable[[], None]:
        """The same for a call that runs in a thread, until the returned function is called:
        matching events of others meanwhile are taken for its own.
        """
        bits = self._bits(expected)
        if not bits:
            return lambda: None
        self.drain()
        remove = self._elsewhere.add(origin, bits)

        def end() -> None:
            self.drain()
            remove()

        return end

    @contextmanager
    def _during(self, origin: Origin, finds: Finds) -> Iterator[None]:
        self.drain()
        self._is_attributing = True
        try:
            yield
        finally:
            self._is_attributing = False
            self._take_in((origin, finds))


def _ignore_change(inode: Inode) -> None:
    """No transport gives out attributes with a long timeout."""
