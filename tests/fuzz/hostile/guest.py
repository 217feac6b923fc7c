"""The model of a hostile guest: what it has learned, from which it makes what looks like requests.

Most of what it asks is right (nodes it has looked up, handles it holds, names that are there), so
that its requests come behind the first check; the rest is wrong on purpose.
"""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Callable
from pathlib import Path

from protocol import fuse
from protocol.fuse import Opcode

from .machine import Gone, Machine, Pending, Then, dirents, entry, ignore

NODES, HANDLES = 4000, 400
"""What the model remembers at most: it gives the rest back."""
NEIGHBOUR = b"neighbour"
"""The well-behaved guest's directory, which the others leave alone."""
NAMES = (
    *(b"n%d" % n for n in range(40)), *(b"d%d" % n for n in range(12)), b"swap", b"volume",
    b"user.x", b"x" * 255, b"\xff\xfe",
)  # fmt: skip
BAD_NAMES = (
    b"", b".", b"..", b"../outside", b"../outside/secret", b"/etc/passwd", b"d1/n1", b"/", b"a\0b",
    b"x" * 256, b"x" * 5000, b".fsd", b"control", b"security.capability",
)  # fmt: skip
NUMBERS = (
    *range(8), 511, 4095, 4096, 65535, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
SIZES = (0, 1, 7, 100, 4096, 4097, 65536, 131072, 1 << 20, 1 << 24, 0x7FFF_FFFF, 0xFFFF_FFFF)
Journal = Callable[[float, float, str], None]
"""Where requests are noted: when they were sent and answered (monotonic), and what they were."""


class Guest(Machine):
    """A hostile guest."""

    def __init__(self, path: Path, name: str, rng: random.Random, journal: Journal) -> None:
        self.name, self.journal = name, journal
        self.counts: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        self.operation = ""
        self.forget_all()
        super().__init__(path, rng, pid=1000 + rng.randrange(1000), on_answer=self._note)

    def forget_all(self) -> None:
        """It knows the root, as after a mount."""
        self.nodes: dict[int, int] = {1: stat.S_IFDIR}
        self.lookups: dict[int, int] = {}
        self.handles: dict[int, tuple[int, bool]] = {}
        self.places: dict[int, int] = {}
        self.channels: list[tuple[int, int]] = []
        self.waiting: dict[int, float] = {}

    def _note(self, pending: Pending, error: int, now: float) -> None:
        self.waiting.pop(pending.unique, None)
        key = pending.label
        self.counts[key] = self.counts.get(key, 0) + 1
        if error:
            self.errors[key] = self.errors.get(key, 0) + 1
        self.journal(pending.begun, now, f"{self.name} {key}")

    # What it sends

    def send(
        self,
        opcode: int,
        nodeid: int,
        body: bytes = b"",
        then: Then | None = ignore,
        *,
        room: int = 4096,
        priority: bool = False,
        waits: bool = False,
        wild: bool = True,
    ) -> None:
        """A request in the way of this guest: cut anywhere, seldom with a lie, by some user.

        Where no slot is free, waits for one; requests that wait for something are interrupted then.
        """
        rng = self.rng
        uid = 0 if rng.random() < 0.7 else rng.choice((1000, 1000, 65534, 0xFFFF_FFFF))
        lie = rng.choice((-1, 1, 8, -40, 1 << 20)) if wild and rng.random() < 0.01 else 0
        if wild and rng.random() < 0.02:
            room = rng.choice((0, 1, 15, 16, 17, 160, 70_000))
        parts = rng.randrange(1, 5) if rng.random() < 0.2 else 1
        label = self.operation
        begun = time.monotonic()
        while True:
            pending = self.submit(
                opcode, nodeid, body, then, room=room, uid=uid, lie=lie, parts=parts, label=label,
                ring=self.priority if priority else None,
            )  # fmt: skip
            if pending is not None:
                break
            if time.monotonic() - begun > 1:
                self.interrupt_all()
            if time.monotonic() - begun > 10:
                raise Gone("no slot is free: requests are not answered")
            self.reap(0.05)
        if waits:
            self.waiting[pending.unique] = pending.begun

    def interrupt_all(self) -> None:
        """Interrupt whatever waits."""
        for unique in list(self.waiting)[:8]:
            self.submit(
                Opcode.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(unique), None, ring=self.priority,
                label="interrupt",
            )  # fmt: skip

    # What it knows

    def some_name(self) -> bytes:
        """A name, mostly a good one."""
        return self.rng.choice(NAMES if self.rng.random() < 0.95 else BAD_NAMES)

    def number(self) -> int:
        """A number that may matter."""
        rng = self.rng
        return rng.choice(NUMBERS) if rng.random() < 0.9 else rng.getrandbits(64)

    def offset(self) -> int:
        """A place in a file."""
        rng = self.rng
        return rng.randrange(1 << 18) if rng.random() < 0.9 else self.number()

    def size(self) -> int:
        """A size to ask for, seldom giant."""
        rng = self.rng
        return rng.randrange(1 << 14) if rng.random() < 0.7 else rng.choice(SIZES)

    def node(self, kind: int | None = None) -> int:
        """A node it knows, of a kind if there is one; seldom any number."""
        rng = self.rng
        if rng.random() < 0.01:
            return self.number()
        nodes = list(self.nodes)
        for _ in range(8):
            nodeid = rng.choice(nodes)
            if kind is None or self.nodes[nodeid] == kind:
                return nodeid
        return 1

    def directory(self) -> int:
        """A directory it knows."""
        return self.node(stat.S_IFDIR)

    def file(self) -> int:
        """A file it knows."""
        return self.node(stat.S_IFREG)

    def handle(self, *, directory: bool = False) -> tuple[int, int]:
        """A node and its open handle; (node, any number) where there is none."""
        rng = self.rng
        if rng.random() < 0.98:
            known = list(self.handles)
            for _ in range(8 if known else 0):
                fh = rng.choice(known)
                nodeid, is_directory = self.handles[fh]
                if is_directory == directory:
                    return nodeid, fh
        return self.node(), self.number()

    # What it learns

    def learn(self, error: int, payload: bytes) -> None:
        """The answer is an entry."""
        if error or len(payload) < fuse.ENTRY_SIZE:
            return
        self.know(*entry(payload))

    def know(self, nodeid: int, mode: int) -> None:
        """One more look-up of a node is counted."""
        if not nodeid:
            return
        self.nodes[nodeid] = stat.S_IFMT(mode)
        self.lookups[nodeid] = self.lookups.get(nodeid, 0) + 1
        if len(self.nodes) > NODES:
            for old in list(self.nodes)[1 : NODES // 4]:
                self.give_back(old)

    def give_back(self, nodeid: int) -> None:
        """FORGET all of it."""
        self.nodes.pop(nodeid, None)
        count = self.lookups.pop(nodeid, 0)
        if count:
            body = fuse.FORGET_IN.pack(count)
            self.send(Opcode.FORGET, nodeid, body, None, priority=self.rng.random() < 0.5)

    def learn_handle(self, nodeid: int, *, directory: bool = False) -> Then:
        """The answer is a handle of ``nodeid``."""

        def then(error: int, payload: bytes) -> None:
            if error or len(payload) < fuse.OPEN_OUT.size:
                return
            self.handles[fuse.OPEN_OUT.unpack(payload)[0]] = (nodeid, directory)
            if len(self.handles) > HANDLES:
                for fh in list(self.handles)[: HANDLES // 4]:
                    self.release(fh)

        return then

    def learn_created(self, error: int, payload: bytes) -> None:
        """The answer is an entry and a handle."""
        if not error and len(payload) >= fuse.ENTRY_SIZE + fuse.OPEN_OUT.size:
            self.learn(0, payload)
            nodeid, _ = entry(payload)
            self.learn_handle(nodeid)(0, payload[fuse.ENTRY_SIZE :])

    def release(self, fh: int) -> None:
        """RELEASE or RELEASEDIR."""
        nodeid, directory = self.handles.pop(fh)
        self.places.pop(fh, None)
        opcode = Opcode.RELEASEDIR if directory else Opcode.RELEASE
        self.send(opcode, nodeid, fuse.RELEASE_IN.pack(fh, 0, 0, 0))

    def learn_listing(self, fh: int, *, plus: bool) -> Then:
        """The answer is a part of a listing."""

        def then(error: int, payload: bytes) -> None:
            if error:
                return
            for name, offset, nodeid, mode in dirents(payload, plus=plus):
                self.places[fh] = offset
                if nodeid and name == NEIGHBOUR:
                    self.submit(Opcode.FORGET, nodeid, fuse.FORGET_IN.pack(1), None, label="forget")
                elif nodeid:
                    self.know(nodeid, mode)

        return then


def open_flags(rng: random.Random) -> int:
    """Flags of open(2), also odd ones."""
    flags = rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, 3))
    for flag in (os.O_APPEND, os.O_TRUNC, os.O_NONBLOCK, os.O_DIRECT, os.O_NOATIME, os.O_SYNC):
        flags |= flag * (rng.random() < 0.05)
    return flags | rng.choice((os.O_PATH, os.O_DIRECTORY, os.O_TMPFILE)) * (rng.random() < 0.01)
