"""The scanner: keeps the server informed of what the guest's programs watch.

Woken by the server's hints (a process has just looked something up), by the kernel's trace of the
calls that set marks where names are kept, by the exit of a watching process, and by a slow timer as
safety net. At rest it sleeps.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from typing import Callable

from protocol import frames
from protocol.handles import NodeKey
from protocol.masks import Mask

from .markcalls import MarkCalls
from .marks import Device, Mark, marks_of, pids, process_of

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
_WRITE = 32 * 1024
_CLOSE = Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE


class Scanner(threading.Thread):
    """Reads marks and sends what changed. ``send`` writes frames to the server.

    ``calls`` tells of marks set on names that the kernel keeps; ``blind`` says that it does keep
    names, and that there is no such trace.
    """

    def __init__(
        self,
        device: Device,
        send: Callable[[bytes], None],
        still_mounted: Callable[[], bool],
        *,
        calls: MarkCalls | None = None,
        blind: bool = False,
    ) -> None:
        super().__init__(name="scanner", daemon=True)
        self._device = device
        self._send = send
        self._still_mounted = still_mounted
        self._calls = calls
        self._blind = blind
        self._called: set[int] = set()  # processes to be scanned as soon as may be
        self._ending = False
        self._inbox: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC) if hasattr(os, "eventfd") else -1
        self._pipe = os.pipe() if self._wake_fd < 0 else (self._wake_fd, self._wake_fd)
        self._hot: dict[int, float] = {}  # process -> until when
        self._hot_since = 0.0
        self._answered = -1  # the last hint that was answered; -1 before the first scan
        self._marks: dict[int, dict[NodeKey, int]] = {}  # process -> its marks
        self._published: dict[NodeKey, int] = {}
        self._pidfds: dict[int, int] = {}  # descriptor -> process
        self._hint = 0
        self._is_new = False  # the server, which is to be told everything
        self._last_hint = 0.0
        self._active = False
        self._fanotify: set[int] = set()  # processes with marks of fanotify

    def hint(self, number: int, pid: int) -> None:
        """From the server: process ``pid`` looked something up."""
        self._inbox.put((number, pid))
        self._poke()

    @property
    def knows_fanotify(self) -> bool:
        """Whether some mark is fanotify's: it may know the mount and paths, not only the inode."""
        return bool(self._fanotify)

    def orders_came(self) -> None:
        """Events are flowing: see now and then whether anybody still wants them."""
        if not self._active:
            self._active = True
            self._poke()

    def anew(self) -> None:
        """Another server, which was told nothing yet."""
        self._is_new = True
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
        os.write(self._pipe[1], b"\1\0\0\0\0\0\0\0")

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
            step, not_before, next_full, next_recheck = len(_STEPS), 0.0, 0.0, never
            if self._blind:
                next_full = time.monotonic() + FULL_EVERY
            while not self._ending:
                now = time.monotonic()
                due = self._last_hint + _STEPS[step] if step < len(_STEPS) else never
                due = 0.0 if self._called else due
                full = next_full if self._active or self._blind or step < len(_STEPS) else never
                recheck = next_recheck if self._active else never
                wait = max(min(due, full, recheck), not_before) - now
                if calls_fd >= 0:  # one call is enough to wake us
                    poll.register(calls_fd, 0 if self._called else select.POLLIN)
                ready = poll.poll(None if wait == never else max(0.0, wait * 1000))
                exited = self._exited([fd for fd, _ in ready], poll)
                if any(fd == self._pipe[0] for fd, _ in ready):
                    os.read(self._pipe[0], 4096)
                    if self._take_hints():
                        step = 0
                    next_full = next_full or time.monotonic() + FULL_EVERY
                    next_recheck = min(next_recheck, time.monotonic() + RECHECK)
                if any(fd == mountinfo.fileno() for fd, _ in ready) and not self._still_mounted():
                    self._leave()
                    os._exit(0)
                if self._is_new:
                    self._is_new = False
                    self._hint, self._answered, full = 0, -1, 0.0
                    self._published.clear()
                exited |= self._take_calls()
                now = time.monotonic()
                if exited or now >= full:
                    self.scan(pids(), full=True)
                    self._called.clear()
                    next_full = time.monotonic() + FULL_EVERY
                elif (self._called or now >= min(due, recheck)) and now >= not_before:
                    while step < len(_STEPS) and now >= self._last_hint + _STEPS[step]:
                        step += 1
                    known = list(self._marks) if now >= recheck else []
                    if now >= recheck:
                        next_recheck, self._active = never, False
                    self.scan([*self._hot, *self._called, *known], full=False)
                    self._called.clear()
                    self._hot = {pid: until for pid, until in self._hot.items() if until > now}
                else:
                    continue
                end = time.monotonic()
                rest = min(_SLOWEST, (end - self._hot_since) / 4) if self._hot else 0.0
                not_before = end + max(_DUTY * (end - now), rest)
                self._watch_exits(poll)

    def _take_calls(self) -> bool:
        """Note the processes whose marks have changed. Whether any may have."""
        if self._calls is None:
            return False
        threads, lost = self._calls.read()
        self._called.update(map(process_of, threads))
        return lost

    def _take_hints(self) -> bool:
        hinted = False
        while not self._inbox.empty():
            self._hint, thread = self._inbox.get()
            pid = process_of(thread)
            self._last_hint = time.monotonic()
            if not self._hot:
                self._hot_since = self._last_hint
            self._hot[pid] = self._last_hint + HOT
            hinted = True
        return hinted

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
        for pid in self._marks:
            if pid in watched:
                continue
            try:
                fd = os.pidfd_open(pid)
            except OSError:  # gone by now, or a thread: the full scan knows its process
                continue
            self._pidfds[fd] = pid
            poll.register(fd, select.POLLIN)

    def scan(self, processes: list[int], *, full: bool) -> None:
        """Read the marks of these processes and send what has changed."""
        hint = self._hint
        if full:
            self._marks.clear()
        own = os.getpid()
        fanotify = set() if full else self._fanotify - set(processes)
        for pid in dict.fromkeys(processes):
            marks: dict[NodeKey, int] = {}
            for mark in marks_of(pid, self._device) if pid != own else ():
                marks[mark.node] = marks.get(mark.node, 0) | _needed(mark)
                if mark.wd < 0:
                    fanotify.add(pid)
            if marks:
                self._marks[pid] = marks
            else:
                self._marks.pop(pid, None)
        self._fanotify = fanotify
        wanted: dict[NodeKey, int] = {}
        for marks in self._marks.values():
            for node, mask in marks.items():
                wanted[node] = wanted.get(node, 0) | mask
        changed = {node: mask for node, mask in wanted.items() if self._published.get(node) != mask}
        changed.update((node, 0) for node in self._published if node not in wanted)
        self._published = wanted
        batch = bytearray()
        for node, mask in changed.items():
            batch += frames.encode(frames.Update(0, node.nodeid, node.generation, mask))
            if len(batch) >= _WRITE:
                self._send(bytes(batch))
                batch.clear()
        first = self._answered < 0
        if changed or hint != self._answered:
            batch += frames.encode(frames.ScanEnd(hint, int(first)))
            self._send(bytes(batch))
            self._answered = hint


def _needed(mark: Mark) -> int:
    """The events that a mark needs replayed. fanotify hears of data only through an open file."""
    if mark.wd < 0 and mark.mask & (Mask.ACCESS | Mask.MODIFY):
        return mark.mask | int(Mask.OPEN | _CLOSE)
    return mark.mask
