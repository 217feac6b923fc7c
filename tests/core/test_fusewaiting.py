"""The FUSE session on a real export: locks, the channel, and what else is answered later."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from typing import Any

import pytest

from fsd.files.locks import WOKEN
from fsd.fuse.hostlocks import GuestLocks
from fsd.fuse.locks import TRIES
from fsd.fuse.openfiles import LONG_POLL
from protocol import frames, fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import World

# Locks


def setlk(
    guest: GuestKernel, node: int, fh: int, owner: int, kind: int, start: int = 0, end: int = 99
) -> int:
    body = fuse.LK_IN.pack(fh, owner, start, end, kind, owner + 1000, 0)
    return guest.ask(Opcode.SETLK, node, body).error


def getlk(
    guest: GuestKernel, node: int, fh: int, owner: int, kind: int, start: int = 0, end: int = 99
) -> tuple[int, ...]:
    body = fuse.LK_IN.pack(fh, owner, start, end, kind, owner + 1000, 0)
    return fuse.LK_OUT.unpack(guest.ok(Opcode.GETLK, node, body))


R, W, U = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK


def test_locks_of_two_owners_through_one_handle(guest: GuestKernel) -> None:
    """A forked child has the same open file, and is another owner."""
    node, fh = guest.create(b"f")
    assert setlk(guest, node.nodeid, fh, 1, W, 0, 9) == 0
    assert setlk(guest, node.nodeid, fh, 2, W, 5, 14) == errno.EAGAIN
    assert setlk(guest, node.nodeid, fh, 2, W, 10, 14) == 0
    assert getlk(guest, node.nodeid, fh, 2, W, 0, 20) == (0, 9, W, 1001)
    assert getlk(guest, node.nodeid, fh, 1, R, 0, 20) == (10, 14, W, 1002)
    assert getlk(guest, node.nodeid, fh, 1, W, 0, 9)[2] == U
    guest.ok(Opcode.FLUSH, node.nodeid, fuse.FLUSH_IN.pack(fh, 1))  # 1 closes the file
    assert setlk(guest, node.nodeid, fh, 2, W, 0, 9) == 0


def test_locks_of_one_owner_through_two_handles(guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    reading = guest.open(node.nodeid, os.O_RDONLY)
    assert setlk(guest, node.nodeid, reading, 1, R) == 0
    assert setlk(guest, node.nodeid, fh, 1, W, 50, 59) == 0  # its description is read-only
    assert setlk(guest, node.nodeid, fh, 2, R, 0, 49) == 0
    assert setlk(guest, node.nodeid, fh, 2, R, 50, 59) == errno.EAGAIN
    assert setlk(guest, node.nodeid, fh, 2, W, 0, 49) == errno.EAGAIN  # 1 still reads there
    guest.ok(Opcode.FLUSH, node.nodeid, fuse.FLUSH_IN.pack(reading, 1))
    assert setlk(guest, node.nodeid, fh, 2, W) == 0


def test_locks_of_two_guests(guest: GuestKernel, other: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    theirs = other.lookup(b"f").nodeid
    theirs_fh = other.open(theirs)
    assert setlk(guest, node.nodeid, fh, 1, W) == 0
    assert setlk(other, theirs, theirs_fh, 1, R) == errno.EAGAIN
    assert getlk(other, theirs, theirs_fh, 1, W) == (0, 99, W, 0)  # a process of another machine
    guest.session.close()
    assert setlk(other, theirs, theirs_fh, 1, R) == 0


def test_locks_of_the_host(world: World, guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    with open(world.source / "f", "r+b") as host:
        fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
        # The same process: only an open file description of its own can hold this.
        data = struct.pack("@hhqqi4x", W, os.SEEK_SET, 50, 10, 0)
        fcntl.fcntl(host, 37, data)
        assert setlk(guest, node.nodeid, fh, 1, R, 50, 50) == errno.EAGAIN
        assert setlk(guest, node.nodeid, fh, 1, R, 60, 70) == 0
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(host, 37, struct.pack("@hhqqi4x", W, os.SEEK_SET, 65, 1, 0))


def test_flock(world: World, guest: GuestKernel, other: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    theirs = other.lookup(b"f").nodeid
    theirs_fh = other.open(theirs)

    def flock(kernel: GuestKernel, nodeid: int, handle: int, kind: int) -> int:
        body = fuse.LK_IN.pack(handle, 7, 0, (1 << 63) - 1, kind, 1, fuse.LK_FLOCK)
        return kernel.ask(Opcode.SETLK, nodeid, body).error

    assert flock(guest, node.nodeid, fh, W) == 0
    assert flock(other, theirs, theirs_fh, R) == errno.EAGAIN
    assert setlk(other, theirs, theirs_fh, 1, W) == 0  # of the other kind
    release = fuse.RELEASE_IN.pack(fh, 0, fuse.RELEASE_FLOCK_UNLOCK, 7)
    guest.ok(Opcode.RELEASE, node.nodeid, release)
    assert flock(other, theirs, theirs_fh, W) == 0
    with open(world.source / "f") as host, pytest.raises(BlockingIOError):
        fcntl.flock(host, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_waiting_lock_is_given_when_another_guest_unlocks(
    guest: GuestKernel, other: GuestKernel
) -> None:
    node, fh = guest.create(b"f")
    theirs = other.lookup(b"f").nodeid
    theirs_fh = other.open(theirs)
    assert setlk(guest, node.nodeid, fh, 1, W) == 0
    waiting = other.begin(Opcode.SETLKW, theirs, fuse.LK_IN.pack(theirs_fh, 1, 0, 9, W, 1, 0))
    assert waiting.reply() is None
    other.ok(Opcode.GETATTR, theirs, bytes(16))  # nobody else waits
    assert setlk(guest, node.nodeid, fh, 1, U, 50, 99) == 0
    other.loop.turn()
    assert waiting.reply() is None
    assert setlk(guest, node.nodeid, fh, 1, U, 0, 49) == 0
    other.loop.turn()
    assert waiting.reply() == (0, b"")
    assert other.loop.timers == []
    assert setlk(guest, node.nodeid, fh, 1, R, 0, 9) == errno.EAGAIN


def test_a_lock_of_the_host_is_waited_for(world: World, guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    with open(world.source / "f", "r+b") as host:
        fcntl.flock(host, fcntl.LOCK_EX)
        body = fuse.LK_IN.pack(fh, 1, 0, 9, W, 1, fuse.LK_FLOCK)
        waiting = guest.begin(Opcode.SETLKW, node.nodeid, body)
        pauses = []
        for _ in range(12):
            pauses += guest.loop.timers
            guest.loop.expire()
        assert waiting.reply() is None
        assert pauses == sorted(pauses)
        assert pauses[-1] == pauses[-2] == 0.25  # it grows no further
    guest.loop.expire()
    assert waiting.reply() == (0, b"")
    assert guest.loop.timers == []


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_waiting_for_a_lock_can_be_ended(how: str, guest: GuestKernel, other: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    theirs = other.lookup(b"f").nodeid
    theirs_fh = other.open(theirs)
    assert setlk(guest, node.nodeid, fh, 1, W) == 0
    body = fuse.LK_IN.pack(theirs_fh, 1, 0, 9, W, 1, 0)
    waiting = other.begin(Opcode.SETLKW, theirs, body)
    if how == "close":
        other.session.close()
    else:
        interrupt = fuse.INTERRUPT_IN.pack(waiting.unique)
        assert other.begin(Opcode.INTERRUPT, 0, interrupt).lengths == [0]
    assert waiting.reply() == (errno.EINTR, b"")
    assert other.loop.timers == []
    assert setlk(guest, node.nodeid, fh, 1, U) == 0  # nothing is sent to one that has gone
    other.loop.turn()


def test_thousands_that_wait_for_a_lock_are_tried_a_few_at_a_time(
    world: World, guest: GuestKernel, other: GuestKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as the host has it; each has its turn, and gets the lock in the end."""
    count = 300
    node, fh = guest.create(b"f")
    theirs = other.lookup(b"f").nodeid
    theirs_fh = other.open(theirs)
    tried = 0

    def counted(*arguments: Any) -> None:
        nonlocal tried
        tried += 1
        original(*arguments)

    original = GuestLocks.flock
    with open(world.source / "f", "r+b") as host:
        fcntl.flock(host, fcntl.LOCK_EX)
        body = fuse.LK_IN.pack(fh, 1, 0, 9, R, 1, fuse.LK_FLOCK)
        waiting = [guest.begin(Opcode.SETLKW, node.nodeid, body) for _ in range(count)]
        monkeypatch.setattr(GuestLocks, "flock", counted)
        assert len(guest.loop.timers) == 1
        for _ in range(10):
            before = tried
            guest.loop.expire()
            assert TRIES <= tried - before <= max(TRIES, count // 16)
        other.ok(Opcode.SETLK, theirs, fuse.LK_IN.pack(theirs_fh, 2, 0, 9, U, 1, fuse.LK_FLOCK))
        before = tried
        guest.loop.turn()
        assert tried - before == WOKEN
        assert all(pending.reply() is None for pending in waiting)
    for _ in range(count // TRIES + 1):
        guest.loop.expire()
    assert all(pending.reply() == (0, b"") for pending in waiting)
    assert guest.loop.timers == []


# The channel


def hello() -> bytes:
    return frames.encode(frames.Hello(frames.VERSION, frames.Role.REPLAYER, 0xFFF))


def control(guest: GuestKernel) -> tuple[int, int]:
    """Look `.fsd/control` up and open it: (nodeid, fh)."""
    directory = guest.lookup(b".fsd").nodeid
    node = guest.lookup(b"control", directory).nodeid
    return node, guest.open(node)


def test_a_read_of_the_channel_waits_for_frames(world: World, guest: GuestKernel) -> None:
    node, fh = control(guest)
    body = fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0)
    waiting = guest.begin(Opcode.READ, node, body)
    assert waiting.reply() is None
    assert guest.loop.timers == [LONG_POLL]
    guest.write(node, fh, hello())
    guest.loop.turn()
    reply = waiting.reply()
    assert reply is not None
    reader = frames.FrameReader()
    reader.feed(reply.payload)
    assert [type(message) for message in reader] == [frames.Welcome]
    assert guest.loop.timers == []


def test_a_read_of_the_channel_ends_at_its_bound(guest: GuestKernel) -> None:
    node, fh = control(guest)
    waiting = guest.begin(Opcode.READ, node, fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0))
    guest.loop.expire()
    assert waiting.reply() == (0, b"")
    # Nothing could wake a poll(2): it says that a read is what to wait in.
    revents = fuse.POLL_OUT.unpack(guest.ok(Opcode.POLL, node, fuse.POLL_IN.pack(fh, 1, 1, 1)))
    assert revents == select.POLLIN | select.POLLOUT


