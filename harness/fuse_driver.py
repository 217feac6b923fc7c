"""A VMM and a guest's virtiofs driver on a real server's socket: FUSE requests in descriptors."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path
from typing import NamedTuple

from protocol import fuse
from protocol.fuse import Opcode

from .vhost_frontend import Frontend, Queue, Ram

ROOM = 4096


class Opened(NamedTuple):
    """A file that a guest has open."""

    nodeid: int
    fh: int


class Driver:
    """A guest after INIT. ``queue`` is the one for requests, ``agreed`` are the flags agreed in
    INIT.
    """

    def __init__(self, path: Path, size: int = 64, flags: int = 0) -> None:
        self.ram = Ram((0, 1 << 20, 0x7000_0000_0000), (1 << 20, 1 << 20, 0x7100_0000_0000))
        self._unique = itertools.count(1)
        self.queue = Queue(self.ram, size)
        self._queues = [Queue(self.ram, size), self.queue]
        self._vmm = Frontend(path)
        self._vmm.negotiate()
        self._vmm.start(self.ram, self._queues)
        self.send(Opcode.INIT, 0, fuse.INIT_IN.pack(fuse.MAJOR, fuse.MINOR, 0, flags))
        assert self.receive() == 0
        (self.agreed,) = struct.unpack_from("<I", self._answer, fuse.OUT_HEADER.size + 12)

    def request(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        """A message of root's."""
        length = fuse.IN_HEADER.size + len(body)
        return (
            fuse.IN_HEADER.pack(length, opcode, next(self._unique), nodeid, 0, 0, os.getpid(), 0)
            + body
        )

    def send(self, opcode: Opcode, nodeid: int, body: bytes, *, kick: bool = True) -> None:
        """A request of root."""
        self.queue.add([self.request(opcode, nodeid, body)], [ROOM])
        if kick:
            self.queue.kick()

    def receive(self) -> int:
        """The errno of the next answer."""
        self._answer = self.queue.take_data()[1]
        return -fuse.OUT_HEADER.unpack(self._answer[: fuse.OUT_HEADER.size]).error

    def create(self, name: bytes) -> Opened:
        """CREATE in the root."""
        body = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o100600, 0, 0) + name + b"\0"
        self.send(Opcode.CREATE, 1, body)
        assert self.receive() == 0
        answer = self._answer[fuse.OUT_HEADER.size :]
        (nodeid,) = struct.unpack_from("<Q", answer)
        (fh,) = struct.unpack_from("<Q", answer, fuse.ENTRY_SIZE)
        return Opened(nodeid, fh)

    def close(self) -> None:
        """As a VMM that ends."""
        self._vmm.close()
        for queue in self._queues:
            queue.close()
        self.ram.close()
