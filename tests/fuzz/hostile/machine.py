"""A VMM and a guest's driver with many requests under way: what all guests of the fuzzer share.

Apart from harness/vhost_frontend.py because memory must not grow with the number of requests:
each request has a slot of the memory, and a slot its descriptors.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from harness.vhost_frontend import NEXT, WRITE, Frontend, Queue, Ram
from protocol import fuse
from protocol.fuse import Opcode

K = 1024
PARTS = 8
"""Descriptors a slot has."""
Then = Callable[[int, bytes], None]
"""What to do with the answer: errno and payload."""
TIMEOUT = 20.0
"""Seconds that a server may take to accept a VMM."""


class Gone(Exception):
    """The server has closed the connection, or accepts none."""


class Broken(Exception):
    """The server has broken a promise of the queue or of FUSE."""


@dataclass(slots=True)
class Slot:
    """Room for one request in the memory of a guest."""

    head: int
    request: int
    request_size: int
    answer: int
    answer_size: int


@dataclass(slots=True)
class Pending:
    """A request under way."""

    slot: Slot
    opcode: int
    unique: int
    room: int
    begun: float
    label: str
    then: Then | None
    note: object = None


def ignore(_error: int, _payload: bytes) -> None:
    """An answer that teaches nothing."""


class Ring:
    """One queue: slots that are free, and requests under way."""

    def __init__(self, ram: Ram, sizes: Sequence[tuple[int, int, int]]) -> None:
        """``sizes``: how many slots with how much room for the request and for its answer."""
        count = sum(number for number, *_ in sizes)
        size = 1 << (count * PARTS - 1).bit_length()
        self.queue = Queue(ram, size)
        self.ram = ram
        self.size = size
        self.free: dict[int, list[Slot]] = {}
        self.pending: dict[int, Pending] = {}
        head = 0
        for number, request_size, answer_size in sizes:
            slots = self.free.setdefault(request_size, [])
            for _ in range(number):
                request, answer = ram.alloc(request_size, 64), ram.alloc(answer_size, 64)
                slots.append(Slot(head, request, request_size, answer, answer_size))
                head += PARTS
        # In whole words: a device may look between two bytes of an index.
        view = memoryview(ram.bytes)
        self._avail = view[self.queue.avail : self.queue.avail + 4 + 2 * size].cast("H")
        self._used = view[self.queue.used : self.queue.used + 4 + 8 * size].cast("I")
        self._used_index = view[self.queue.used : self.queue.used + 4].cast("H")
        self._seen = 0

    def close(self) -> None:
        """Let go of the memory; the queue's descriptors are closed."""
        for view in (self._avail, self._used, self._used_index):
            view.release()
        self.queue.close()

    def offer(self, head: int) -> None:
        """Make a chain available."""
        index = self._avail[1]
        self._avail[2 + index % self.size] = head
        self._avail[1] = (index + 1) & 0xFFFF

    def skip(self, count: int) -> None:
        """Claim that ``count`` chains more are there: a lie."""
        self._avail[1] = (self._avail[1] + count) & 0xFFFF

    def slot(self, need: int) -> Slot | None:
        """The smallest free slot with room for a request of ``need`` bytes."""
        for size in sorted(self.free):
            if size >= need and self.free[size]:
                return self.free[size].pop()
        return None

    @property
    def spare(self) -> int:
        """Slots that are free."""
        return sum(map(len, self.free.values()))

    def answered(self) -> list[tuple[Pending, int]]:
        """Requests that have come back, and the length that the device says it has written.

        Raises Broken where one comes back that is not under way.
        """
        found = []
        while self._used_index[1] != self._seen:
            at = 1 + 2 * (self._seen % self.size)
            head, length = self._used[at], self._used[at + 1]
            self._seen = (self._seen + 1) & 0xFFFF
            pending = self.pending.pop(head, None)
            if pending is None:
                raise Broken(f"chain {head} came back and was not under way")
            if length > pending.room:
                raise Broken(f"{length} bytes written where there was room for {pending.room}")
            self.free[pending.slot.request_size].append(pending.slot)
            found.append((pending, length))
        return found


