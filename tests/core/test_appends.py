"""Which writes are appends, and which files are open past their kernel's cache."""

from __future__ import annotations

import errno
import os

import pytest

from fsd.files.appends import Ends
from fsd.files.handle import Handle
from protocol import fuse
from protocol.fuse import Fopen, Init, Opcode

from .fuse_guest import ALL_FLAGS, GuestKernel, Reply
from .support import World

APPEND, APPEND_BOTH = os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_APPEND
OLD = ALL_FLAGS & ~Init.DIRECT_IO_ALLOW_MMAP


def write_in(fh: int, offset: int, data: bytes, flags: int, write_flags: int = 0) -> bytes:
    return fuse.WRITE_IN.pack(fh, offset, len(data), write_flags, 0, flags) + data


@pytest.mark.parametrize(
    ("flags", "write_flags", "content"),
    [
        (os.O_WRONLY, 0, b"new4host"),
        (APPEND, 0, b"1234hostnew"),
        (APPEND, fuse.WRITE_CACHE, b"new4host"),  # a page of a mapped file
        (os.O_WRONLY, fuse.WRITE_CACHE, b"new4host"),
    ],
)
@pytest.mark.parametrize("opened", [os.O_WRONLY, APPEND])
def test_a_write_says_whether_it_appends(
    world: World, opened: int, flags: int, write_flags: int, content: bytes
) -> None:
    """Whatever the descriptor was opened for."""
    path = world.source / "f"
    path.write_bytes(b"1234")
    guest = GuestKernel(world.mount(agent=False))
    node = guest.lookup(b"f").nodeid
    fh = guest.open(node, opened)
    path.write_bytes(b"1234host")
    guest.ok(Opcode.WRITE, node, write_in(fh, 0, b"new", flags, write_flags))
    assert path.read_bytes() == content
    guest.session.close()


@pytest.mark.parametrize(
    ("flags", "opens"),
    [
        (
            ALL_FLAGS,
            [(os.O_RDONLY, False), (APPEND, True), (APPEND_BOTH, True), (os.O_RDWR, False)],
        ),
        (OLD, [(APPEND, True), (os.O_RDONLY, True), (APPEND, True)]),  # all of one kind
        (OLD, [(os.O_RDONLY, False), (APPEND, False)]),
        (OLD, [(APPEND_BOTH, False), (APPEND, False)]),  # which can be mapped
    ],
)
def test_appends_bypass_the_cache(world: World, flags: int, opens: list[tuple[int, bool]]) -> None:
    (world.source / "f").touch()
    guest = GuestKernel(world.mount(agent=False), flags=flags)
    node = guest.lookup(b"f").nodeid
    for _ in range(2):
        handles = []
        for open_flags, bypasses in opens:
            payload = guest.ok(Opcode.OPEN, node, fuse.OPEN_IN.pack(open_flags, 0))
            fh, reply_flags, _ = fuse.OPEN_OUT.unpack(payload)
            assert bool(reply_flags & Fopen.DIRECT_IO) == bypasses
            handles.append(fh)
        for fh in handles:
            guest.release(node, fh)
    guest.session.close()


@pytest.mark.parametrize(("flags", "error"), [(APPEND, errno.EIO), (os.O_WRONLY, 0)])
def test_an_append_that_was_begun_is_not_done_again(world: World, flags: int, error: int) -> None:
    """It may be done; elsewhere the second time comes to the same."""
    path = world.source / "f"
    path.touch()
    guest = GuestKernel(world.mount(agent=False))
    node = guest.lookup(b"f").nodeid
    body = write_in(guest.open(node, flags), 0, b"new", flags)
    guest.ok(Opcode.WRITE, node, body)
    header = fuse.IN_HEADER.pack(40 + len(body), Opcode.WRITE, 1000, node, 0, 0, 1, 0)
    reply = bytearray(100)
    done: list[int] = []
    guest.session.serve_again(
        [memoryview(header + body)], [memoryview(reply)], done.append, safe=True
    )
    assert Reply(-fuse.OUT_HEADER.unpack(bytes(reply)).error, b"").error == error
    assert path.read_bytes() == b"new"
    guest.session.close()


@pytest.mark.parametrize(
    ("steps", "offset", "size", "both", "otherwise"),
    [
        ([], 100, 5, True, True),  # nothing is known of the file
        ([], 4096, 5, False, True),
        (["size_reported 100"], 100, 5, True, True),
        (["size_reported 100"], 2, 5, False, False),  # O_APPEND is off by now
        # An answer that a WRITE has overtaken.
        (["size_reported 100", "size_reported 300"], 100, 5, True, True),
        (["size_reported 100", "size_reported 300", "written 300 5"], 100, 5, False, False),
        (["size_reported 100", "size_reported 300", "written 100 5"], 105, 5, True, True),
        (["size_reported 100", "size_reported 300", "written 100 5"], 300, 5, True, True),
        # A page that is written back.
        (["size_reported 0", "size_reported 9000"], 0, 4096, False, True),
        (["size_reported 8192"], 8192, 4096, True, True),
        (
            ["size_reported 9000", "size_reported 8192", "size_reported 10000"],
            8192,
            808,
            False,
            True,
        ),
        (["size_reported 0", "written 0 9000"], 8192, 808, False, False),
    ],
)
def test_an_append_comes_at_an_end_that_the_kernel_knows(
    world: World, steps: list[str], offset: int, size: int, both: bool, otherwise: bool
) -> None:
    ends, inode = Ends(), world.export.table.root
    for step in steps:
        what, *numbers = step.split()
        getattr(ends, what)(inode.nodeid, *map(int, numbers))
    assert ends.is_append(Handle(inode, -1, APPEND_BOTH), offset, size) == both
    assert ends.is_append(Handle(inode, -1, APPEND), offset, size) == otherwise
