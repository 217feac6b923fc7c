"""A split virtqueue, the device's side (Virtual I/O Device specification 1.2, section 2.7).

Everything in it is controlled by the guest: each number is read once, and checked before use. A
fault in one chain costs that request, a fault in a ring costs that queue.

Order of memory accesses: Python has no barriers. The stores here come in program order on x86,
where loads do not pass loads and stores do not pass stores, and each is one machine instruction (an
element of a cast memoryview). x86 does not order a load after a store, and nothing here relies on
that: kicks are never suppressed, and every used entry is signalled.
"""

from __future__ import annotations

import os
import struct
import time
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import compress, pairwise
from typing import NamedTuple

from .memory import GuestMemory, GuestMemoryError

MAX_SIZE = 32768
"""Entries of a queue: the specification's limit."""
MAX_CHAIN = 1024
"""Descriptors of a chain, as in QEMU's longest queue and one preadv (IOV_MAX): 4 MiB of pages."""
TORN = 0.001
"""Seconds for which an index may be invalid. All guests wait, but only once: the queue ends
then."""
KNOWN_CHAINS = 64
"""Chains of a queue whose decoded form is remembered: up to 200 kB each."""
_LAST = (1 << 64) - (1 << 32)
"""Highest address of a buffer, whose length has 32 bits: real memory is far below."""
NEXT, WRITE, INDIRECT = 1, 2, 4  # VRING_DESC_F_*
_DESC = struct.Struct("<QIHH")  # struct vring_desc: addr, len, flags, next
_REST = struct.Struct("<IHH")  # of it: all but the address
_USED = struct.Struct("<II")  # struct vring_used_elem: id, len
_Descriptor = tuple[int, int, int, int]


class QueueError(Exception):
    """The guest has broken a ring: nothing in that queue can be trusted any more."""


class ChainError(Exception):
    """The guest made a bad chain of descriptors available; it is returned unanswered."""

    def __init__(self, head: int, reason: str) -> None:
        super().__init__(reason)
        self.head = head


class _BadChainError(Exception):
    """Why the guest's chain is bad."""


