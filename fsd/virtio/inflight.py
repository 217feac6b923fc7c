"""Records what a device has taken from its virtqueues and not answered, in memory that outlives it.

The split-virtqueue layout of vhost-user.rst, "Inflight I/O tracking": a region per queue, with an
entry for each descriptor. From it the next device knows what it has to do again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from protocol.vhostuser import Inflight

from .mapping import map_memory

_QUEUE = struct.Struct(
    "<QHHHH"
)  # QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx
_DESC = 16  # DescStateSplit: u8 inflight, u8 padding[5], u16 next, u64 counter
_VERSION = 1
_ALIGN = 64
TRIES = 2
"""How often a request may be begun: one that ended two servers would end the third."""


class InflightError(Exception):
    """Memory without the required content."""


def _stride(size: int) -> int:
    return (_QUEUE.size + _DESC * size + _ALIGN - 1) // _ALIGN * _ALIGN


class QueueInflight:
    """One queue's region, of ``size`` descriptors."""

    def __init__(self, view: memoryview, size: int) -> None:
        """Raises InflightError if it belongs to another queue."""
        _, version, desc_num, _, _ = _QUEUE.unpack_from(view)
        self.is_new = not version
        """Nothing was recorded in it before."""
        if self.is_new:
            _QUEUE.pack_into(view, 0, 0, _VERSION, size, 0, 0)
        elif version != _VERSION or desc_num != size:
            raise InflightError(f"requests under way: version {version}, {desc_num} descriptors")
        self._size = size
        self._head = view[: _QUEUE.size].cast("H")
        states = view[_QUEUE.size : _QUEUE.size + _DESC * size]
        self._short, self._long = states.cast("H"), states.cast("Q")
        self._counter = max((self._long[2 * head + 1] for head in range(size)), default=0)

    def taken(self, head: int) -> None:
        """A chain was taken from the queue; call this before anything is done with it."""
        self._counter += 1
        self._long[2 * head + 1] = self._counter
        self._short[8 * head] = 1 | 1 << 8  # under way, begun once

    def waits(self, head: int) -> None:
        """The request only waits for now: nothing is half done."""
        self._short[8 * head] = 1

    def answering(self, head: int) -> None:
        """The chain is about to be put into the used ring."""
        self._short[8 * head + 3] = self._head[6]
        self._head[6] = head

    def answered(self, head: int, used: int) -> None:
        """The used ring's index includes it."""
        self._short[8 * head] = 0
        self._head[7] = used

    def starts(self, used: int) -> None:
        """The queue starts, with that index of the used ring."""
        self._head[7] = used

    def recover(self, used: int) -> list[tuple[int, int]]:
        """The requests that an earlier device has not answered, in the order of taking, given the
        used ring's index; and how often each was begun without an end. Each counts as begun once
        more.
        """
        head = self._head[6]
        for _ in range(min((used - self._head[7]) & 0xFFFF, self._size)):
            if head < self._size:
                self._short[8 * head] = 0
                head = self._short[8 * head + 3]
        self._head[7] = used
        heads = [head for head in range(self._size) if self._short[8 * head] & 0xFF]
        heads.sort(key=lambda head: self._long[2 * head + 1])
        found = []
        for head in heads:
            tries = self._short[8 * head] >> 8
            self._short[8 * head] = 1 | min(tries + 1, 255) << 8
            found.append((head, tries))
        return found


class InflightMemory:
    """The regions of a device's queues. Owns its descriptor."""

    def __init__(
        self, fd: int, layout: Inflight, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        """Takes ``fd``; ``on_lost`` is that of map_memory. Raises InflightError."""
        self.fd = fd
        self._on_lost = on_lost
        self.layout = layout
        try:
            self._map()
        except InflightError:
            self.close()
            raise

    def _map(self) -> None:
        fd, layout = self.fd, self.layout
        end = layout.mmap_offset + layout.mmap_size
        if layout.num_queues * _stride(layout.queue_size) > layout.mmap_size:
            raise InflightError(f"room of {layout.mmap_size} bytes for requests under way")
        try:
            whole = map_memory(fd, end, self._on_lost)
            status = os.fstat(fd)
        except (OSError, ValueError, OverflowError) as error:
            raise InflightError(f"requests under way cannot be mapped: {error}") from None
        self.identity = status.st_dev, status.st_ino
        self._view = whole[layout.mmap_offset : end]

    @classmethod
    def new(
        cls, num_queues: int, queue_size: int, on_lost: Callable[[], None] = lambda: None
    ) -> InflightMemory:
        """Of our own. Raises OSError."""
        size = num_queues * _stride(queue_size)
        fd = os.memfd_create("fsd-inflight", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd, Inflight(size, 0, num_queues, queue_size), on_lost)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def wipe(self, index: int) -> None:
        """Nothing is under way in a queue, and its size is unknown."""
        if index < self.layout.num_queues:
            start = index * _stride(self.layout.queue_size)
            desc_num = min(_QUEUE.unpack_from(self._view, start)[2], self.layout.queue_size)
            end = start + _QUEUE.size + _DESC * desc_num
            self._view[start:end] = bytes(end - start)

    def queue(self, index: int, size: int) -> QueueInflight:
        """The region of a queue. Raises InflightError."""
        if index >= self.layout.num_queues or size > self.layout.queue_size:
            raise InflightError(f"no room for requests under way in queue {index} of {size}")
        stride = _stride(self.layout.queue_size)
        return QueueInflight(self._view[index * stride : (index + 1) * stride], size)
