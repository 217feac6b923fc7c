"""One open channel file, and the reads that wait for its frames. Shared by all transports of a
mount.

It is woken in the middle of the core's work, so it only calls back; a transport reads once that is
done.
"""

from __future__ import annotations

import errno
import select
from collections import deque
from collections.abc import Callable

import structlog

from ..export.channel import Channel

log = structlog.get_logger()
READY = select.POLLIN | select.POLLOUT


class ChannelFile:
    """Waiters of one channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiters: deque[Callable[[], None]] = deque()
        self._poller: Callable[[], None] | None = None
        channel.wake = self._wake
        channel.dismiss_readers = self._wake_all

    @property
    def is_ready(self) -> bool:
        """Whether a read does not wait."""
        return self._channel.has_outgoing or self._channel.said_bye

    def wait(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call once: when there is something to read, or reads must not wait any longer. Returns a
        function that cancels that.
        """
        self._channel.asked()
        self._waiters.append(call)

        def cancel() -> None:
            if call in self._waiters:
                self._waiters.remove(call)

        return cancel

    def read(self, size: int) -> bytes:
        """Frames, up to ``size`` bytes; b"" if there are none."""
        return self._channel.outgoing(size)

    def write(self, data: bytes) -> None:
        """Frames from the peer. Raises OSError EPROTO for invalid ones, and ends the channel."""
        try:
            self._channel.receive(data)
        except ValueError as error:  # not a frame of the protocol, or one with an invalid content
            log.warning("bad frame from guest", error=str(error))
            self._channel.close()
            self._wake_all()
            raise OSError(errno.EPROTO, str(error)) from None

    @property
    def is_full(self) -> bool:
        """Whether the answer to a write has to wait until ``when_taken``."""
        return self._channel.is_full

    def when_taken(self, call: Callable[[], None]) -> None:
        """Call once when there is room for another write."""
        self._channel.when_taken(call)

    def poll(self, notify: Callable[[], None] | None) -> int:
        """poll(2)'s events as of now. ``notify`` is called once when there are more."""
        if self._channel.said_bye:
            return READY | select.POLLHUP
        if self.is_ready:
            return READY
        if notify is not None:
            self._poller = notify
        return select.POLLOUT

    def _wake(self) -> None:
        if self._channel.said_bye:
            self._wake_all()
        elif self._waiters:
            self._waiters.popleft()()
        self._notify()

    def _wake_all(self) -> None:
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            waiter()
        self._notify()

    def _notify(self) -> None:
        poller, self._poller = self._poller, None
        if poller is not None:
            poller()
