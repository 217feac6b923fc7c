"""Sends notifications to a guest's kernel that may have to wait there, in a thread.

Taking back a name waits for the lock of its directory, and taking back data for the lock of a page
(fs/fuse/dir.c, fuse_reverse_inval_entry; fs/fuse/inode.c, fuse_reverse_inval_inode). Whoever holds
the lock may wait for an answer of the thread that serves requests, so that one must not wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from ..pacing.guard import Guard

PATIENCE = 0.25
"""Seconds for which events wait until the kernel has acted on one notification."""


class Notifier:
    """One connection's. ``settled`` is called in the thread whenever everything has been sent."""

    def __init__(self, fd: int, settled: Callable[[], None]) -> None:
        self._fd = fd
        self._settled = settled
        self._queue: SimpleQueue[Iterable[bytes] | None] = SimpleQueue()
        self._posted = self._sent = 0
        self._since = 0.0  # time.monotonic() when what is sent now was begun
        self._is_closed = False
        self._thread: Thread | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the kernel has acted on everything that was posted."""
        return self._sent == self._posted

    @property
    def is_settled(self) -> bool:
        """The same, or it takes longer than PATIENCE: a program may make the kernel hold a lock."""
        return self.is_idle or time.monotonic() > self._since + PATIENCE

    def post(self, messages: Iterable[bytes]) -> None:
        """Send notifications soon, behind those posted before. The thread makes them of an
        iterator.
        """
        if self._is_closed:
            return
        if self._thread is None:
            self._thread = Thread(target=self._run, name="notifier", daemon=True)
            self._thread.start()
        if self.is_idle:
            self._since = time.monotonic()
        self._posted += 1
        self._queue.put(messages)

    def close(self) -> None:
        """Send nothing more. The connection has to be served until ``is_idle``."""
        self._is_closed = True
        self._queue.put(None)

    def _run(self) -> None:
        while (messages := self._queue.get()) is not None:
            with Guard("notifying the kernel"):  # else nothing would ever be settled
                self._send(messages)
            self._since = time.monotonic()
            self._sent += 1
            if self._sent == self._posted:
                self._settled()

    def _send(self, messages: Iterable[bytes]) -> None:
        for message in messages:
            if self._is_closed:
                return
            # The kernel holds no such name or node any more, or the connection has ended.
            with suppress(OSError):
                os.write(self._fd, message)
