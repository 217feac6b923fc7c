"""What a guest's kernel never sends, a hostile one does: and at its end all is given back.

Found by script/fuzz hostile.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import weakref

import pytest

from fsd.files.slowcalls import LONG
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .hostile import _open_below
from .support import World


@pytest.fixture
def guest(world: World) -> GuestKernel:
    (world.source / "f").write_bytes(b"data")
    return GuestKernel(world.mount(agent=False))


@pytest.mark.parametrize("flag", [os.O_PATH, os.O_TMPFILE & ~os.O_DIRECTORY, os.O_ASYNC])
def test_an_open_is_one_of_the_file(world: World, guest: GuestKernel, flag: int) -> None:
    """Not of its place only, of a nameless other file, or with signals to the server."""
    guest.open(guest.lookup(b"f").nodeid, os.O_RDWR | flag)
    (fd,) = _open_below(world.source)
    assert os.pread(fd, 10, 0) == b"data"
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & flag


def test_a_lock_that_cannot_be_given_back(world: World, guest: GuestKernel) -> None:
    """The rest is: its descriptor was closed beside the table, which no guest can do."""
    node = guest.lookup(b"f").nodeid
    handles = [guest.open(node, os.O_RDWR) for _ in range(3)]
    lock = fuse.LK_IN.pack(handles[0], 7, 0, 10, fcntl.F_WRLCK, 1, 0)
    guest.ok(Opcode.SETLK, node, lock)
    os.close(min(_open_below(world.source)))
    guest.session.close()
    assert _open_below(world.source) == []
    assert [node for node in world.table._by_node.values() if node.lookups] == []


def test_memory_of_a_lock_that_was_waited_for(guest: GuestKernel) -> None:
    """Is let go with the wait: until a garbage collection, which an idle server does not make, the
    guest's memory would stay mapped.
    """
    node = guest.lookup(b"f").nodeid
    handles = [guest.open(node) for _ in range(2)]
    body = [fuse.LK_IN.pack(fh, fh, 0, 10, fcntl.F_WRLCK, 1, 0) for fh in handles]
    guest.ok(Opcode.SETLK, node, body[0])
    gc.disable()
    try:
        waiting = guest.begin(Opcode.SETLKW, node, body[1])
        kept = weakref.ref(guest.session._waiting._entries[waiting.unique].stop.__self__)  # type: ignore[attr-defined]
        guest.session.close()
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["in a thread", "after a wait"])
def test_memory_of_a_request_that_failed(how: str, guest: GuestKernel) -> None:
    """As above: an error's traceback leads to the request, and must not lead to memory."""
    node, fh = guest.create(b"failing")
    gc.disable()
    try:
        if how == "in a thread":
            body = fuse.FALLOCATE_IN.pack(fh, 0, LONG * 2, 0xFFFF)
            pending = guest.begin(Opcode.FALLOCATE, node.nodeid, body)
            kept = weakref.ref(guest.loop._threads[0][0])
            guest.loop.run_threads()
            error = errno.EOPNOTSUPP
        else:
            waited_for = guest.open(node.nodeid, os.O_RDWR)
            lock = fuse.LK_IN.pack(waited_for, 1, 0, 10, fcntl.F_WRLCK, 1, 0)
            guest.ok(Opcode.SETLK, node.nodeid, lock)
            lock = fuse.LK_IN.pack(fh, 2, 0, 10, fcntl.F_WRLCK, 1, 0)
            pending = guest.begin(Opcode.SETLKW, node.nodeid, lock)
            entry = guest.session._waiting._entries[pending.unique]
            kept = weakref.ref(entry.stop.__self__)  # type: ignore[attr-defined]
            del entry
            guest.ok(Opcode.RELEASE, node.nodeid, fuse.RELEASE_IN.pack(fh, 0, 0, 0))
            guest.loop.turn()
            guest.loop.expire()
            error = errno.EBADF
        assert pending.reply() == (error, b"")
        assert kept() is None
        pending.buffer.clear()  # BufferError: there is a view of it
    finally:
        gc.enable()


def test_what_guests_forgot_goes_with_the_last_of_them(world: World) -> None:
    """It is remembered for their file handles: 50 MB, for nobody."""
    (world.source / "f").write_bytes(b"data")
    services = [world.mount(agent=False) for _ in range(2)]
    for operations in services:
        kernel = GuestKernel(operations)
        kernel.forget(kernel.lookup(b"f").nodeid, 1)
    assert world.table.forgotten.items()
    for operations, left in zip(services, (True, False), strict=True):
        world.services.remove(operations)
        operations.close()
        world.export.remove_guest(operations.guest)
        assert bool(world.table.forgotten.items()) is left
