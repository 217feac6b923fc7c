"""What no guest's kernel would write, to a real server with a share: it costs that one request.

tests/virtio/test_queue.py has what the walker makes of a chain; here is what a guest gets.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsd.virtio.queue import MAX_CHAIN
from harness.fuse_driver import ROOM, Driver, Opened
from harness.share_server import Share, shared
from harness.vhost_frontend import INDIRECT, NEXT, WRITE
from protocol import fuse
from protocol.fuse import Opcode

SIZE = 2048  # of the queue: longer than a chain may be
OUTSIDE = 1 << 21  # behind the guest's memory
OUT = fuse.OUT_HEADER.size


class Case:
    """A guest with a file open, and room for what it writes."""

    def __init__(self, driver: Driver, file: Opened) -> None:
        self.driver, self.file = driver, file
        self.room = driver.ram.guest(driver.ram.alloc(ROOM))

    def place(self, data: bytes) -> tuple[int, int]:
        """Address and length of a readable part."""
        offset = self.driver.ram.alloc(max(1, len(data)), 1)
        self.driver.ram.bytes[offset : offset + len(data)] = data
        return self.driver.ram.guest(offset), len(data)

    def chain(self, *parts: tuple[int, int, int]) -> None:
        """Descriptors from 0 on, each the next one's predecessor."""
        for index, (address, length, flags) in enumerate(parts):
            last = index + 1 == len(parts)
            following = 0 if last else index + 1
            self.driver.queue.put_desc(index, address, length, flags | NEXT * (not last), following)

    @property
    def getattr(self) -> tuple[int, int]:
        """A good request."""
        return self.place(self.driver.request(Opcode.GETATTR, 1, bytes(16)))

    def answer(self) -> bytes:
        """What is written to the room for the chain at 0."""
        queue = self.driver.queue
        queue.ram.bytes[self.room : self.room + ROOM] = b"\xee" * ROOM
        queue.make_available(0)
        queue.kick()
        head, length = queue.take()
        assert head == 0
        assert length <= ROOM
        data = bytes(queue.ram.bytes[self.room : self.room + ROOM])
        assert data[length:] == b"\xee" * (ROOM - length), "written beyond what it says"
        return data[:length]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("share")


@pytest.fixture(scope="module")
def server(source: Path) -> Iterator[Share]:
    if os.geteuid() != 0:
        pytest.skip("makes namespaces, which only root can")
    with shared(source, 1, "--log-level=off") as server:
        yield server


@pytest.fixture
def case(server: Share) -> Iterator[Case]:
    driver = Driver(server.paths[0], SIZE)
    try:
        yield Case(driver, driver.create(b"file"))
        # The queue serves on.
        driver.send(Opcode.GETATTR, 1, bytes(16))
        assert driver.receive() == 0
    finally:
        driver.close()


def loop(case: Case) -> None:
    case.chain((*case.getattr, 0), (case.room, ROOM, WRITE))
    case.driver.queue.put_desc(1, case.room, ROOM, WRITE | NEXT, 0)


def loop_of_one(case: Case) -> None:
    case.driver.queue.put_desc(0, *case.getattr, NEXT, 0)


def next_outside(case: Case) -> None:
    case.driver.queue.put_desc(0, *case.getattr, NEXT, SIZE)


def too_long(case: Case) -> None:
    address, length = case.getattr
    parts = [(address + n % length, 1, 0) for n in range(0, 3 * MAX_CHAIN, 2)]
    case.chain(*parts[: MAX_CHAIN + 8], (case.room, ROOM, WRITE))


def request_outside(case: Case) -> None:
    case.chain((OUTSIDE, 56, 0), (case.room, ROOM, WRITE))


def request_half_outside(case: Case) -> None:
    case.chain((OUTSIDE - 8, 56, 0), (case.room, ROOM, WRITE))


def address_wraps(case: Case) -> None:
    case.chain((2**64 - 8, 56, 0), (case.room, ROOM, WRITE))


def room_outside(case: Case) -> None:
    case.chain((*case.getattr, 0), (OUTSIDE, ROOM, WRITE))


def room_of_4_gib(case: Case) -> None:
    case.chain((*case.getattr, 0), (case.room, 0xFFFFFFFF, WRITE))


def wrong_order(case: Case) -> None:
    case.chain((case.room, ROOM, WRITE), (*case.getattr, 0))


def table_outside(case: Case) -> None:
    case.driver.queue.put_desc(0, OUTSIDE, 32, INDIRECT, 0)


def table_of_no_size(case: Case) -> None:
    case.driver.queue.put_desc(0, *case.place(b""), INDIRECT, 0)


def table_in_a_table(case: Case) -> None:
    place = case.place(struct.pack("<QIHH", case.room, 16, INDIRECT, 0))
    case.driver.queue.put_desc(0, *place, INDIRECT, 0)


def table_that_loops(case: Case) -> None:
    place = case.place(struct.pack("<QIHH", *case.getattr, NEXT, 0))
    case.driver.queue.put_desc(0, *place, INDIRECT, 0)


