"""A VMM and its guest's driver in one, for tests: real socket, real memory files, real eventfds.

Sets a device up with the messages that QEMU sends, in its order. Writes descriptors as a guest's
kernel does, or wrong ones, which no kernel would write.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from fsd.linux import fdpassing
from protocol.vhostuser import (
    F_PROTOCOL_FEATURES,
    U64,
    Empty,
    Payload,
    Protocol,
    Region,
    Regions,
    Type,
    VringAddr,
    VringState,
    decode_reply,
    encode_request,
)

NEXT, WRITE, INDIRECT = 1, 2, 4
F_VERSION_1, F_INDIRECT = 1 << 32, 1 << 28
TIMEOUT = 10.0
_DESC = struct.Struct("<QIHH")


class Ram:
    """Memory of the guest: regions of one file, at addresses of the guest and of the VMM."""

    def __init__(self, *regions: tuple[int, int, int]) -> None:
        """Each: guest address, size, user address."""
        self.fd = os.memfd_create("ram")
        total = sum(size for _, size, _ in regions)
        os.ftruncate(self.fd, total)
        self.bytes = mmap.mmap(self.fd, total)
        self.regions = []
        offset = 0
        for guest, size, user in regions:
            self.regions.append(Region(guest, size, user, offset))
            offset += size
        self._free = 0

    def close(self) -> None:
        """Give the file back."""
        self.bytes.close()
        os.close(self.fd)

    def alloc(self, size: int, align: int = 64) -> int:
        """Room for ``size`` bytes: its offset in the file."""
        offset = (self._free + align - 1) // align * align
        self._free = offset + size
        assert self._free <= len(self.bytes), "the guest's memory is full"
        return offset

    def skip_to(self, offset: int) -> None:
        """Allocate after ``offset`` from now on."""
        self._free = max(self._free, offset)

    def guest(self, offset: int) -> int:
        """The guest address of an offset in the file."""
        for region in self.regions:
            if region.mmap_offset <= offset < region.mmap_offset + region.size:
                return region.guest_addr + offset - region.mmap_offset
        raise AssertionError(f"{offset:#x} is in no region")

    def user(self, offset: int) -> int:
        """The VMM's address of an offset in the file."""
        for region in self.regions:
            if region.mmap_offset <= offset < region.mmap_offset + region.size:
                return region.user_addr + offset - region.mmap_offset
        raise AssertionError(f"{offset:#x} is in no region")