def test_the_end_of_the_channel_is_a_hangup(guest: GuestKernel) -> None:
    node, fh = control(guest)
    guest.write(node, fh, hello())
    guest.read(node, fh)
    waiting = guest.begin(Opcode.READ, node, fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0))
    guest.write(node, fh, frames.encode(frames.Bye()))
    guest.loop.turn()
    assert waiting.reply() == (0, b"")
    assert guest.read(node, fh) == b""  # does not wait any more
    revents = fuse.POLL_OUT.unpack(guest.ok(Opcode.POLL, node, fuse.POLL_IN.pack(fh, 1, 1, 1)))
    assert revents == select.POLLIN | select.POLLOUT | select.POLLHUP


def test_a_second_agent_makes_the_first_one_look_up(guest: GuestKernel) -> None:
    """A killed agent cannot end before its read is answered."""
    node, fh = control(guest)
    waiting = guest.begin(Opcode.READ, node, fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0))
    assert guest.ask(Opcode.OPEN, node, fuse.OPEN_IN.pack(os.O_RDWR, 0)).error == errno.EBUSY
    guest.loop.turn()
    assert waiting.reply() == (0, b"")  # so it ends, if it was killed
    guest.release(node, fh)
    guest.open(node)


def test_a_bad_frame_ends_the_channel(guest: GuestKernel) -> None:
    node, fh = control(guest)
    waiting = guest.begin(Opcode.READ, node, fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0))
    body = fuse.WRITE_IN.pack(fh, 0, 8, 0, 0, 0) + b"\xff" * 8
    assert guest.ask(Opcode.WRITE, node, body).error == errno.EPROTO
    guest.loop.turn()
    assert waiting.reply() == (0, b"")


