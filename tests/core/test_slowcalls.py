"""Calls that may take long: a thread makes them, others are served, events stay whose they are."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import trio

from fsd.files.slowcalls import LONG, THREADS, Outcome, SlowCall, Work, running
from fsd.transports.loop import TrioLoop
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import ALL, World

BOUND = 30.0  # seconds, on a busy machine


@pytest.fixture
def leased(world: World) -> Iterator[int]:
    """A descriptor of a file on which somebody has a lease."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    (world.source / "f").write_text("leased")
    fd = os.open(world.source / "f", os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    yield fd
    os.close(fd)
    signal.signal(signal.SIGIO, before)


@pytest.mark.parametrize("how", ["open", "create", "truncate"])
def test_a_lease(how: str, guest: GuestKernel, other: GuestKernel, leased: int) -> None:
    node = guest.lookup(b"f").nodeid
    if how == "open":
        pending = guest.begin(Opcode.OPEN, node, fuse.OPEN_IN.pack(os.O_RDONLY, 0))
    elif how == "create":
        pending = guest.begin(Opcode.CREATE, 1, fuse.CREATE_IN.pack(os.O_RDWR, 0, 0, 0) + b"f\0")
    else:
        body = fuse.SETATTR_IN.pack(1 << 3, 0, 0, 3, *(0,) * (len(fuse.SetattrIn._fields) - 4))
        pending = guest.begin(Opcode.SETATTR, node, body)
    assert pending.reply() is None
    assert other.lookup(b"f").nodeid == node  # others are served
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    guest.loop.run_threads()
    reply = pending.reply()
    assert reply is not None
    assert reply.error == 0


def test_a_request_that_is_gone_leaves_nothing_open(guest: GuestKernel, leased: int) -> None:
    node = guest.lookup(b"f").nodeid
    before = set(os.listdir("/proc/self/fd"))
    guest.begin(Opcode.OPEN, node, fuse.OPEN_IN.pack(os.O_RDONLY, 0))
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    guest.session.close()
    guest.loop.run_threads()
    assert set(os.listdir("/proc/self/fd")) == before


def test_whose_events_they_are(world: World, guest: GuestKernel, other: GuestKernel) -> None:
    """Those of a long FALLOCATE are its guest's, and those of the host beside it are not."""
    observer = world.observer()
    world.mark(observer, "", ALL)
    node, fh = guest.create(b"big")
    (world.source / "beside").touch()
    world.pump()
    world.take(observer)
    pending = guest.begin(Opcode.FALLOCATE, node.nodeid, fuse.FALLOCATE_IN.pack(fh, 0, LONG * 2, 0))
    assert pending.reply() is None
    (world.source / "beside").write_text("host")
    watcher = world.export.watcher
    watcher.drain()
    assert {repr(arrival.origin) for arrival in watcher.queue.peek(9)} == {"<Origin host>"}
    world.take(observer)
    guest.loop._threads[0][0]()
    os.listdir(world.source)
    watcher.drain()  # another request's, while the thread is not back
    mine = [a for a in watcher.queue.peek(99) if a.raw.name == b"big"]
    assert mine
    assert {arrival.origin for arrival in mine} <= set(world.export.guests)
    guest.loop._threads[0][1](None)
    guest.loop._threads.clear()
    assert pending.reply() == (0, b"")
    world.take(observer)


@pytest.mark.parametrize("how", ["unlink", "rename", "close"])
def test_the_end_of_a_long_file(how: str, world: World, guest: GuestKernel) -> None:
    """The blocks are freed by whoever closes it last: a thread."""
    node, fh = guest.create(b"long")
    (world.source / "other").touch()
    os.truncate(world.source / "long", LONG + 1)
    if how == "close":
        guest.ok(Opcode.UNLINK, 1, b"long\0")
        guest.loop.run_threads()
        guest.release(node.nodeid, fh)
    else:
        guest.release(node.nodeid, fh)
        if how == "unlink":
            guest.ok(Opcode.UNLINK, 1, b"long\0")
        else:
            guest.ok(Opcode.RENAME, 1, fuse.RENAME_IN.pack(1) + b"other\0long\0")
    (call,) = [work.call for work, _ in guest.loop._threads if isinstance(work, Outcome)]
    assert call.what == "close"
    guest.loop.run_threads()


async def test_one_guest_has_not_all_threads() -> None:
    """Nor has a file system that hangs all of a guest's."""
    hold = threading.Event()
    done: list[str] = []

    def outcome(name: str, mount: int = 0) -> Outcome:
        def work() -> None:
            if name == "hangs":
                hold.wait()

        return Outcome(SlowCall(name, Work(work), mount=mount))

    try:
        with trio.fail_after(BOUND):
            async with trio.open_nursery() as nursery:
                one, another = TrioLoop(nursery), TrioLoop(nursery)
                for _ in range(4 * THREADS):
                    one.in_thread(outcome("hangs", 7), lambda _: done.append("hung"))
                one.in_thread(outcome("mine"), lambda _: done.append("mine"))
                another.in_thread(outcome("theirs", 7), lambda _: done.append("theirs"))
                while len(done) < 2:  # noqa: ASYNC110 - what ends it runs in callbacks
                    await trio.sleep(0.005)
                assert set(done) == {"mine", "theirs"}
                assert running() == ["hangs"] * THREADS
                nursery.cancel_scope.cancel()  # waits for none of them
    finally:
        hold.set()


def test_a_call_that_fails(guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    body = fuse.FALLOCATE_IN.pack(fh, 0, LONG * 2, 0xFFFF)
    pending = guest.begin(Opcode.FALLOCATE, node.nodeid, body)
    guest.loop.run_threads()
    assert pending.reply() == (errno.EOPNOTSUPP, b"")