class Queue:
    """A virtqueue, the driver's side."""

    def __init__(self, ram: Ram, size: int = 64) -> None:
        self.ram, self.size = ram, size
        self.desc = ram.alloc(16 * size)
        self.avail = ram.alloc(4 + 2 * size)
        self.used = ram.alloc(4 + 8 * size)
        self.seen = 0  # entries of the used ring
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._buffers: dict[int, list[tuple[int, int]]] = {}

    def close(self) -> None:
        """Close its descriptors."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    def put_desc(self, index: int, addr: int, length: int, flags: int, following: int) -> None:
        """Write one descriptor with any content."""
        _DESC.pack_into(self.ram.bytes, self.desc + 16 * index, addr, length, flags, following)

    def make_available(self, head: int, count: int = 1) -> None:
        """Add an entry to the available ring, and move its index by ``count``."""
        # In whole words, as drivers do: struct writes "<H" a byte at a time.
        ring = memoryview(self.ram.bytes)[self.avail : self.avail + 4 + 2 * self.size]
        with ring, ring.cast("H") as words:
            index = words[1]
            words[2 + index % self.size] = head
            words[1] = (index + count) & 0xFFFF

    def kick(self) -> None:
        """Kick the device."""
        os.eventfd_write(self.kick_fd, 1)

    def add(
        self, readable: Sequence[bytes], writable: Sequence[int] = (), *, indirect: bool = False
    ) -> int:
        """A request: what the device reads, and the sizes of what it may write."""
        buffers = []
        for data in readable:
            offset = self.ram.alloc(len(data), 1)
            self.ram.bytes[offset : offset + len(data)] = data
            buffers.append((offset, len(data), 0))
        buffers += [(self.ram.alloc(size, 1), size, WRITE) for size in writable]
        return self.add_buffers(buffers, indirect=indirect)

    def add_buffers(
        self, buffers: Sequence[tuple[int, int, int]], *, indirect: bool = False
    ) -> int:
        """A request of buffers at given places: (offset, length, flags) each."""
        count = len(buffers)
        entries = [
            (self.ram.guest(offset), length, flags | (NEXT if n + 1 < count else 0))
            for n, (offset, length, flags) in enumerate(buffers)
        ]
        if indirect:
            table = self.ram.alloc(16 * count)
            for n, entry in enumerate(entries):
                _DESC.pack_into(self.ram.bytes, table + 16 * n, *entry, n + 1)
            head = self._free.pop(0)
            self._chains[head] = [head]
            self.put_desc(head, self.ram.guest(table), 16 * count, INDIRECT, 0)
        else:
            chain = [self._free.pop(0) for _ in buffers]
            head = chain[0]
            self._chains[head] = chain
            for n, entry in enumerate(entries):
                self.put_desc(chain[n], *entry, chain[n + 1] if n + 1 < count else 0)
        self._buffers[head] = [(offset, size) for offset, size, flags in buffers if flags & WRITE]
        self.make_available(head)
        return head

    @property
    def used_count(self) -> int:
        """How many requests have been returned and not been taken yet."""
        index: int = struct.unpack_from("<H", self.ram.bytes, self.used + 2)[0]
        return (index - self.seen) & 0xFFFF

    def take(self, timeout: float = TIMEOUT) -> tuple[int, int]:
        """The next returned request: its head and the length written. Waits for a call."""
        while not self.used_count:
            assert select.select([self.call_fd], [], [], timeout)[0], "the device does not call"
            os.eventfd_read(self.call_fd)
        position = self.used + 4 + 8 * (self.seen % self.size)
        head, length = struct.unpack_from("<II", self.ram.bytes, position)
        self.seen = (self.seen + 1) & 0xFFFF
        self._free += self._chains.pop(head, [])
        return head, length

    def take_data(self, timeout: float = TIMEOUT) -> tuple[int, bytes]:
        """The next returned request: its head, and the data written."""
        head, length = self.take(timeout)
        whole = b"".join(self.ram.bytes[o : o + size] for o, size in self._buffers.pop(head))
        assert length <= len(whole), "the device says that it wrote more than there is room for"
        return head, whole[:length]


class Frontend:
    """A VMM's connection to the device."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(os.fspath(path))

    def close(self) -> None:
        """Disconnect, like a VMM that has ended."""
        self.socket.close()

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Whatever it is."""
        self.socket.sendmsg([data], fdpassing.ancillary(fds))

    def tell(self, code: Type, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Send a message without an answer."""
        self.send_bytes(encode_request(code, payload or Empty()), fds)

    def ack(self, code: Type, payload: Payload | None = None, fds: Sequence[int] = ()) -> int:
        """Send a message with NEED_REPLY: 0 = done."""
        self.send_bytes(encode_request(code, payload or Empty(), needs_reply=True), fds)
        answer = self.reply(code, U64)
        assert isinstance(answer, U64)
        return answer.value

    def ask(self, code: Type, payload: Payload | None = None, kind: type[Payload] = U64) -> Payload:
        """Send a message with an answer of its own."""
        self.send_bytes(encode_request(code, payload or Empty()))
        return self.reply(code, kind)

    def reply(self, code: Type, kind: type[Payload]) -> Payload:
        """The answer to a message."""
        header = self._exactly(12)
        body = self._exactly(struct.unpack_from("=I", header, 8)[0])
        answered, payload = decode_reply(header + body, kind)
        assert answered == code
        return payload

    def reply_with_fd(self, code: Type, kind: type[Payload]) -> tuple[Payload, int]:
        """An answer with a descriptor."""
        data, (fd,) = fdpassing.receive(self.socket, 4096, 1)
        answered, payload = decode_reply(data, kind)
        assert answered == code
        return payload, fd

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "the device has closed the connection"
            data += more
        return data

    def is_dropped(self) -> bool:
        """Whether the device closes the connection; waits for it."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def number(self, code: Type) -> int:
        """The answer to a request for one number."""
        answer = self.ask(code)
        assert isinstance(answer, U64)
        return answer.value

    def negotiate(self) -> int:
        """Begin like QEMU 7.2; returns the protocol features that the device offers."""
        features = self.number(Type.GET_FEATURES)
        assert features & F_PROTOCOL_FEATURES
        offered = self.number(Type.GET_PROTOCOL_FEATURES)
        wanted = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIGURE_MEM_SLOTS | Protocol.STATUS
        self.tell(Type.SET_PROTOCOL_FEATURES, U64(offered & wanted))
        self.number(Type.GET_QUEUE_NUM)
        self.tell(Type.SET_OWNER)
        self.number(Type.GET_FEATURES)
        return offered

    def start(self, ram: Ram, queues: Sequence[Queue], bases: Sequence[int] = ()) -> None:
        """Start the device as QEMU does when the guest's driver is ready."""
        for index, queue in enumerate(queues):
            self.tell(Type.SET_VRING_CALL, U64(index), [queue.call_fd])
            self.tell(Type.SET_VRING_ERR, U64(index), [queue.err_fd])
        self.tell(Type.SET_FEATURES, U64(F_VERSION_1 | F_INDIRECT | F_PROTOCOL_FEATURES))
        self.set_memory(ram)
        for index, queue in enumerate(queues):
            self.start_queue(index, queue, bases[index] if bases else 0)
        for index in range(len(queues)):
            assert self.ack(Type.SET_VRING_ENABLE, VringState(index, 1)) == 0

    def set_memory(self, ram: Ram) -> None:
        """SET_MEM_TABLE."""
        fds = [ram.fd] * len(ram.regions)
        assert self.ack(Type.SET_MEM_TABLE, Regions(tuple(ram.regions)), fds) == 0

    def start_queue(self, index: int, queue: Queue, base: int = 0) -> None:
        """Set up a queue, except for ENABLE."""
        ram = queue.ram
        self.tell(Type.SET_VRING_NUM, VringState(index, queue.size))
        self.tell(Type.SET_VRING_BASE, VringState(index, base))
        parts = (ram.user(queue.desc), ram.user(queue.used), ram.user(queue.avail))
        self.tell(Type.SET_VRING_ADDR, VringAddr(index, 0, *parts, 0))
        self.tell(Type.SET_VRING_KICK, U64(index), [queue.kick_fd])

    def stop(self, count: int) -> list[int]:
        """Stop the device as QEMU does; returns the bases of its queues."""
        for index in range(count):
            self.tell(Type.SET_VRING_ENABLE, VringState(index, 0))
        bases = []
        for index in range(count):
            state = self.ask(Type.GET_VRING_BASE, VringState(index, 0), VringState)
            assert isinstance(state, VringState)
            bases.append(state.num)
        return bases
