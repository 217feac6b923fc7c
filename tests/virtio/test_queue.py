"""The walker of virtqueues: what drivers write, and what no driver would."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from operator import itemgetter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsd.virtio import queue
from fsd.virtio.memory import GuestMemory, MappedRegion
from fsd.virtio.queue import MAX_CHAIN, ChainError, QueueError, VirtQueue
from harness.vhost_frontend import INDIRECT, NEXT, WRITE, Queue, Ram

K = 4096
SIZE = 16


class Pair:
    """A queue from both sides."""

    def __init__(self, size: int = SIZE) -> None:
        # The first region ends in the middle of what is allocated from 0x10000 on.
        self.ram = Ram((0, 0x12000, 0x100000), (0x12000, 0x400000, 0x900000))
        self.driver = Queue(self.ram, size)
        self.memory = GuestMemory()
        self.memory.replace([MappedRegion(r, self.ram.fd) for r in self.ram.regions])
        self.device = self.open()

    def open(self, size: int | None = None, position: int = 0, shift: int = 0) -> VirtQueue:
        places = (self.driver.desc, self.driver.avail, self.driver.used)
        desc, avail, used = (self.ram.user(place) + shift for place in places)
        return VirtQueue(self.memory, size or self.driver.size, desc, avail, used, position)

    def close(self) -> None:
        self.driver.close()
        del self.device, self.memory
        self.ram.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_and_its_answer(pair: Pair, indirect: bool) -> None:
    assert pair.device.pop() is None
    head = pair.driver.add([b"header", b"body"], [3, 5], indirect=indirect)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.head == head
    assert b"".join(chain.readable) == b"headerbody"
    assert sum(map(len, chain.writable)) == 8
    assert pair.device.pop() is None
    answer = b"answered"
    for view in chain.writable:
        view[:], answer = answer[: len(view)], answer[len(view) :]
    pair.device.push(head, 8)
    assert pair.driver.used_count == 1
    assert pair.driver.take_data(0) == (head, b"answered")


def test_neighbours_are_one_buffer(pair: Pair) -> None:
    start = pair.ram.alloc(3 * K, K)
    buffers = [(start, K, 0), (start + K, K, 0), (start + 2 * K, K, WRITE)]
    pair.driver.add_buffers(buffers)
    chain = pair.device.pop()
    assert chain is not None
    assert [len(view) for view in chain.readable] == [2 * K]
    assert [len(view) for view in chain.writable] == [K]


def test_a_table_in_another_order(pair: Pair) -> None:
    entries = [(0x1000, 1, NEXT, 2), (0x3000, 1, NEXT, 3), (0x2000, 1, NEXT, 1), (0x4000, 1, 0, 0)]
    pair.driver.put_desc(0, *put_table(pair, *entries), INDIRECT, 0)
    pair.ram.bytes[0x1000:0x5000:0x1000] = b"1234"
    pair.driver.make_available(0)
    chain = pair.device.pop()
    assert chain is not None
    assert b"".join(chain.readable) == b"1234"


def test_a_buffer_spans_regions(pair: Pair) -> None:
    pair.driver.add_buffers([(0x12000 - 4, 10, 0), (0x12000 + K - 2, K, WRITE)])
    pair.ram.bytes[0x12000 - 4 : 0x12000 + 6] = b"0123456789"
    chain = pair.device.pop()
    assert chain is not None
    assert [bytes(view) for view in chain.readable] == [b"0123", b"456789"]


def test_empty_buffers_are_passed_over(pair: Pair) -> None:
    pair.driver.add_buffers([(0x1000, 0, 0), (0x1000, 4, 0), (0x1000, 0, WRITE)])
    chain = pair.device.pop()
    assert chain is not None
    assert [len(view) for view in chain.readable] == [4]
    assert chain.writable == []


def test_indices_wrap(pair: Pair) -> None:
    """More requests than a ring has entries, more than an index can count."""
    device = pair.device
    driver = pair.driver
    driver.put_desc(3, 0x10000, 4, 0, 0)
    for number in range(0x10000 + 2 * SIZE):
        driver.make_available(3)
        chain = device.pop()
        assert chain is not None
        device.push(chain.head, number % 4)
        assert driver.take(0) == (3, number % 4)
    assert device.position == 2 * SIZE


def test_it_continues_where_it_was(pair: Pair) -> None:
    driver = pair.driver
    first, second = driver.add([b"1"]), driver.add([b"2"])
    chain = pair.device.pop()
    assert chain is not None
    assert chain.head == first
    again = pair.open(position=pair.device.position)
    chain = again.pop()
    assert chain is not None
    assert chain.head == second
    again.push(second, 0)
    pair.device.push(first, 0)
    assert [driver.take(0)[0] for _ in range(2)] == [second, first]


# What no driver would write


def bad_chain(pair: Pair, match: str) -> None:
    """The chain at 0 is refused, and the queue continues."""
    pair.driver.make_available(0)
    with pytest.raises(ChainError, match=match) as caught:
        pair.device.pop()
    assert caught.value.head == 0
    assert pair.device.pop() is None
    pair.driver.put_desc(5, 0x1000, 4, 0, 0)
    pair.driver.make_available(5)
    assert not pair.device.is_empty
    chain = pair.device.pop()
    assert chain is not None
    assert chain.head == 5


def put_table(pair: Pair, *entries: tuple[int, int, int, int]) -> tuple[int, int]:
    """An indirect table: its address and its size."""
    place = pair.ram.alloc(16 * len(entries))
    pair.ram.bytes[place : place + 16 * len(entries)] = b"".join(
        struct.pack("<QIHH", *entry) for entry in entries
    )
    return pair.ram.guest(place), 16 * len(entries)


def test_loops(pair: Pair) -> None:
    pair.driver.put_desc(0, 0x1000, 4, NEXT, 1)
    pair.driver.put_desc(1, 0x2000, 4, NEXT, 0)
    bad_chain(pair, "loop")


def test_a_loop_of_one(pair: Pair) -> None:
    pair.driver.put_desc(0, 0x1000, 4, NEXT, 0)
    bad_chain(pair, "loop")


def test_a_loop_of_neighbours(pair: Pair) -> None:
    pair.driver.put_desc(0, 0x1000, 0, NEXT, 0)
    bad_chain(pair, "loop")


def test_following_outside(pair: Pair) -> None:
    pair.driver.put_desc(0, 0x1000, 4, NEXT, SIZE)
    bad_chain(pair, f"descriptor {SIZE}")


@pytest.mark.parametrize(
    ("address", "length"),
    [(0x500000, 4), (0x411FFE, 4), (2**64 - 2, 4), (0, 0xFFFFFFFF), (0x12000, 0x400001)],
)
def test_addresses_outside(pair: Pair, address: int, length: int) -> None:
    pair.driver.put_desc(0, address, length, WRITE, 0)
    bad_chain(pair, "not the guest's memory")


def test_neighbours_beyond_the_end(pair: Pair) -> None:
    """Each length is 32 bits; what they make together is still judged."""
    for index in range(4):
        flags = NEXT if index < 3 else 0
        pair.driver.put_desc(index, 0x1000 + index * 0xFFFFFFFF, 0xFFFFFFFF, flags, index + 1)
    bad_chain(pair, "not the guest's memory")


@pytest.mark.parametrize("length", [8, 16])
def test_neighbours_around_the_end_of_addresses(pair: Pair, length: int) -> None:
    begin = 2**64 - 8
    entries = [(begin, length, NEXT, 1), ((begin + length) % 2**64, 16, 0, 0)]
    pair.driver.put_desc(0, *put_table(pair, *entries), INDIRECT, 0)
    bad_chain(pair, "not the guest's memory")


def test_readable_behind_writable(pair: Pair) -> None:
    pair.driver.put_desc(0, 0x1000, 4, WRITE | NEXT, 1)
    pair.driver.put_desc(1, 0x2000, 4, 0, 0)
    bad_chain(pair, "behind one to write")


@pytest.mark.parametrize("size", [0, 8, 17, 16 * (MAX_CHAIN + 1), 0xFFFFFFF0])
def test_indirect_tables_of_a_wrong_size(pair: Pair, size: int) -> None:
    pair.driver.put_desc(0, 0x1000, size, INDIRECT, 0)
    bad_chain(pair, "indirect table of")


def test_an_indirect_table_outside(pair: Pair) -> None:
    pair.driver.put_desc(0, 0x500000, 16, INDIRECT, 0)
    bad_chain(pair, "not the guest's memory")


def test_an_indirect_table_in_one(pair: Pair) -> None:
    inner = put_table(pair, (0x1000, 4, 0, 0))
    outer = put_table(pair, (*inner, INDIRECT, 0))
    pair.driver.put_desc(0, *outer, INDIRECT, 0)
    bad_chain(pair, "inside of a chain")


def test_an_indirect_table_with_more_behind(pair: Pair) -> None:
    table = put_table(pair, (0x1000, 4, 0, 0))
    pair.driver.put_desc(0, *table, INDIRECT | NEXT, 1)
    bad_chain(pair, "inside of a chain")


def test_a_loop_in_an_indirect_table(pair: Pair) -> None:
    table = put_table(pair, (0x1000, 4, NEXT, 1), (0x2000, 4, NEXT, 0))
    pair.driver.put_desc(0, *table, INDIRECT, 0)
    bad_chain(pair, "loop")


def test_following_outside_of_an_indirect_table(pair: Pair) -> None:
    table = put_table(pair, (0x1000, 4, NEXT, 1))
    pair.driver.put_desc(0, *table, INDIRECT, 0)
    bad_chain(pair, "descriptor 1 in a table of 1")


def test_the_longest_chain(pair: Pair) -> None:
    entries = [(0x12000 + 0x1000 + 8 * n, 4, NEXT, n + 1) for n in range(MAX_CHAIN - 1)]
    table = put_table(pair, *entries, (0x1000, 4, 0, 0))
    pair.driver.put_desc(0, *table, INDIRECT, 0)
    pair.driver.make_available(0)
    chain = pair.device.pop()
    assert chain is not None
    assert len(chain.readable) == MAX_CHAIN


def test_a_head_outside(pair: Pair) -> None:
    pair.driver.make_available(SIZE)
    with pytest.raises(QueueError, match=f"descriptor {SIZE}"):
        pair.device.pop()


def test_more_requests_than_entries(pair: Pair) -> None:
    pair.driver.make_available(0, count=SIZE + 1)
    with pytest.raises(QueueError, match="17 requests"):
        pair.device.pop()


@pytest.mark.parametrize("size", [3, 65536, 1 << 31])
def test_sizes_that_cannot_be(pair: Pair, size: int) -> None:
    with pytest.raises(QueueError):
        pair.open(size)


def test_rings_outside_or_not_aligned(pair: Pair) -> None:
    with pytest.raises(QueueError, match="aligned"):
        pair.open(shift=1)
    with pytest.raises(QueueError, match="outside"):
        pair.open(shift=0x1000000)
    with pytest.raises(QueueError, match="outside"):
        pair.open(size=32768)


# Anything at all

DESCRIPTORS = st.tuples(
    st.one_of(st.integers(0, 0x420000), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 0x3000), st.integers(0, 2**32 - 1)),
    st.integers(0, 7),
    st.integers(0, SIZE + 1),
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@given(
    parts=st.lists(
        st.tuples(st.booleans(), st.integers(0, 5), st.sampled_from([K, K, 10])),
        min_size=1,
        max_size=SIZE - 1,
    ),
    direct=st.integers(0, SIZE),
    shuffled=st.none() | st.randoms(use_true_random=False),
)
def test_any_request(
    shared: Pair, parts: list[tuple[bool, int, int]], direct: int, shuffled: Random | None
) -> None:
    """Neighbours are one buffer, wherever the descriptors lie: the first in the queue's own table,
    the others in one elsewhere.
    """
    ram, place = shared.ram, 0x11FF0  # across the regions
    ram.bytes[0x20000 : 0x20000 + 6 * K] = Random(1).randbytes(6 * K)
    spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    entries = []
    for writes, page, length in sorted(parts, key=itemgetter(0)):
        begin, found = 0x20000 + page * K, spans[writes]
        first = found.pop()[0] if found and found[-1][1] == begin else begin
        found.append((first, begin + length))
        entries.append((begin, length, WRITE * writes | NEXT))
    entries[-1] = (*entries[-1][:2], entries[-1][2] & ~NEXT)
    elsewhere = len(entries[direct:])
    for index, entry in enumerate(entries[:direct]):
        shared.driver.put_desc(index, *entry, index + 1)
    if elsewhere:
        shared.driver.put_desc(direct, place, 16 * elsewhere, INDIRECT, 0)
    indices = list(range(1, elsewhere))
    if shuffled is not None:
        shuffled.shuffle(indices)
    indices = [0, *indices, 0]
    for entry, index, following in zip(entries[direct:], indices, indices[1:], strict=False):
        struct.pack_into("<QIHH", ram.bytes, place + 16 * index, *entry, following)
    struct.pack_into("<3H", ram.bytes, shared.driver.avail, 0, 1, 0)
    chain = shared.open().pop()
    assert chain is not None
    for writes, views in ((False, chain.readable), (True, chain.writable)):
        assert views == [ram.bytes[begin:end] for begin, end in spans[writes]]


@settings(max_examples=400)
@given(
    table=st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    indirect=st.lists(DESCRIPTORS, min_size=1, max_size=8),
    heads=st.lists(st.integers(0, SIZE), max_size=SIZE),
)
def test_any_ring(
    shared: Pair,
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
) -> None:
    """Requests with views of the guest's memory, or one of two errors; and it ends."""
    ram, driver = shared.ram, shared.driver
    place = 0x11FF0  # across the regions
    for number, entry in enumerate(indirect):
        ram.bytes[place + 16 * number : place + 16 * number + 16] = struct.pack("<QIHH", *entry)
    for number, (address, length, flags, following) in enumerate(table):
        if flags & INDIRECT and length % 2:
            address, length, flags = place, 16 * len(indirect), INDIRECT
        driver.put_desc(number, address, length, flags, following)
    struct.pack_into("<2H", ram.bytes, driver.avail, 0, len(heads))
    struct.pack_into(f"<{len(heads)}H", ram.bytes, driver.avail + 4, *heads)
    device = shared.open()
    for _ in range(len(heads)):
        try:
            chain = device.pop()
        except ChainError as error:
            device.push(error.head, 0)
            continue
        except QueueError:
            return
        assert chain is not None
        for view in (*chain.readable, *chain.writable):
            assert 0 < len(view) <= 0x400000
        device.push(chain.head, 0)
    assert device.pop() is None


def test_an_index_that_is_written_bytewise(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read in the middle of it is read again."""
    monkeypatch.setattr(queue, "TORN", 30.0)
    ram, index = pair.driver.ram.bytes, pair.driver.avail + 2
    ram[index : index + 2] = b"\xff\0"
    pair.device.position = 0xFF
    pair.driver.add([b"request"])
    assert ram[index : index + 2] == b"\0\1"
    ram[index + 1] = 0  # it has come to half of it
    rest = threading.Timer(0.01, ram.__setitem__, (index + 1, 1))
    rest.start()
    chain = pair.device.pop()
    rest.join()
    assert chain is not None
    assert bytes(chain.readable[0]) == b"request"