class Chain(NamedTuple):
    """One request: the buffers that the device may read and write, and the chain's number."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class VirtQueue:
    """A queue with its rings in guest memory. ``position`` is the next entry of the available ring
    to take (vhost calls it base). Has to be made again if ``memory`` loses a region.
    """

    def __init__(
        self, memory: GuestMemory, size: int, desc: int, avail: int, used: int, position: int
    ) -> None:
        """``desc``, ``avail``, ``used``: user addresses. Raises QueueError."""
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise QueueError(f"a queue of {size} entries")
        if desc % 16 or avail % 2 or used % 4:
            raise QueueError(f"rings at {desc:#x}, {avail:#x}, {used:#x} are not aligned")
        self._memory = memory
        self._size = size
        try:
            self._desc = memory.at_user(desc, 16 * size)
            self._avail = memory.at_user(avail, 4 + 2 * size).cast("H")
            used_ring = memory.at_user(used, 4 + 8 * size)
        except GuestMemoryError as error:
            raise QueueError(f"rings outside of memory: {error}") from None
        # Guests use their buffers again and again, and then describe them in the same words.
        self._buffers = lru_cache(KNOWN_CHAINS)(partial(_buffers, memory))
        self._used = used_ring[4:]
        self._used_header = used_ring[:4].cast("H")
        self.position = position & 0xFFFF

    @property
    def is_empty(self) -> bool:
        """Whether the guest has made nothing available."""
        return self._avail[1] == self.position

    def pop(self) -> Chain | None:
        """The next request, None if there is none. Raises ChainError, QueueError."""
        waiting = (self._avail[1] - self.position) & 0xFFFF
        if not waiting:
            return None
        if waiting > self._size:
            waiting = self._waiting_at_last()
            if not waiting:
                return None
        head = self._avail[2 + self.position % self._size]
        if head >= self._size:
            raise QueueError(f"descriptor {head} in a queue of {self._size}")
        self.position = (self.position + 1) & 0xFFFF
        return self.chain(head)

    def _waiting_at_last(self) -> int:
        """How many requests wait when their number is invalid: a driver that writes the index
        bytewise is read in the middle. Raises QueueError if it stays invalid.
        """
        end = time.monotonic() + TORN
        while True:
            waiting = (self._avail[1] - self.position) & 0xFFFF
            if waiting <= self._size:
                return waiting
            if time.monotonic() >= end:
                raise QueueError(f"{waiting} requests in a queue of {self._size}")
            os.sched_yield()

    def chain(self, head: int) -> Chain:
        """The request that begins with a descriptor. Raises ChainError."""
        try:
            readable, writable = self._buffers(*self._descriptors(head))
        except (GuestMemoryError, _BadChainError) as error:
            raise ChainError(head, str(error)) from None
        return Chain(head, list(readable), list(writable))

    def _descriptors(self, head: int) -> tuple[tuple[_Descriptor, ...], bytes]:
        """The chain's descriptors, and the indirect table that it ends with, if any: a copy, as the
        guest may change it.
        """
        found: list[_Descriptor] = []
        index, size = head, self._size
        for _ in range(MAX_CHAIN + 2):
            descriptor: _Descriptor = _DESC.unpack_from(self._desc, 16 * index)
            address, length, flags, index = descriptor
            if flags & INDIRECT:
                if flags & NEXT:
                    raise _BadChainError("an indirect table inside of a chain")
                if not length or length % 16 or length > 16 * MAX_CHAIN:
                    raise _BadChainError(f"an indirect table of {length} bytes")
                return tuple(found), b"".join(self._memory.views([(address, address + length)]))
            found.append(descriptor)
            if not flags & NEXT:
                return tuple(found), b""
            if index >= size:
                raise _BadChainError(f"descriptor {index} in a table of {size}")
        raise _BadChainError(f"a chain of more than {MAX_CHAIN} descriptors, or a loop")

    @property
    def used_index(self) -> int:
        """How many requests were returned to the guest, modulo 65536, according to its own
        memory.
        """
        return self._used_header[1]

    def push(self, head: int, length: int) -> None:
        """Return a chain with ``length`` bytes written to it. The guest has to be signalled."""
        index = self._used_header[1]
        _USED.pack_into(self._used, 8 * (index % self._size), head, length)
        self._used_header[1] = (index + 1) & 0xFFFF


class _Shape(NamedTuple):
    """Descriptors without their addresses: the same in one request as in others like it."""

    lengths: list[int]
    packed: int
    """The lengths again, of 64 bits each."""
    readable: int
    """How many the device may read: the first ones."""


def _buffers(
    memory: GuestMemory, descriptors: tuple[_Descriptor, ...], table: bytes
) -> tuple[tuple[memoryview, ...], tuple[memoryview, ...]]:
    """The buffers that the device may read, and those it may write, of a chain with a table.

    Raises _BadChainError, GuestMemoryError.
    """
    shape = None if descriptors else _shape(_halves(table, 1))
    if shape is None:
        found = [*descriptors, *(_in_order(list(_DESC.iter_unpack(table))) if table else ())]
        table = b"".join(
            _DESC.pack(address, length, flags & WRITE | (NEXT if index < len(found) else 0), index)
            for index, (address, length, flags, _) in enumerate(found, 1)
        )
        shape = _shape(_halves(table, 1))
        assert shape is not None
    lengths, packed, readable = shape
    addresses = _halves(table, 0)
    starts = memoryview(addresses).cast("Q").tolist()
    if max(starts) > _LAST:
        raise _BadChainError(f"address {max(starts):#x} is not the guest's memory")
    # Adjacent buffers of one direction become one: guests often have pages in a row. One addition
    # shows for all of them whether an address is the end of the previous one: none overflows.
    number = int.from_bytes(addresses, "little")
    differences = ((number + packed) ^ (number >> 64)).to_bytes(len(addresses) + 8, "little")
    is_apart = memoryview(differences).cast("Q").tolist()
    if readable:
        is_apart[readable - 1] = 1
    firsts = [0, *compress(range(1, len(lengths)), is_apart)]
    spans = [
        (starts[first], starts[behind - 1] + lengths[behind - 1])
        for first, behind in pairwise([*firsts, len(lengths)])
    ]
    border = bisect_left(firsts, readable)
    return tuple(memory.views(spans[:border])), tuple(memory.views(spans[border:]))


def _halves(table: bytes, index: int) -> bytes:
    """Of each descriptor the address (0), or everything else (1)."""
    return memoryview(table).cast("Q")[index::2].tobytes()


@lru_cache(KNOWN_CHAINS)
def _shape(halves: bytes) -> _Shape | None:
    """None if they do not follow each other in order. Raises _BadChainError."""
    lengths, flags, following = zip(*_REST.iter_unpack(halves), strict=True)
    count = len(lengths)
    goes_on = [each & (NEXT | INDIRECT) for each in flags]
    if goes_on != [NEXT] * (count - 1) + [0] or following[:-1] != tuple(range(1, count)):
        return None
    writes = [each & WRITE for each in flags]
    readable = count - sum(writes) // WRITE
    if any(writes[:readable]):
        raise _BadChainError("a part to read behind one to write")
    packed = int.from_bytes(struct.pack(f"<{count}Q", *lengths), "little")
    return _Shape(list(lengths), packed, readable)


def _in_order(table: list[_Descriptor]) -> Iterator[_Descriptor]:
    index = 0
    for _ in table:
        entry = table[index]
        yield entry
        _, _, flags, index = entry
        if flags & INDIRECT:
            raise _BadChainError("an indirect table inside of a chain")
        if not flags & NEXT:
            return
        if index >= len(table):
            raise _BadChainError(f"descriptor {index} in a table of {len(table)}")
    raise _BadChainError(f"a loop in a table of {len(table)} descriptors")
