"""Addresses of a guest: what is in its memory, what spans regions, and what is outside."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsd.virtio.memory import MAX_REGIONS, GuestMemory, GuestMemoryError, MappedRegion
from harness.vhost_frontend import Ram
from protocol.vhostuser import Region

K = 4096
# Two neighbours that lie apart for the VMM, and one behind a hole.
LAYOUT = ((0, 2 * K, 0x7000_0000), (2 * K, K, 0x9000_0000), (8 * K, K, 0x9000_1000))


def mapped(ram: Ram) -> GuestMemory:
    memory = GuestMemory()
    memory.replace([MappedRegion(region, ram.fd) for region in ram.regions])
    return memory


@pytest.fixture(scope="module")
def ram() -> Iterator[Ram]:
    ram = Ram(*LAYOUT)
    ram.bytes[:] = bytes((n >> 8 ^ n) & 0xFF for n in range(len(ram.bytes)))
    yield ram
    ram.close()


def test_views_are_the_guests_memory(ram: Ram) -> None:
    memory = mapped(ram)
    (view,) = memory.views([(10, 15)])
    assert view == ram.bytes[10:15]
    old = ram.bytes[10]
    view[0] = old ^ 0xFF
    assert ram.bytes[10] == old ^ 0xFF
    view[0] = old
    assert memory.at_user(0x9000_0000, 4) == ram.bytes[2 * K : 2 * K + 4]


def test_a_buffer_spans_regions(ram: Ram) -> None:
    parts = mapped(ram).views([(2 * K - 3, 2 * K + 7)])
    assert [len(part) for part in parts] == [3, 7]
    assert b"".join(parts) == ram.bytes[2 * K - 3 : 2 * K + 7]


@given(st.integers(0, 12 * K), st.integers(0, 12 * K))
def test_any_range(ram: Ram, address: int, length: int) -> None:
    """Exactly the bytes that are there, or an error."""
    inside = all(
        any(guest <= at < guest + size for guest, size, _ in LAYOUT)
        for at in {*range(address, address + length, 64), address + length - 1}
    )
    if not length:
        assert b"".join(mapped(ram).views([(address, address)])) == b""
    elif inside:
        data = b"".join(mapped(ram).views([(address, address + length)]))
        assert len(data) == length
        file_offset = address if address < 3 * K else address - 5 * K
        assert data == ram.bytes[file_offset : file_offset + length]
    else:
        with pytest.raises(GuestMemoryError):
            mapped(ram).views([(address, address + length)])


@pytest.mark.parametrize("address", [0x6FFF_FFFF, 0x7000_0000 + 2 * K - 3, 0x9000_0FFE, 2**64 - 4])
def test_user_addresses_outside(ram: Ram, address: int) -> None:
    with pytest.raises(GuestMemoryError):
        mapped(ram).at_user(address, 4)


def test_regions_come_and_go(ram: Ram) -> None:
    memory = mapped(ram)
    last = ram.regions[2]
    (kept,) = memory.views([(8 * K, 8 * K + 4)])
    memory.remove(last._replace(mmap_offset=12345))  # by addresses and size only
    with pytest.raises(GuestMemoryError):
        memory.views([(8 * K, 8 * K + 1)])
    assert kept == ram.bytes[3 * K : 3 * K + 4], "a request under way keeps what it has"
    with pytest.raises(GuestMemoryError, match="no memory region"):
        memory.remove(last)
    memory.add(MappedRegion(last, ram.fd))
    assert memory.views([(8 * K, 8 * K + 1)])
    assert len(memory) == 3


@pytest.mark.parametrize(
    "region",
    [
        Region(0, 0, 0, 0),
        Region(2**64 - K, 2 * K, 0, 0),
        Region(0, 2 * K, 2**64 - K, 0),
        Region(0, 5 * K, 0, 0),
        Region(0, K, 0, 4 * K),
        Region(0, 2**63, 0, 0),
        Region(0, K, 0, 2**64 - K),
    ],
)
def test_regions_that_cannot_be(ram: Ram, region: Region) -> None:
    with pytest.raises(GuestMemoryError):
        MappedRegion(region, ram.fd)


def test_what_cannot_be_mapped() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(GuestMemoryError):
            MappedRegion(Region(0, K, 0, 0), reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_tables_that_cannot_be(ram: Ram) -> None:
    memory = mapped(ram)
    with pytest.raises(GuestMemoryError, match="overlap"):
        memory.add(MappedRegion(Region(K, K, 0, 0), ram.fd))
    many = [MappedRegion(Region(n * K, K, n * K, 0), ram.fd) for n in range(MAX_REGIONS + 1)]
    with pytest.raises(GuestMemoryError, match="limit"):
        memory.replace(many)
    assert len(memory) == 3
