"""The server's descriptors: each guest has its share, and the server a reserve."""

from __future__ import annotations

import errno
import fcntl
import os
import resource

import pytest

from fsd.linux.descriptors import HANDLES_LIMIT, share
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import World

SHARE = 12


@pytest.fixture(autouse=True)
def few(world: World) -> None:
    world.export.descriptors = SHARE
    (world.source / "f").touch()


def test_what_one_guest_has_open_is_no_other_guests_loss(
    guest: GuestKernel, other: GuestKernel
) -> None:
    node = guest.lookup(b"f").nodeid
    handles = [guest.open(node) for _ in range(SHARE)]
    opening = fuse.OPEN_IN.pack(os.O_RDWR, 0)
    assert guest.ask(Opcode.OPEN, node, opening).error == errno.ENFILE
    assert guest.ask(Opcode.OPENDIR, 1, opening).error == errno.ENFILE
    create = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"new\0"
    assert guest.ask(Opcode.CREATE, 1, create).error == errno.ENFILE
    assert guest.ask(Opcode.LOOKUP, 1, b"new\0").error == errno.ENOENT, "it was not made"
    assert guest.lookup(b"f").nodeid == node
    assert other.open(other.lookup(b"f").nodeid)
    guest.release(node, handles.pop())
    assert guest.open(node)


def test_owners_of_locks_count(guest: GuestKernel) -> None:
    """But for one that has its locks by the file's own descriptor."""
    node = guest.lookup(b"f").nodeid
    fh = guest.open(node)

    def lock(owner: int) -> int:
        body = fuse.LK_IN.pack(fh, owner, owner, owner, fcntl.F_WRLCK, 1, 0)
        return guest.ask(Opcode.SETLK, node, body).error

    assert [lock(owner) for owner in range(SHARE)] == [0] * SHARE
    assert lock(SHARE) == errno.ENOLCK
    assert guest.ask(Opcode.OPEN, node, fuse.OPEN_IN.pack(0, 0)).error == errno.ENFILE
    guest.ok(Opcode.FLUSH, node, fuse.FLUSH_IN.pack(fh, 3))  # that process has closed it
    assert lock(SHARE) == 0


def test_directories_that_are_pinned_count(
    world: World, guest: GuestKernel, other: GuestKernel
) -> None:
    """Where nothing is reached by its handle: as for an ordinary user."""
    world.table.reach.by_handle = False
    for n in range(SHARE + 1):
        (world.source / f"d{n}").mkdir()
    nodes = [guest.lookup(b"d%d" % n).nodeid for n in range(SHARE)]
    assert guest.ask(Opcode.LOOKUP, 1, b"d%d\0" % SHARE).error == errno.ENFILE
    assert other.lookup(b"d%d" % SHARE)
    guest.forget(nodes[0], 1)
    assert guest.lookup(b"d%d" % SHARE)


@pytest.mark.parametrize("limit", [64, 1024, 4096])
@pytest.mark.parametrize("guests", [1, 2, 20])
def test_shares_leave_a_reserve(limit: int, guests: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        each = share(guests)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert 0 < each <= HANDLES_LIMIT
    left = limit - guests * each
    assert left >= min(256 + 300 * guests, limit // 2)
