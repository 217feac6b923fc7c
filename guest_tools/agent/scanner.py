"""The scanner: a thread that keeps the server informed of what the guest's programs watch.

It is woken by the server's hints (a process has just looked something up), by the kernel's trace of
the calls that set marks where names are cached, by the exit of a watching process, and by a slow
timer as a safety net. When idle it sleeps.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from protocol import frames
from protocol.handles import NodeKey

from ..errors import PASSING
from ..marks import Device, may_set_mark, pids, process_of
from .markcalls import MarkCalls
from .schedule import CALLS, HOT_LIMIT, RETRY, Look, Schedule
from .watchers import Watchers

_PATIENCE = 2.0
"""Seconds for the thread to end: it may be in a request that the server holds."""
_WRITE = 32 * 1024
_OTHERS = 16
"""Processes that are read in addition when marks were found, so that earlier hints are answered
first."""


def calls_at(first: float) -> frames.Calls:
    """Calls were traced, the first at that time.monotonic()."""
    return frames.Calls(int(first * 1e6), int(time.monotonic() * 1e6))


class Scanner(threading.Thread):
    """Reads marks and sends the changes. ``send`` writes frames to the server.

    ``exits``: how many processes may be watched for their exit with a descriptor each. ``calls``
    reports marks set on names that the kernel caches. ``blind``: the kernel does cache names, and
    there is no such trace. ``lone_closes``: the kernel can make those.
    """

    def __init__(
        self,
        device: Device,
        send: Callable[[bytes], None],
        still_mounted: Callable[[], bool],
        *,
        exits: int,
        calls: MarkCalls | None = None,
        blind: bool = False,
        lone_closes: bool = False,
    ) -> None:
        super().__init__(name="scanner", daemon=True)
        self._send = send
        self._still_mounted = still_mounted
        self._exits_limit = exits
        self._calls = calls
        self._blind = blind
        self._ending = False
        self._lock = threading.Lock()  # for data from the other thread:
        self._hinted: dict[int, set[int]] = {}  # threads, by the number of their hint
        self._is_new = False  # a new server needs all marks
        self._is_active = False  # events flow
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        is_traced = calls is not None
        self._schedule = Schedule(time.monotonic(), is_traced=is_traced, blind=blind)
        self._called: dict[int, float] = {}  # processes to read: time.monotonic() of the call
        self._answered = -1  # the last hint that was answered; -1 before the first scan
        self._watchers = Watchers(device)
        self._lone_closes = lone_closes
        self._published: dict[NodeKey, int] = {}
        self._flags = 0  # the published ones
        self._is_unsent = True  # something that was found
        self._pidfds: dict[int, int] = {}  # descriptor -> process

    def hints(self, number: int, threads: Iterable[int]) -> None:
        """From the server: these threads have looked something up."""
        with self._lock:
            hinted = self._hinted.setdefault(number, set())
            for thread in threads:
                if len(hinted) <= HOT_LIMIT:
                    hinted.add(thread)
            while len(self._hinted) > 1 and sum(map(len, self._hinted.values())) > HOT_LIMIT:
                del self._hinted[next(iter(self._hinted))]
                hinted.add(frames.ALL_PROCESSES)
        self._poke()

    @property
    def knows_fanotify(self) -> bool:
        """Whether any mark is fanotify's: these may depend on mount and path."""
        return self._watchers.knows_fanotify

    def orders_came(self) -> None:
        """Events are flowing: check now and then whether the marks still exist."""
        if not self._is_active:
            self._is_active = True
            self._poke()

    def expect_new_server(self) -> None:
        """Prepare for another server, which has no marks yet."""
        with self._lock:
            self._is_new = True
            self._hinted.clear()
        self._poke()

    def end(self) -> None:
        """Make the thread end and clean up."""
        self._ending = True
        if self.is_alive():
            self._poke()
            self.join(_PATIENCE)
        else:
            self._leave()

    def _leave(self) -> None:
        if self._calls is not None:
            self._calls.close()

    def _poke(self) -> None:
        with suppress(BlockingIOError):  # it is full: the thread has enough to wake it
            os.write(self._pipe[1], b"!")

    def run(self) -> None:
        """The thread: runs until the mount is gone, or ``end``."""
        try:
            self._run()
        finally:
            self._leave()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._pipe[0], select.POLLIN)
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            poll.register(mountinfo.fileno(), select.POLLPRI | select.POLLERR)
            if self._answered < 0:  # the first scan could not be complete
                self._schedule.look_at_all(time.monotonic())
            self._watch_exits(poll)
            while not self._ending:
                ready = self._wait(poll)
                if mountinfo.fileno() in ready and not self._still_mounted():
                    self._leave()
                    os._exit(0)
                now = time.monotonic()  # data read below existed by then
                if self._take_calls() | self._exited(ready, poll):
                    self._schedule.look_at_all(now)
                if self._pipe[0] in ready:
                    os.read(self._pipe[0], 4096)
                    self._take_given(now)
                look = self._schedule.take(now)
                if look is not None:
                    self._look(look)
                    self._watch_exits(poll)
                self._answer(now)

    def _wait(self, poll: select.poll) -> list[int]:
        """Sleep until something is due or arrives. Returns the descriptors that are ready."""
        if self._calls is not None:  # one call is enough to wake us
            poll.register(self._calls.fileno(), 0 if self._schedule.is_called else select.POLLIN)
        wait = self._schedule.next() - time.monotonic()
        if self._schedule.is_called:  # it may be made by another one meanwhile
            wait = min(wait, CALLS)
        ready = poll.poll(None if wait == math.inf else max(0.0, wait * 1000))
        return [fd for fd, _ in ready]

    def _take_calls(self) -> bool:
        """Note the processes whose marks have changed. Returns whether any others may have."""
        if self._calls is None:
            return False
        threads, lost = self._calls.read()
        for thread, at in threads.items():
            self._called.setdefault(process_of(thread), at)
        self._schedule.call(self._called)
        return lost

    def _take_given(self, now: float) -> None:
        """Take over what the other thread passed on."""
        with self._lock:
            is_new, self._is_new = self._is_new, False
            given, self._hinted = self._hinted, {}
        if is_new:
            self._answered = -1
            self._published.clear()
            self._schedule.expect_new_server(now)
        for number, threads in given.items():
            self._schedule.hint(number, set(map(process_of, threads)), now)
        if self._is_active:  # until the known watchers are looked at: one order wakes us, not each
            self._schedule.events_flow(now)

    def _exited(self, ready: list[int], poll: select.poll) -> bool:
        exited = False
        for fd in ready:
            pid = self._pidfds.pop(fd, None)
            if pid is not None:
                poll.unregister(fd)
                os.close(fd)
                exited = True
        return exited

    def _watch_exits(self, poll: select.poll) -> None:
        watched = set(self._pidfds.values())
        self._schedule.exits_unseen = False
        for pid in self._watchers.pids:
            if pid in watched:
                continue
            if len(self._pidfds) >= self._exits_limit:
                self._schedule.exits_unseen = True
                return
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._schedule.look_at_all(time.monotonic())
                continue
            except OSError:  # no more descriptors, or a kernel before Linux 5.3
                self._schedule.exits_unseen = True
                continue
            self._pidfds[fd] = pid
            poll.register(fd, select.POLLIN)

    def _look(self, look: Look) -> None:
        began = time.monotonic()
        try:
            processes = pids() if look.full else [*look.pids]
            if look.watchers:
                processes += self._watchers.pids
            complete = self.scan(processes, full=look.full)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            complete = False
        if look.watchers:
            self._is_active = False
        gone = self._watchers.gone
        heavy = self._watchers.heavy
        self._schedule.done(look, gone, began, time.monotonic(), complete=complete, heavy=heavy)
        if complete:  # else all are read again soon
            self._schedule.call(self._called)

    def scan(self, processes: list[int], *, full: bool) -> bool:
        """Read the marks of these processes and send the changes. Returns False if not all could be
        read or sent, and another attempt is worthwhile.
        """
        began = time.monotonic()
        complete = self._watchers.look(processes, full=full)
        called, self._called = self._called, {}
        if self._take_calls():
            self._schedule.look_at_all(time.monotonic())
        later, self._called = self._called, {**self._called, **called}
        if not full:
            later.update((pid, at) for pid, at in called.items() if pid not in processes)
        if self._answered < 0 and not complete:
            return False  # the server takes the first word for all of it
        if self._watchers.changed and not full and self._answered >= 0:
            complete &= self._answer_earlier(set(processes), began)
        if self._watchers.is_changed or self._is_unsent or self._answered < 0:
            complete &= self._send_changes(max(self._answered, 0))
        if complete:
            self._called = later  # perhaps made after the reading
        return complete

    def _answer(self, now: float) -> None:
        """Answer hints, if it is time."""
        answered = self._schedule.answer(now)
        if 0 <= self._answered < answered and not self._send_changes(answered):
            self._schedule.look_at_all(now + RETRY)

    def _answer_earlier(self, read: set[int], began: float) -> bool:
        """Before changes are sent, answer the hints that they do not come from: the server then
        delivers nothing from before the look-ups of the others. Returns whether what was read for
        that could be read.
        """
        watchers, schedule = self._watchers, self._schedule
        others = schedule.unanswered() - watchers.changed
        if len(others) > _OTHERS:
            return True
        settled = {pid for pid in others if not may_set_mark(pid)}
        if not watchers.look(others, more=True):
            return False
        gone = watchers.gone  # their marks went along
        answered = schedule.answer_without(
            watchers.changed - gone, settled | gone, read | others, began
        )
        if answered <= self._answered:
            return True
        try:
            self._publish({}, frames.ScanEnd(answered, self._flags))
        except OSError as error:
            if error.errno not in PASSING:
                raise
            return False
        self._answered = answered
        return True

    def _send_changes(self, answered: int) -> bool:
        """Send the changes, and the last hint that they cover. Returns whether they were sent."""
        wanted = self._watchers.wanted()
        changed = {node: mask for node, mask in wanted.items() if self._published.get(node) != mask}
        changed.update((node, 0) for node in self._published if node not in wanted)
        is_first = self._answered < 0
        # Groups that report descriptors would get what stands in for the file.
        may_close = self._lone_closes and not self._watchers.knows_fanotify
        flags = frames.Scan.CREATE_OPEN | (frames.Scan.LONE_CLOSE if may_close else 0)
        if not changed and answered == self._answered and flags == self._flags:
            self._is_unsent = False
            return True
        self._is_unsent = True
        try:
            full = frames.Scan.FULL if is_first else 0
            self._publish(changed, frames.ScanEnd(answered, flags | full))
        except OSError as error:
            if error.errno not in PASSING:
                raise
            return False
        self._published, self._answered, self._is_unsent = wanted, answered, False
        self._flags = flags
        return True

    def _publish(self, changed: dict[NodeKey, int], end: frames.ScanEnd) -> None:
        batch = bytearray()
        called = [at for pid, at in self._called.items() if pid in self._watchers.changed]
        if changed and called:
            batch += frames.encode(calls_at(min(called)))
        for node, mask in changed.items():
            batch += frames.encode(frames.Update(0, node.nodeid, node.generation, mask))
            if len(batch) >= _WRITE:
                self._send(bytes(batch))
                batch.clear()
        self._send(bytes(batch + frames.encode(end)))