def test_the_hidden_directory_is_for_root_alone(guest: GuestKernel) -> None:
    guest.uid = 54321
    assert guest.ask(Opcode.LOOKUP, 1, b".fsd\0").error == errno.ENOENT


# Later answers


def test_a_file_can_be_closed_while_it_is_synced(guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    waiting = guest.begin(Opcode.FSYNC, node.nodeid, fuse.FSYNC_IN.pack(fh, 0))
    assert waiting.reply() is None
    guest.release(node.nodeid, fh)
    guest.loop.run_threads()
    assert waiting.reply() == (0, b"")


def test_at_the_servers_end_what_waits_is_answered_and_nodes_stay(guest: GuestKernel) -> None:
    """For the image: their numbers are the next server's, too."""
    node, fh = guest.create(b"f")
    waiting = guest.begin(Opcode.FSYNC, node.nodeid, fuse.FSYNC_IN.pack(fh, 1))
    guest.session.end()
    assert waiting.reply() == (errno.EINTR, b"")
    assert guest.session.nodes.saved() == {node.nodeid: 1}
    guest.loop.run_threads()


def test_a_guest_that_leaves_while_it_waits_is_answered_once(guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    waiting = guest.begin(Opcode.FSYNC, node.nodeid, fuse.FSYNC_IN.pack(fh, 1))
    guest.session.close()
    assert waiting.reply() == (errno.EINTR, b"")
    guest.loop.run_threads()  # Pending.done fails on a second answer
