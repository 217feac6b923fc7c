"""The well-behaved guest: what it waits for is measured.

It does what an idle guest does (GETATTR, LOOKUP, READ, OPEN, one at a time) and waits for events on
a channel of its own. Every wait is split into what the server took and what this machine took:
the time for which the server's main thread, or this one, was ready to run and had no processor
(/proc/PID/schedstat), is the machine's.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from protocol import frames, fuse
from protocol.fuse import Opcode

from .guest import NEIGHBOUR
from .machine import TIMEOUT, Gone, Machine, entry, ignore

PAUSE = 0.003
"""Seconds between requests: 300 a second."""
FILES = 8
CREATE = 0x100


class Wait(NamedTuple):
    """A wait of the well-behaved guest, in seconds; ``begun`` is of time.monotonic()."""

    begun: float
    seconds: float
    machine: float
    """Of these the machine's: no processor was free."""
    what: str

    @property
    def charged(self) -> float:
        """What the server took."""
        return max(0.0, self.seconds - self.machine)


def run_delay(path: str) -> float:
    """Seconds for which a thread was ready and did not run."""
    with open(path, "rb") as file:
        return int(file.read().split()[1]) / 1e9


class Neighbour(Machine):
    """The guest, with files of its own."""

    MEMORY = 4 << 20
    PLAIN = ((8, 8 * 1024, 72 * 1024),)
    PRIORITY = ((2, 8 * 1024, 256),)

    def __init__(self, path: Path, rng: random.Random, server: int) -> None:
        self._server = f"/proc/{server}/task/{server}/schedstat"
        self.waits: list[Wait] = []
        self.events: list[Wait] = []
        self.wrong: list[str] = []
        super().__init__(path, rng)
        self._directory = self._look(1, NEIGHBOUR)
        self._files = [self._look(self._directory, b"f%d" % n) for n in range(FILES)]
        self._delays: deque[tuple[float, float]] = deque(maxlen=4000)
        self._open = self._handle(self._files[0])
        self._channel = self._watch()
        self._is_reading = False
        self._frames = frames.FrameReader()
        self._received_at = 0.0

    def _ok(self, opcode: Opcode, nodeid: int, body: bytes) -> bytes:
        error, payload = self.ask(opcode, nodeid, body)
        if error:
            raise Gone(f"{opcode.name}: {os.strerror(error)}")
        return payload

    def _look(self, parent: int, name: bytes) -> int:
        return entry(self._ok(Opcode.LOOKUP, parent, name + b"\0"))[0]

    def _handle(self, nodeid: int, flags: int = os.O_RDONLY) -> int:
        opened = self._ok(Opcode.OPEN, nodeid, fuse.OPEN_IN.pack(flags, 0))
        handle: int = fuse.OPEN_OUT.unpack(opened)[0]
        return handle

    def _watch(self) -> tuple[int, int]:
        node = self._look(self._look(1, b".fsd"), b"session")
        fh = self._handle(node, os.O_RDWR)
        data = frames.encode(frames.Hello(1, frames.Role.OBSERVER, 0xFFF))
        data += frames.encode(frames.Resolve(1, NEIGHBOUR))
        self._ok(Opcode.WRITE, node, fuse.WRITE_IN.pack(fh, 0, len(data), 0, 0, 0) + data)
        body = fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0)
        reader = frames.FrameReader()
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            reader.feed(self._ok(Opcode.READ, node, body))
            for message in reader:
                if isinstance(message, frames.Result):
                    update = frames.Update(2, message.nodeid, message.generation, CREATE)
                    data = frames.encode(update)
                    head = fuse.WRITE_IN.pack(fh, 0, len(data), 0, 0, 0)
                    self._ok(Opcode.WRITE, node, head + data)
                    return node, fh
        raise Gone("the channel does not answer")

    def run(self, until: float) -> None:
        """Work until then. What is wrong is noted; raises Gone where the server is."""
        while time.monotonic() < until:
            self._listen()
            what, opcode, nodeid, body = self._choose()
            self._measure(what, opcode, nodeid, body)
            pause = time.monotonic() + PAUSE
            while (left := pause - time.monotonic()) > 0:
                self.reap(left)

    def _choose(self) -> tuple[str, Opcode, int, bytes]:
        rng = self.rng
        number = rng.randrange(FILES)
        name, nodeid = b"f%d" % number, self._files[number]
        choice = rng.random()
        if choice < 0.4:
            return "GETATTR", Opcode.GETATTR, nodeid, fuse.GETATTR_IN.pack(0, 0)
        if choice < 0.7:
            return "LOOKUP", Opcode.LOOKUP, self._directory, name + b"\0"
        if choice < 0.9:
            body = fuse.READ_IN.pack(self._open, 0, 4096, 0, 0, 0)
            return "READ", Opcode.READ, self._files[0], body
        return "OPEN", Opcode.OPEN, nodeid, fuse.OPEN_IN.pack(os.O_RDONLY, 0)

    def _measure(self, what: str, opcode: Opcode, nodeid: int, body: bytes) -> None:
        before = self._delay()
        begun = time.monotonic()
        error, payload = self.ask(opcode, nodeid, body, room=8192)
        taken = time.monotonic() - begun
        self.waits.append(Wait(begun, taken, self._delay() - before, what))
        if error:
            self.wrong.append(f"{what}: {os.strerror(error)}")
        elif opcode == Opcode.LOOKUP:
            self.submit(Opcode.FORGET, entry(payload)[0], fuse.FORGET_IN.pack(1), None)
        elif opcode == Opcode.OPEN:
            fh = fuse.OPEN_OUT.unpack(payload)[0]
            self.submit(Opcode.RELEASE, nodeid, fuse.RELEASE_IN.pack(fh, 0, 0, 0), ignore)
        elif opcode == Opcode.READ and payload != b"neighbour"[:1] * 4096:
            self.wrong.append(f"READ gave {len(payload)} bytes that are not the file's")

    def _delay(self) -> float:
        """For how long the server and this guest were kept waiting by the machine, so far."""
        delay = run_delay(self._server) + run_delay("/proc/thread-self/schedstat")
        self._delays.append((time.monotonic(), delay))
        return delay

    # Events

    def _listen(self) -> None:
        """Keep one read of the channel under way."""
        if self._is_reading:
            return
        node, fh = self._channel
        body = fuse.READ_IN.pack(fh, 0, 65536, 0, 0, 0)
        self._is_reading = (
            self.submit(Opcode.READ, node, body, self._heard, room=70_000) is not None
        )

    def _heard(self, error: int, payload: bytes) -> None:
        self._is_reading = False
        if error:
            self.wrong.append(f"READ of the channel: {os.strerror(error)}")
            return
        now = time.monotonic()
        self._frames.feed(payload)
        for message in self._frames:
            if isinstance(message, frames.Event) and message.name.startswith(b"at-"):
                begun = int(message.name[3:]) / 1e9
                before = max((d for at, d in self._delays if at <= begun), default=0.0)
                machine = self._delay() - before if before else 0.0
                self.events.append(Wait(begun, now - begun, machine, "EVENT"))