@pytest.mark.parametrize(
    "make",
    [loop, loop_of_one, next_outside, too_long, request_outside, request_half_outside,
     address_wraps, room_outside, room_of_4_gib, wrong_order, table_outside, table_of_no_size,
     table_in_a_table, table_that_loops],
)  # fmt: skip
def test_a_bad_chain_comes_back_unanswered(case: Case, make: Callable[[Case], None]) -> None:
    make(case)
    assert case.answer() == b""


def empty(case: Case) -> None:
    case.chain((case.room, 0, 0), (case.room, 0, WRITE))


def all_readable(case: Case) -> None:
    case.chain((*case.getattr, 0))


def room_for_less_than_a_header(case: Case) -> None:
    case.chain((*case.getattr, 0), (case.room, OUT - 1, WRITE))


@pytest.mark.parametrize("make", [empty, all_readable, room_for_less_than_a_header])
def test_what_cannot_be_answered(case: Case, make: Callable[[Case], None]) -> None:
    make(case)
    assert case.answer() == b""


def refused(case: Case, request: bytes, number: int, *, room: int = ROOM) -> None:
    """A request is answered by an errno alone."""
    case.chain((*case.place(request), 0), (case.room, room, WRITE))
    answer = case.answer()
    assert len(answer) == OUT
    header = fuse.OUT_HEADER.unpack(answer)
    assert (header.len, -header.error) == (OUT, number)
    if len(request) >= 16:  # enough of it to say which it is
        assert header.unique == int.from_bytes(request[8:16], "little")


@pytest.mark.parametrize("length", [1, 15, 16, fuse.IN_HEADER.size - 1])
def test_a_request_shorter_than_its_header(case: Case, length: int) -> None:
    refused(case, case.driver.request(Opcode.GETATTR, 1, bytes(16))[:length], errno.EINVAL)


@pytest.mark.parametrize("more", [-60, -9, -1, 1, 1 << 20, 0xFFFFFFFF - 50])
def test_a_length_that_lies(case: Case, more: int) -> None:
    """Of the whole message, in its header."""
    request = case.driver.request(Opcode.MKDIR, 1, bytes(8) + b"d\0")
    (length,) = struct.unpack_from("<I", request)
    lie = struct.pack("<I", (length + more) & 0xFFFFFFFF) + request[4:]
    refused(case, lie, errno.EINVAL)


@pytest.mark.parametrize("size", [3, 4096, 1 << 20, 0xFFFFFFFF])
def test_a_write_of_more_than_there_is(case: Case, size: int) -> None:
    body = fuse.WRITE_IN.pack(case.file.fh, 0, size, 0, 0, os.O_RDWR) + b"ab"
    refused(case, case.driver.request(Opcode.WRITE, case.file.nodeid, body), errno.EINVAL)


@pytest.mark.parametrize("size", [ROOM, 1 << 20, 0xFFFFFFFF])
def test_a_read_of_more_than_there_is_room_for(case: Case, size: int, source: Path) -> None:
    """As much as fits: nothing is written behind it."""
    os.truncate(source / "file", 1 << 20)
    body = fuse.READ_IN.pack(case.file.fh, 0, size, 0, 0, os.O_RDWR)
    request = case.driver.request(Opcode.READ, case.file.nodeid, body)
    case.chain((*case.place(request), 0), (case.room, OUT + 100, WRITE))
    assert len(case.answer()) == OUT + 100


@pytest.mark.parametrize("room", [OUT, OUT + 1, OUT + 103])
def test_an_answer_that_does_not_fit(case: Case, room: int) -> None:
    request = case.driver.request(Opcode.GETATTR, 1, bytes(16))
    refused(case, request, errno.EIO, room=room)


@pytest.mark.parametrize(
    ("name", "number"),
    [(b"", errno.EINVAL), (b"unended", errno.EINVAL), (b"../x\0", errno.EINVAL),
     (b"..\0", errno.EINVAL), (b"n" * 4000 + b"\0", errno.ENAMETOOLONG)],
)  # fmt: skip
def test_names(case: Case, name: bytes, number: int) -> None:
    refused(case, case.driver.request(Opcode.MKDIR, 1, bytes(8) + name), number)


def test_nodes_and_handles_of_nobody(case: Case) -> None:
    for nodeid in (0, case.file.nodeid + 1, 2**64 - 1):
        refused(case, case.driver.request(Opcode.GETATTR, nodeid, bytes(16)), errno.ESTALE)
    for fh in (0, case.file.fh + 1, 2**64 - 1):
        body = fuse.READ_IN.pack(fh, 0, 1, 0, 0, os.O_RDWR)
        refused(case, case.driver.request(Opcode.READ, case.file.nodeid, body), errno.EBADF)
    for opcode in (0, 7, 4095, 0xFFFFFFFF):
        refused(case, case.driver.request(opcode, 1, b""), errno.ENOSYS)
