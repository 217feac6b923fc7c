"""Listings of open directories: by the kernel's positions, with nothing kept between requests."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import pytest

from fsd.fuse.openfiles import LISTING_LIMIT
from fsd.fuse.request import MAX_WRITE
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import World

FILES = 600


@pytest.fixture(params=[Opcode.READDIR, Opcode.READDIRPLUS])
def opcode(request: pytest.FixtureRequest) -> Opcode:
    kind: Opcode = request.param
    return kind


@pytest.fixture
def many(world: World) -> World:
    for n in range(FILES):
        (world.source / f"file{n:04}").touch()
    return world


def opendir(guest: GuestKernel) -> int:
    payload = guest.ok(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0))
    return fuse.OPEN_OUT.unpack(payload)[0]


def reply(guest: GuestKernel, opcode: Opcode, fh: int, offset: int, size: int = 4096) -> bytes:
    body = fuse.READ_IN.pack(fh, offset, size, 0, 0, 0)
    return guest.ok(opcode, 1, body, room=size + 16)


def entries(payload: bytes, opcode: Opcode) -> Iterator[tuple[bytes, int]]:
    """Name, and position behind it."""
    place = 0
    while place < len(payload):
        if opcode == Opcode.READDIRPLUS:
            place += fuse.ENTRY_SIZE
        _, position, size, _ = fuse.DIRENT.unpack(payload, place)
        place += fuse.DIRENT.size
        yield payload[place : place + size], position
        place += size + 7 & ~7


def read_all(
    guest: GuestKernel, opcode: Opcode, fh: int, size: int = 4096
) -> Iterator[tuple[bytes, int]]:
    position = 0
    while payload := reply(guest, opcode, fh, position, size):
        for name, position in entries(payload, opcode):
            yield name, position


@pytest.mark.parametrize("size", [512, 4096, 65536])
def test_every_name_once(many: World, guest: GuestKernel, opcode: Opcode, size: int) -> None:
    fh = opendir(guest)
    for _ in range(2):  # and again, as after rewinddir(3)
        names = [name for name, _ in read_all(guest, opcode, fh, size)]
        assert sorted(names) == sorted([b".", b"..", *map(os.fsencode, os.listdir(many.source))])
    (many.source / "new").touch()
    assert b"new" in [name for name, _ in read_all(guest, opcode, fh, size)]


def test_positions_of_one_handle_hold_for_another(
    many: World, guest: GuestKernel, opcode: Opcode
) -> None:
    """As telldir(3) and seekdir(3) do, and as the next server needs it."""
    first = list(read_all(guest, opcode, opendir(guest)))
    fh = opendir(guest)
    for index in (500, 3, 250, 250):
        again = list(entries(reply(guest, opcode, fh, first[index][1]), opcode))
        assert again == first[index + 1 : index + 1 + len(again)]


def test_files_removed_while_they_are_listed(
    many: World, guest: GuestKernel, opcode: Opcode
) -> None:
    """As rm -r does it: what is there all the time is seen, and nothing twice."""
    fh = opendir(guest)
    seen = []
    for name, _ in read_all(guest, opcode, fh, 1024):
        seen.append(name)
        with suppress(IsADirectoryError, PermissionError):
            os.unlink(many.source / os.fsdecode(name))
    assert len(seen) == len(set(seen)) == FILES + 2


def test_open_directories_hold_no_names(many: World, guest: GuestKernel, opcode: Opcode) -> None:
    handles = [opendir(guest) for _ in range(40)]
    list(read_all(guest, opcode, handles[0]))  # what is known of the files themselves
    tracemalloc.start()
    try:
        for fh in handles:
            reply(guest, opcode, fh, 0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < len(handles) * FILES * 8, "less than a pointer a name"


def test_a_reply_is_no_longer_than_others_can_wait(
    many: World, guest: GuestKernel, opcode: Opcode
) -> None:
    for n in range(4000):
        (many.source / f"{n:04}{'x' * 60}").touch()
    assert 4096 < len(reply(guest, opcode, opendir(guest), 0, 1 << 22)) <= LISTING_LIMIT


def test_a_position_that_is_none(many: World, guest: GuestKernel, opcode: Opcode) -> None:
    fh = opendir(guest)
    for position in (1 << 64) - 1, 1 << 63, 12345:
        guest.ask(opcode, 1, fuse.READ_IN.pack(fh, position, 4096, 0, 0, 0))
    assert len(list(read_all(guest, opcode, fh))) == FILES + 2


def test_data_is_moved_by_the_mib_whatever_the_guest_says(world: World, guest: GuestKernel) -> None:
    with (world.source / "large").open("wb") as file:
        file.truncate(1 << 32)
    node = guest.lookup(b"large").nodeid
    fh = guest.open(node)
    read = fuse.READ_IN.pack(fh, 0, 1 << 30, 0, 0, 0)
    assert len(guest.ok(Opcode.READ, node, read, room=4 * MAX_WRITE)) == MAX_WRITE
    write = fuse.WRITE_IN.pack(fh, 0, MAX_WRITE + 1, 0, 0, 0) + bytes(MAX_WRITE + 1)
    assert guest.ask(Opcode.WRITE, node, write).error
    assert guest.write(node, fh, bytes(MAX_WRITE)) == MAX_WRITE
