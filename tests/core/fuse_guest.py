"""A guest's kernel for tests: makes raw FUSE requests to a real session, and reads the replies."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fsd.fuse.operations import Operations
from fsd.fuse.session import FuseSession, SessionOptions
from protocol import fuse
from protocol.fuse import Init, Opcode

ALL_FLAGS = (1 << 43) - 1
ROOM = 1 << 16


class ManualLoop:
    """The event loop: nothing happens but when the test says so."""

    def __init__(self) -> None:
        self._soon: list[Callable[[], None]] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._threads: list[tuple[Callable[[], None], Callable[[BaseException | None], None]]] = []

    def soon(self, call: Callable[[], None]) -> None:
        self._soon.append(call)

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        timer = (seconds, call)
        self._timers.append(timer)

        def cancel() -> None:
            self._timers = [other for other in self._timers if other is not timer]

        return cancel

    def in_thread(
        self, work: Callable[[], None], then: Callable[[BaseException | None], None]
    ) -> None:
        self._threads.append((work, then))

    @property
    def timers(self) -> list[float]:
        """Seconds of the timers that are set."""
        return [seconds for seconds, _ in self._timers]

    def turn(self) -> None:
        """Do what is to be done soon."""
        soon, self._soon = self._soon, []
        for call in soon:
            call()

    def expire(self) -> None:
        """Let the time of all timers be over."""
        timers, self._timers = self._timers, []
        for _, call in timers:
            call()

    def run_threads(self) -> None:
        """Do what was given to threads."""
        threads, self._threads = self._threads, []
        for work, then in threads:
            error: BaseException | None = None
            try:
                work()
            except OSError as caught:
                error = caught
            then(error)


class Reply(NamedTuple):
    """``error`` is a positive errno or 0."""

    error: int
    payload: bytes


class Pending:
    """A request under way."""

    def __init__(self, unique: int, room: int, *, lost: bool) -> None:
        self.unique = unique
        self.buffer = bytearray(room)
        self.lengths: list[int] = []
        self._lost = lost

    def done(self, length: int) -> None:
        self.lengths.append(length)
        assert len(self.lengths) == 1, "answered twice"
        assert 0 <= length <= len(self.buffer)
        if self._lost and length:
            raise OSError(2, "the kernel does not want it any more")

    def reply(self) -> Reply | None:
        """The answer; None while there is none."""
        if not self.lengths or not self.lengths[0]:
            return None
        length = self.lengths[0]
        header = fuse.OUT_HEADER.unpack(bytes(self.buffer[:length]))
        assert header.len == length
        return Reply(-header.error, bytes(self.buffer[16:length]))


class Node(NamedTuple):
    """What a kernel keeps of fuse_entry_out."""

    nodeid: int
    generation: int
    entry_valid: float
    attr_valid: float
    attr: tuple[int, ...]


def entry_of(payload: bytes) -> Node:
    nodeid, generation, seconds, attr_seconds, nanos, attr_nanos = fuse.ENTRY_OUT.unpack(payload)
    attr = fuse.ATTR.unpack(payload, fuse.ENTRY_OUT.size)
    return Node(nodeid, generation, seconds + nanos / 1e9, attr_seconds + attr_nanos / 1e9, attr)


class GuestKernel:
    """One guest. ``pid`` is that of the process in whose name it asks."""

    def __init__(
        self,
        operations: Operations,
        options: SessionOptions | None = None,
        *,
        init: bool = True,
        flags: int = ALL_FLAGS,
    ) -> None:
        self.loop = ManualLoop()
        self.session = FuseSession(operations, self.loop, options)
        self.uid, self.gid, self.pid = os.geteuid(), os.getegid(), os.getpid()
        self._unique = 0
        if init:
            self.init(flags=flags)

    def begin(
        self,
        opcode: int,
        nodeid: int = 1,
        body: bytes = b"",
        *,
        room: int = ROOM,
        cut: Sequence[int] = (),
        lost: bool = False,
        ext: bytes = b"",
    ) -> Pending:
        """Send a request; its buffers, in both directions, are cut at these offsets."""
        self._unique += 2
        header = fuse.IN_HEADER.pack(
            40 + len(body) + len(ext), opcode, self._unique, nodeid,
            self.uid, self.gid, self.pid, len(ext) // 8,
        )  # fmt: skip
        pending = Pending(self._unique, room, lost=lost)
        message = memoryview(header + body + ext)
        self.session.serve(
            split(message, cut), split(memoryview(pending.buffer), cut), pending.done
        )
        return pending

    def ask(self, opcode: int, nodeid: int = 1, body: bytes = b"", **more: object) -> Reply:
        """Send a request that is answered at once, or once threads have done their work."""
        pending = self.begin(opcode, nodeid, body, **more)  # type: ignore[arg-type]
        reply = pending.reply()
        if reply is None:
            self.loop.run_threads()
            reply = pending.reply()
        assert reply is not None, f"{opcode} is not answered"
        return reply

    def ok(self, opcode: int, nodeid: int = 1, body: bytes = b"", **more: object) -> bytes:
        """Send a request that succeeds at once."""
        error, payload = self.ask(opcode, nodeid, body, **more)
        assert not error, f"{Opcode(opcode).name}: {os.strerror(error)}"
        return payload

    # The requests that tests make most

    def init(
        self, major: int = 7, minor: int = 45, flags: int = ALL_FLAGS, *, size: int = 64
    ) -> Reply:
        body = fuse.INIT_IN.pack(major, minor, 1 << 17, flags & 0xFFFF_FFFF)
        body += fuse.INIT_FLAGS2.pack(flags >> 32)
        return self.ask(Opcode.INIT, 0, body.ljust(size, b"\0")[:size])

    def lookup(self, name: bytes, parent: int = 1) -> Node:
        return entry_of(self.ok(Opcode.LOOKUP, parent, name + b"\0"))

    def forget(self, nodeid: int, count: int) -> None:
        pending = self.begin(Opcode.FORGET, nodeid, fuse.FORGET_IN.pack(count), room=0)
        assert pending.lengths == [0]

    def open(self, nodeid: int, flags: int = os.O_RDWR) -> int:
        return fuse.OPEN_OUT.unpack(self.ok(Opcode.OPEN, nodeid, fuse.OPEN_IN.pack(flags, 0)))[0]

    def release(self, nodeid: int, fh: int) -> None:
        self.ok(Opcode.RELEASE, nodeid, fuse.RELEASE_IN.pack(fh, 0, 0, 0))

    def create(self, name: bytes, mode: int = 0o644, parent: int = 1) -> tuple[Node, int]:
        flags = os.O_RDWR | os.O_CREAT
        body = fuse.CREATE_IN.pack(flags, mode, 0o022, 0) + name + b"\0"
        payload = self.ok(Opcode.CREATE, parent, body)
        return entry_of(payload), fuse.OPEN_OUT.unpack(payload, fuse.ENTRY_SIZE)[0]

    def read(
        self, nodeid: int, fh: int, offset: int = 0, size: int = 4096, **more: object
    ) -> bytes:
        body = fuse.READ_IN.pack(fh, offset, size, 0, 0, 0)
        return self.ok(Opcode.READ, nodeid, body, **more)

    def write(self, nodeid: int, fh: int, data: bytes, offset: int = 0, **more: object) -> int:
        body = fuse.WRITE_IN.pack(fh, offset, len(data), 0, 0, 0) + data
        return fuse.WRITE_OUT.unpack(self.ok(Opcode.WRITE, nodeid, body, **more))


def split(buffer: memoryview, cuts: Sequence[int]) -> list[memoryview]:
    """The buffer cut at these offsets."""
    places = [0, *sorted(min(cut, len(buffer)) for cut in cuts), len(buffer)]
    return [buffer[a:b] for a, b in itertools.pairwise(places)]


def flags_of(reply: Reply) -> Init:
    """What INIT's reply agrees to."""
    fields = fuse.INIT_OUT.unpack(reply.payload)
    return Init(fields[3] | fields[10] << 32)
