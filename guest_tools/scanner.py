"""The scanner: keeps the server informed of what the guest's programs watch.

Woken by the server's hints (a process has just looked something up), by the kernel's trace of the
calls that set marks where names are kept, by the exit of a watching process, and by a slow timer as
safety net. At rest it sleeps.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from protocol import frames
from protocol.handles import NodeKey

from .errors import PASSING
from .markcalls import MarkCalls
from .marks import Device, pids, process_of
from .watchers import Watchers

HOT = 3.0
"""Seconds for which a hinted process is scanned again and again: as long as the server keeps its
provisional watches."""
_STEPS = (0.0, 0.0005, 0.002, 0.008, 0.03, 0.12, 0.5, 1.0, 2.5)
"""Seconds after the last hint at which to scan: the mark comes just after the look-up, mostly."""
_DUTY = 9.0
"""A scan is followed by at least this many times its own duration of rest."""
_SLOWEST = 0.1
"""Seconds between scans of a process that goes on looking things up: the server's short history
covers them."""
FULL_EVERY = 30.0
"""Seconds between full scans while something happens; at rest there are none, unless marks may be
set that nothing tells of."""
RECHECK = 2.0
"""Seconds after which the known watchers are read again, while events flow to them."""
_PATIENCE = 2.0
"""Seconds for the thread to end: it may be in a request that the server holds."""
RETRY = 0.5
"""Seconds after which what could not be looked at is looked at again."""
_HINTED = 4096
"""Processes looked at one by one, at most; beyond that, all are looked at."""
_WRITE = 32 * 1024


class Scanner(threading.Thread):
    """Reads marks and sends what changed. ``send`` writes frames to the server.

    ``exits``: how many processes' exits may be waited for by a descriptor of each. ``calls`` tells
    of marks set on names that the kernel keeps; ``blind`` says that it does keep names, and that
    there is no such trace.
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
    ) -> None:
        super().__init__(name="scanner", daemon=True)
        self._send = send
        self._still_mounted = still_mounted
        self._exits_limit = exits
        self._calls = calls
        self._blind = blind
        self._called: set[int] = set()  # processes to be scanned as soon as may be
        self._ending = False
        self._lock = threading.Lock()  # for what comes from the other thread:
        self._hinted: set[int] = set()  # threads
        self._given = 0  # number of their hint
        self._is_new = False  # the server, which is to be told everything
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._hot: dict[int, float] = {}  # process -> until when
        self._hot_since = 0.0
        self._answered = -1  # the last hint that was answered; -1 before the first scan
        self._watchers = Watchers(device)
        self._published: dict[NodeKey, int] = {}
        self._pidfds: dict[int, int] = {}  # descriptor -> process
        self._hint = 0  # number of the last hint that was taken
        self._last_hint = 0.0
        self._active = False
        self._next_full = 0.0  # when to look at all, if that is wanted then
        self._behind = False  # it is wanted
        self._exits_unseen = False  # of some processes with marks

    def hints(self, number: int, threads: Iterable[int]) -> None:
        """From the server: these threads have looked something up."""
        with self._lock:
            self._given = number
            for thread in threads:
                if len(self._hinted) <= _HINTED:
                    self._hinted.add(thread)
        self._poke()

    @property
    def knows_fanotify(self) -> bool:
        """Whether some mark is fanotify's: it may know the mount and paths, not only the inode."""
        return self._watchers.knows_fanotify

    def orders_came(self) -> None:
        """Events are flowing: see now and then whether anybody still wants them."""
        if not self._active:
            self._active = True
            self._poke()

    def anew(self) -> None:
        """Another server, which was told nothing yet."""
        with self._lock:
            self._is_new = True
            self._given = 0
            self._hinted.clear()
        self._poke()

    def end(self) -> None:
        """Have the thread end, and leave nothing behind."""
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
        """The thread: until the mount is gone, or ``end``."""
        try:
            self._run()
        finally:
            self._leave()

    def _run(self) -> None:
        never = float("inf")
        poll = select.poll()
        poll.register(self._pipe[0], select.POLLIN)
        calls_fd = self._calls.fileno() if self._calls is not None else -1
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            poll.register(mountinfo.fileno(), select.POLLPRI | select.POLLERR)
            step, not_before, next_recheck = len(_STEPS), 0.0, never
            self._next_full = time.monotonic() + FULL_EVERY
            if self._answered < 0:  # the first scan could not be complete
                self._look_at_all()
            self._watch_exits(poll)
            while not self._ending:
                now = time.monotonic()
                due = self._last_hint + _STEPS[step] if step < len(_STEPS) else never
                due = 0.0 if self._called else due
                full = self._next_full if self._wants_full or step < len(_STEPS) else never
                recheck = next_recheck if self._active else never
                wait = max(min(due, full, recheck), not_before) - now
                if calls_fd >= 0:  # one call is enough to wake us
                    poll.register(calls_fd, 0 if self._called else select.POLLIN)
                ready = poll.poll(None if wait == never else max(0.0, wait * 1000))
                has_exited = self._exited([fd for fd, _ in ready], poll)
                if any(fd == self._pipe[0] for fd, _ in ready):
                    os.read(self._pipe[0], 4096)
                    is_new, is_hinted = self._take()
                    if is_new:
                        self._answered, not_before = -1, 0.0
                        self._published.clear()
                        self._look_at_all()
                    if is_hinted:
                        step = 0
                    next_recheck = min(next_recheck, time.monotonic() + RECHECK)
                if any(fd == mountinfo.fileno() for fd, _ in ready) and not self._still_mounted():
                    self._leave()
                    os._exit(0)
                if self._take_calls() or has_exited or len(self._hot) > _HINTED:
                    self._look_at_all()
                now = time.monotonic()
                if now < not_before:
                    continue
                if now >= full or (self._behind and now >= self._next_full):
                    self._behind = not self._scan_all()
                    pause = RETRY if self._behind else FULL_EVERY
                    self._next_full = time.monotonic() + pause
                elif self._called or now >= min(due, recheck):
                    while step < len(_STEPS) and now >= self._last_hint + _STEPS[step]:
                        step += 1
                    known = self._watchers.pids if now >= recheck else []
                    if now >= recheck:
                        next_recheck, self._active = never, False
                    if not self.scan([*self._hot, *self._called, *known], full=False):
                        self._look_at_all(RETRY)
                else:
                    continue
                self._called.clear()
                self._hot = {pid: until for pid, until in self._hot.items() if until > now}
                end = time.monotonic()
                rest = min(_SLOWEST, (end - self._hot_since) / 4) if self._hot else 0.0
                not_before = end + max(_DUTY * (end - now), rest)
                self._watch_exits(poll)

    def _look_at_all(self, pause: float = 0.0) -> None:
        """All processes, after ``pause`` seconds."""
        self._behind = True
        self._next_full = min(self._next_full, time.monotonic() + pause)

    @property
    def _wants_full(self) -> bool:
        """Whether all processes are to be looked at now and then, or soon."""
        return self._active or self._blind or self._behind or self._exits_unseen

    def _take_calls(self) -> bool:
        """Note the processes whose marks have changed. Whether any may have."""
        if self._calls is None:
            return False
        threads, lost = self._calls.read()
        self._called.update(map(process_of, threads))
        return lost

    def _take(self) -> tuple[bool, bool]:
        """Take over what the other thread gave: whether the server is new, whether there were
        hints.
        """
        with self._lock:
            is_new, self._is_new = self._is_new, False
            hinted, self._hinted = self._hinted, set()
            self._hint = self._given
        if hinted:
            self._last_hint = time.monotonic()
            if not self._hot:
                self._hot_since = self._last_hint
        if frames.ALL_PROCESSES in hinted:
            hinted.remove(frames.ALL_PROCESSES)
            hinted.update(pids())
        for thread in hinted:
            if len(self._hot) <= _HINTED:
                self._hot[process_of(thread)] = self._last_hint + HOT
        return is_new, bool(hinted)

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
        self._exits_unseen = False
        for pid in self._watchers.pids:
            if pid in watched:
                continue
            if len(self._pidfds) >= self._exits_limit:
                self._exits_unseen = True
                return
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._look_at_all()
                continue
            except OSError:  # no more descriptors, or a kernel before Linux 5.3
                self._exits_unseen = True
                continue
            self._pidfds[fd] = pid
            poll.register(fd, select.POLLIN)

    def _scan_all(self) -> bool:
        try:
            return self.scan(pids(), full=True)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            return False

    def scan(self, processes: list[int], *, full: bool) -> bool:
        """Read the marks of these processes and send what has changed. Returns False where not all
        could be read or sent, and it is worth another try.
        """
        hint, is_first = self._hint, self._answered < 0
        complete = self._watchers.look(processes, full=full)
        if is_first and not complete:
            return False  # the server takes the first word for all of it
        wanted = self._watchers.wanted()
        changed = {node: mask for node, mask in wanted.items() if self._published.get(node) != mask}
        changed.update((node, 0) for node in self._published if node not in wanted)
        answered = hint if complete else self._answered
        if changed or answered != self._answered:
            try:
                self._publish(changed, frames.ScanEnd(answered, int(is_first)))
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                return False
            self._published, self._answered = wanted, answered
        return complete

    def _publish(self, changed: dict[NodeKey, int], end: frames.ScanEnd) -> None:
        batch = bytearray()
        for node, mask in changed.items():
            batch += frames.encode(frames.Update(0, node.nodeid, node.generation, mask))
            if len(batch) >= _WRITE:
                self._send(bytes(batch))
                batch.clear()
        self._send(bytes(batch + frames.encode(end)))
