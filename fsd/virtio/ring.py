"""One queue of a device, as the front-end has set it up: its descriptors, and its requests from
taking to answering.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from protocol.vhostuser import Request, VringAddr

from .eventfds import StuckError, Writer, is_eventfd
from .inflight import QueueInflight
from .queue import Chain, QueueError, VirtQueue

LONGEST_REPLY = (1 << 20) + 4096
"""Bytes of a FUSE reply: the longest READ and room for headers."""


class Ring:
    """Owns its descriptors. ``on_broken`` is called with the reason why nothing more can be done
    for the VMM.
    """

    def __init__(self, on_broken: Callable[[str], None]) -> None:
        self._on_broken = on_broken
        self._writer = Writer.here()
        self.size = 0
        self.address: VringAddr | None = None
        self.position = 0  # where it was stopped, or will start
        self.kick = self.call = self.err = -1
        self.is_enabled = False
        self.queue: VirtQueue | None = None  # while it runs
        self.noted: QueueInflight | None = None  # where requests in flight are recorded
        self.in_flight: dict[int, list[memoryview]] = {}  # chain -> buffers of its reply
        self._again: list[tuple[int, int]] = []  # requests of an earlier device: heads, tries
        self._held: list[tuple[int, int]] = []  # answered while it was stopped
        self.moved = 0  # bytes of the request that was answered last, and of its answer
        self._is_serving = False  # answers are signalled together, at the end
        self._is_answered = False  # and not signalled yet

    @property
    def is_ready(self) -> bool:
        """Whether it can run."""
        return self.is_enabled and self.size > 0 and self.address is not None and self.kick >= 0

    # Descriptors

    def take_fd(self, name: str, request: Request) -> None:
        """Set one of its descriptors from a message, which may have none. Raises OSError: EBADF if
        it is not an eventfd.
        """
        fd = -1
        if request.fds:
            if not is_eventfd(request.fds[0]):
                raise OSError(errno.EBADF, f"{name} is not an eventfd")
            fd = os.dup(request.fds[0])
            os.set_blocking(fd, False)
        self.drop_fd(name)
        setattr(self, name, fd)

    def drop_fd(self, name: str) -> None:
        """Close one of its descriptors."""
        fd = getattr(self, name)
        setattr(self, name, -1)
        if fd >= 0:
            os.close(fd)

    def _signal(self, name: str, fd: int) -> None:
        if fd >= 0:
            try:
                self._writer.signal(fd)
            except StuckError as error:
                self.drop_fd(name)
                self._on_broken(str(error))

    def complain(self) -> None:
        """Report to the front-end that the queue is broken."""
        self._signal("err", self.err)

    def signal(self) -> None:
        """Interrupt the guest: there is a used entry."""
        if self._is_serving:
            self._is_answered = True
        else:
            self._signal("call", self.call)

    def delay_signals(self) -> None:
        """Collect signals until ``signal_delayed``."""
        self._is_serving = True

    def signal_delayed(self) -> None:
        """Signal the answers since ``delay_signals``, if there are any."""
        self._is_serving = False
        if self._is_answered:
            self._is_answered = False
            self._signal("call", self.call)

    # From the start to the end

    def note_in(self, noted: QueueInflight, queue: VirtQueue) -> None:
        """Record requests under way there from now on, in a queue that will start; continue if an
        earlier device has recorded some. Raises InflightError.
        """
        if not noted.is_new:
            self._again = noted.recover(queue.used_index)
            queue.position = (queue.used_index + len(self._again)) & 0xFFFF
            self.signal()  # its answers may not be signalled yet
        self.noted = noted

    def start(self, queue: VirtQueue) -> None:
        """It runs, and sends the answers that were held back."""
        if self.noted is not None:
            self.noted.starts(queue.used_index)
        self.queue = queue
        held, self._held = self._held, []
        for head, length in held:
            self.push(head, length)

    def forget(self) -> None:
        """Nothing is under way: the machine was reset."""
        for writable in self.in_flight.values():
            # The guest uses the memory for something else now: late answers are dropped. No view is
            # empty.
            size = min(sum(map(len, writable)), LONGEST_REPLY)
            writable[:] = [memoryview(bytearray(size))] * bool(size)
        self._clear()

    def close(self) -> None:
        """The front-end has gone."""
        for name in ("kick", "call", "err"):
            self.drop_fd(name)
        self._clear()

    def _clear(self) -> None:
        self.noted = None
        for left in (self.in_flight, self._held, self._again):
            left.clear()

    # Requests

    @property
    def has_more(self) -> bool:
        """Whether ``take`` would return something."""
        return self.queue is not None and (bool(self._again) or not self.queue.is_empty)

    def take(self) -> tuple[Chain, int] | None:
        """The next request, and how often an earlier device has begun it; None if there is none.
        Raises ChainError, QueueError.
        """
        if self.queue is None:
            return None
        tries, is_noted = 0, bool(self._again)
        if is_noted:
            head, tries = self._again.pop(0)
            chain = self.queue.chain(head)
        else:
            popped = self.queue.pop()
            if popped is None:
                return None
            chain = popped
        if chain.head in self.in_flight:
            raise QueueError(f"descriptor {chain.head} is in use")
        self.in_flight[chain.head] = chain.writable
        if self.noted is not None and not is_noted:
            self.noted.taken(chain.head)
        return chain, tries

    def answer(self, chain: Chain, length: int) -> None:
        """A request is answered; the guest gets the answer once the queue runs."""
        if self.in_flight.get(chain.head) is not chain.writable:
            return  # answered twice, or the queue was reset
        del self.in_flight[chain.head]
        self.moved = min(sum(map(len, chain.readable)), LONGEST_REPLY) + length
        if self.queue is None:
            self._held.append((chain.head, length))
        else:
            self.push(chain.head, length)

    def push(self, head: int, length: int) -> None:
        """Return a chain to the guest, in a running queue."""
        queue, noted = self.queue, self.noted
        assert queue is not None
        if noted is not None:
            noted.answering(head)
        queue.push(head, length)
        if noted is not None:
            noted.answered(head, queue.used_index)
        self.signal()