class Machine:
    """A virtual machine: one connection, a queue for requests and the one for FORGET."""

    MEMORY = 24 << 20
    PLAIN: Sequence[tuple[int, int, int]] = ((26, 8 * K, 72 * K), (3, 300 * K, 3 << 20))
    PRIORITY: Sequence[tuple[int, int, int]] = ((6, 8 * K, 256), (1, 300 * K, 256))
    HIDE = b""
    """What no answer may contain."""

    def __init__(
        self,
        path: Path,
        rng: random.Random,
        pid: int = 4242,
        on_answer: Callable[[Pending, int, float], None] = lambda *_: None,
    ) -> None:
        self.path, self.rng, self.pid = path, rng, pid
        self.unique = 0
        self._on_answer = on_answer
        self._answers: deque[tuple[Then, int, bytes]] = deque()
        self._is_following = False  # what follows from answers is done by the outermost reap
        self.connect()

    def connect(self) -> None:
        """As a VMM that starts. Raises Gone where the server does not accept it."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self.front = Frontend(self.path)
                break
            except BlockingIOError:  # others wait for being accepted
                time.sleep(0.01)
                if time.monotonic() > deadline:
                    raise Gone("VMMs are not accepted") from None
            except OSError as error:
                raise Gone(f"nobody listens: {error!r}") from error
        self.is_open = True
        try:
            self.front.socket.settimeout(TIMEOUT)
            self.ram = Ram((0, self.MEMORY, 0x7F00_0000_0000))
            self.ram.bytes.madvise(mmap.MADV_DONTFORK)
            self.front.negotiate()
            self.priority = Ring(self.ram, self.PRIORITY)
            self.requests = Ring(self.ram, self.PLAIN)
            self.front.start(self.ram, [self.priority.queue, self.requests.queue])
        except (OSError, AssertionError) as error:
            raise Gone(f"no connection: {error!r}") from error
        self.init()

    def init(self) -> None:
        """INIT, as a kernel mounts."""
        body = fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFF_FFFF) + fuse.INIT_FLAGS2.pack(0x7FF)
        self.ask(Opcode.INIT, 0, body.ljust(64, b"\0"))

    def close(self) -> None:
        """As a VMM that is killed."""
        if not self.is_open:
            return
        self.is_open = False
        self._answers.clear()
        self.front.close()
        for ring in (self.priority, self.requests):
            ring.close()
        self.ram.close()

    @property
    def is_dropped(self) -> bool:
        """Whether the server has closed the connection."""
        readable, _, _ = select.select([self.front.socket], [], [], 0)
        if not readable:
            return False
        try:
            return self.front.socket.recv(4096) == b""
        except OSError:
            return True

    # Requests

    def submit(
        self,
        opcode: int,
        nodeid: int = 1,
        body: bytes = b"",
        then: Then | None = ignore,
        *,
        room: int = 4096,
        uid: int = 0,
        ring: Ring | None = None,
        label: str = "",
        lie: int = 0,
        parts: int = 1,
    ) -> Pending | None:
        """Send a request; None where there is no slot for it. ``then`` None: no answer comes.

        ``lie`` is added to the length in its header; ``parts``: descriptors for each direction.
        """
        ring = ring or self.requests
        slot = ring.slot(40 + len(body))
        if slot is None:
            return None
        self.unique += 2
        data = (
            fuse.IN_HEADER.pack(
                max(0, 40 + len(body) + lie), opcode, self.unique, nodeid, uid, uid, self.pid, 0
            )
            + body
        )
        ring.ram.bytes[slot.request : slot.request + len(data)] = data
        room = 0 if then is None else min(room, slot.answer_size)
        pieces = [(*piece, 0) for piece in self._cut(slot.request, len(data), parts)]
        pieces += [(*piece, WRITE) for piece in self._cut(slot.answer, room, parts)]
        for number, (offset, length, flags) in enumerate(pieces):
            more = number + 1 < len(pieces)
            index = slot.head + number
            ring.queue.put_desc(
                index, ring.ram.guest(offset), length, flags | NEXT * more, (index + 1) * more
            )
        pending = Pending(slot, opcode, self.unique, room, time.monotonic(), label, then)
        ring.pending[slot.head] = pending
        ring.offer(slot.head)
        ring.queue.kick()
        return pending

    def _cut(self, offset: int, length: int, parts: int) -> list[tuple[int, int]]:
        if not length:
            return []
        cuts = sorted(self.rng.randrange(1, length) for _ in range(parts - 1)) if length > 1 else []
        edges = [0, *dict.fromkeys(cuts), length]
        return [(offset + a, b - a) for a, b in pairwise(edges)]

    def reap(self, timeout: float = 0) -> int:
        """Take the answers that are there; waits for one. Returns how many. Raises Broken."""
        taken = self._collect()
        if not taken and timeout:
            calls = [ring.queue.call_fd for ring in (self.priority, self.requests)]
            connection = self.front.socket.fileno()
            for fd in select.select([*calls, connection], [], [], timeout)[0]:
                if fd != connection:
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)
                elif self.is_dropped:
                    raise Gone("the server has closed the connection")
            taken = self._collect()
        if not self._is_following:
            self._is_following = True
            try:
                while self._answers:
                    then, error, payload = self._answers.popleft()
                    then(error, payload)
            finally:
                self._is_following = False
        return taken

    def _collect(self) -> int:
        taken = 0
        for ring in (self.priority, self.requests):
            for pending, length in ring.answered():
                now = time.monotonic()
                taken += 1
                error, payload = self._read(ring, pending, length)
                self._on_answer(pending, error, now)
                if pending.then is not None:
                    self._answers.append((pending.then, error, payload))
        return taken

    def _read(self, ring: Ring, pending: Pending, length: int) -> tuple[int, bytes]:
        """The answer's errno and payload; EPROTO where the chain came back without one."""
        if not length:
            return 71, b""
        data = bytes(ring.ram.bytes[pending.slot.answer : pending.slot.answer + length])
        if length < 16:
            raise Broken(f"an answer of {length} bytes to {pending.label}")
        size, error, unique = fuse.OUT_HEADER.unpack(data)
        if size != length or unique != pending.unique or not -512 < error <= 0:
            raise Broken(f"{pending.label}: header {size} {error} {unique}, {length} bytes")
        if error and length != 16:
            raise Broken(f"{pending.label}: an error with a payload")
        if self.HIDE and self.HIDE in data:
            raise Broken(f"{pending.label}: the answer has bytes from outside of the share")
        return -error, data[16:]

    def ask(
        self, opcode: int, nodeid: int = 1, body: bytes = b"", *, room: int = 4096, uid: int = 0
    ) -> tuple[int, bytes]:
        """Send a request and wait for its answer. Raises Gone."""
        answers: list[tuple[int, bytes]] = []
        label = f"ask {opcode}"

        def take(error: int, payload: bytes) -> None:
            answers.append((error, payload))

        deadline = time.monotonic() + TIMEOUT
        while self.submit(opcode, nodeid, body, take, room=room, uid=uid, label=label) is None:
            self._wait(deadline)
        while not answers:
            self._wait(deadline)
        return answers[0]

    def _wait(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise Gone(f"no answer within {TIMEOUT:.0f} s")
        self.reap(0.1)


def entry(payload: bytes, offset: int = 0) -> tuple[int, int]:
    """nodeid and st_mode of a fuse_entry_out."""
    nodeid = fuse.ENTRY_OUT.unpack(payload, offset)[0]
    return nodeid, fuse.ATTR.unpack(payload, offset + fuse.ENTRY_OUT.size)[9]


def dirents(payload: bytes, *, plus: bool) -> list[tuple[bytes, int, int, int]]:
    """name, offset, nodeid (0: none) and st_mode of a listing's entries."""
    found, at = [], 0
    head = fuse.ENTRY_SIZE if plus else 0
    while at + head + fuse.DIRENT.size <= len(payload):
        nodeid, mode = entry(payload, at) if plus else (0, 0)
        _, offset, length, _ = fuse.DIRENT.unpack(payload, at + head)
        start = at + head + fuse.DIRENT.size
        found.append((payload[start : start + length], offset, nodeid, mode))
        at = (start + length + 7) // 8 * 8
    return found
