"""Requests about names with undelivered changes: which wait, for what, and until when."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest

from fsd.fuse.operations import Operations
from fsd.guests.history import LONGEST, PARKED_LIMIT, PATIENCE
from fsd.guests.ledger import KEPT_LIMIT
from protocol import frames, fuse
from protocol.frames import STAGING, Op
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel, Pending
from .support import AGENT_PID, ALL, STRUCTURE, World

OPEN = fuse.OPEN_IN.pack(os.O_RDONLY, 0)
GETATTR = bytes(fuse.GETATTR_IN.size)
RENAME = fuse.RENAME_IN.pack(1)
CREATE = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0)


class Watched:
    """A guest that watches the root, and its agent, which re-enacts when the test says so."""

    def __init__(self, world: World, guest: GuestKernel, operations: Operations) -> None:
        self.world, self.guest, self.operations = world, guest, operations
        self.connect()
        world.mark(operations.guest, mask=STRUCTURE)

    def connect(self) -> None:
        hello = frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL)
        self.operations.guest.connect(AGENT_PID, hello)

    def touch(self, *names: str) -> None:
        for name in names:
            (self.world.source / name).touch()

    def deliver(self) -> list[frames.Order]:
        """All that has happened: the agent takes its orders, executes them, and asks for more."""
        orders = self.orders()
        self.world.orders(self.operations)
        self.guest.loop.turn()
        return orders

    def orders(self) -> list[frames.Order]:
        """The agent takes its orders, also those that wait for its look at new marks."""
        deadline = time.monotonic() + 10
        orders = []
        while True:
            self.world.pump()
            orders += self.world.orders(self.operations)
            if not self.world.export.arming._holding:
                return orders
            assert time.monotonic() < deadline, "events are held"

    def ask(self, opcode: int, nodeid: int = 1, body: bytes = b"", pid: int = 7) -> Pending:
        self.guest.pid = pid
        return self.guest.begin(opcode, nodeid, body)

    def find(self, name: bytes, pid: int = 7) -> int:
        self.guest.pid = pid
        return self.guest.lookup(name).nodeid

    @property
    def counts(self) -> dict[str, int]:
        return self.operations.guest.counts


@pytest.fixture
def watched(world: World) -> Iterator[Watched]:
    operations = world.mount(agent=False)
    kernel = GuestKernel(operations)
    yield Watched(world, kernel, operations)
    kernel.session.close()


def error(pending: Pending) -> int | None:
    """Of the reply; None while there is none."""
    reply = pending.reply()
    return None if reply is None else reply.error


# -- a name that was looked up ---------------------------------------------------------------------


def test_what_was_found_early_is_delivered_once_its_create_is_delivered(watched: Watched) -> None:
    watched.touch("x")
    x = watched.find(b"x")  # at once: its kernel holds the directory's lock
    stat = watched.ask(Opcode.GETATTR, x, GETATTR)
    assert error(stat) is None
    assert [order.op for order in watched.deliver()] == [Op.CREATE]
    assert error(stat) == 0
    assert not watched.guest.loop.timers


def test_a_file_that_was_found_early_is_looked_up_once_more(watched: Watched) -> None:
    """The replay has made its name anew: opened under the old one, it would be "(deleted)"."""
    watched.touch("x")
    x = watched.find(b"x")
    opening = watched.ask(Opcode.OPEN, x, OPEN)
    assert error(opening) is None
    watched.deliver()
    assert error(opening) == errno.ESTALE
    watched.touch("y")
    assert error(watched.ask(Opcode.OPEN, watched.find(b"x"), OPEN)) == 0


def test_a_call_is_sent_back_once_alone(watched: Watched) -> None:
    """The kernel passes a second ESTALE on to the program."""
    for _ in range(2):
        watched.touch("x")
        x = watched.find(b"x")
        opening = watched.ask(Opcode.OPEN, x, OPEN)
        if error(opening) is None:
            watched.deliver()
        (watched.world.source / "x").unlink()
        last = error(opening)
        watched.touch("x")
    assert last == 0


def test_what_it_finds_then_is_opened_replaced_or_not(watched: Watched) -> None:
    """As natively: the program gets what had the name at some time, and not that there is none."""
    watched.touch("x")
    opening = watched.ask(Opcode.OPEN, watched.find(b"x"), OPEN)
    watched.deliver()
    assert error(opening) == errno.ESTALE
    found = watched.find(b"x")
    watched.touch("new")
    (watched.world.source / "new").rename(watched.world.source / "x")
    assert error(watched.ask(Opcode.OPEN, found, OPEN)) == 0


def test_what_a_creation_finds_that_was_sent_back(watched: Watched) -> None:
    watched.touch("x")
    assert error(watched.ask(Opcode.CREATE, body=CREATE + b"x\0")) == errno.ESTALE
    watched.deliver()
    found = watched.find(b"x")
    watched.touch("new")
    (watched.world.source / "new").rename(watched.world.source / "x")
    assert error(watched.ask(Opcode.OPEN, found, OPEN)) == 0


def test_a_directory_that_was_found_early_is_opened_as_it_is(watched: Watched) -> None:
    (watched.world.source / "d").mkdir()
    opening = watched.ask(Opcode.OPENDIR, watched.find(b"d"), OPEN)
    assert error(opening) is None
    watched.deliver()
    assert error(opening) == 0


def test_others_do_not_wait(watched: Watched) -> None:
    """Another thread, another name, and what was delivered."""
    watched.touch("old")
    watched.deliver()
    watched.touch("x")
    old, x = watched.find(b"old"), watched.find(b"x")
    assert error(watched.ask(Opcode.GETATTR, x, GETATTR, pid=8)) == 0
    assert error(watched.ask(Opcode.GETATTR, 1, GETATTR)) == 0
    assert watched.find(b"old") == old
    assert error(watched.ask(Opcode.OPEN, old, OPEN)) == 0
    assert not watched.counts["waited"]


def test_the_replayer_does_not_wait(watched: Watched) -> None:
    watched.touch("x")
    (order,) = watched.orders()
    assert order.op == Op.CREATE
    assert error(watched.ask(Opcode.LOOKUP, 1, b"x\0", pid=AGENT_PID)) == errno.ENOENT
    assert error(watched.ask(Opcode.GETATTR, 1, GETATTR, pid=AGENT_PID)) == 0


def test_the_host_changes_the_same_name_again(watched: Watched) -> None:
    """A request waits for what happened before it, not for what comes later."""
    watched.touch("x")
    stat = watched.ask(Opcode.GETATTR, watched.find(b"x"), GETATTR)
    orders = watched.orders()
    (watched.world.source / "x").unlink()
    watched.touch("x")
    watched.world.pump()
    assert len(orders) == 1
    assert error(stat) is None
    watched.world.orders(watched.operations)  # the one is executed
    watched.guest.loop.turn()
    assert error(stat) is not None
    assert watched.operations.guest.depth


# -- mutations -------------------------------------------------------------------------------------


def test_a_mutation_comes_again_once_what_was_before_is_delivered(watched: Watched) -> None:
    watched.touch("x")
    watched.deliver()
    (watched.world.source / "x").unlink()
    creating = watched.ask(Opcode.CREATE, 1, CREATE + b"x\0")
    assert error(creating) == errno.ESTALE
    assert not (watched.world.source / "x").exists()
    walking = watched.ask(Opcode.GETATTR, 1, GETATTR)  # the first thing that the kernel asks then
    assert error(walking) is None
    assert [order.op for order in watched.deliver()] == [Op.REMOVE]
    assert error(walking) == 0
    assert error(watched.ask(Opcode.CREATE, 1, CREATE + b"x\0")) == 0
    assert watched.deliver() == []
    assert not watched.counts["repeated"]


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.MKDIR, fuse.MKDIR_IN.pack(0o755, 0) + b"x\0"),
        (Opcode.MKNOD, fuse.MKNOD_IN.pack(0o100644, 0, 0) + b"x\0"),
        (Opcode.SYMLINK, b"x\0target\0"),
        (Opcode.UNLINK, b"x\0"),
        (Opcode.RMDIR, b"x\0"),
        (Opcode.RENAME, fuse.RENAME_IN.pack(1) + b"x\0other\0"),
        (Opcode.RENAME, fuse.RENAME_IN.pack(1) + b"other\0x\0"),
        (Opcode.LINK, None),
    ],
)  # fmt: skip
def test_each_mutation_comes_again(watched: Watched, opcode: Opcode, body: bytes | None) -> None:
    watched.touch("x", "other")
    watched.deliver()
    other = watched.find(b"other")
    (watched.world.source / "x").unlink()
    body = body if body is not None else fuse.LINK_IN.pack(other) + b"x\0"
    assert error(watched.ask(opcode, 1, body)) == errno.ESTALE
    watched.deliver()
    again = error(watched.ask(opcode, 1, body))
    made = opcode in (Opcode.MKDIR, Opcode.MKNOD, Opcode.SYMLINK, Opcode.LINK)
    assert again == (0 if made or b"other\0x" in body else errno.ENOENT)


def test_a_socket_is_bound_at_once(watched: Watched) -> None:
    """bind(2) does not ask twice; so it is delivered twice."""
    watched.touch("x")
    watched.deliver()
    (watched.world.source / "x").unlink()
    body = fuse.MKNOD_IN.pack(0o140755, 0, 0) + b"x\0"
    assert error(watched.ask(Opcode.MKNOD, 1, body)) == 0
    assert [order.op for order in watched.deliver()] == [Op.REMOVE, Op.CREATE]
    assert watched.counts["repeated"] == 1


def test_what_goes_through_is_delivered_after_what_was_before(watched: Watched) -> None:
    """Where the kernel takes the lock without a word, and asks for the name at once."""
    watched.touch("x")
    watched.deliver()
    (watched.world.source / "x").unlink()
    assert error(watched.ask(Opcode.CREATE, 1, CREATE + b"x\0")) == errno.ESTALE
    assert error(watched.ask(Opcode.LOOKUP, 1, b"x\0")) == errno.ENOENT
    assert error(watched.ask(Opcode.GETATTR, 1, GETATTR)) == 0
    assert error(watched.ask(Opcode.CREATE, 1, CREATE + b"x\0")) == 0
    assert [order.op for order in watched.deliver()] == [Op.REMOVE, Op.CREATE]


def test_what_went_through_is_delivered_again_if_the_rest_is_delivered_by_now(
    watched: Watched,
) -> None:
    """The agent executes what was sent to it before the server has come to the guest's own event:
    it is reported behind that all the same.
    """
    watched.touch("x")
    assert error(watched.ask(Opcode.RENAME, 1, RENAME + b"x\0y\0")) == errno.ESTALE
    watched.orders()  # on their way
    assert error(watched.ask(Opcode.LOOKUP, 1, b"x\0")) == 0
    assert error(watched.ask(Opcode.RENAME, 1, RENAME + b"x\0y\0")) == 0
    watched.operations.guest.asked()  # they are executed
    assert [order.op for order in watched.deliver()] == [Op.RENAME]
    assert watched.counts["repeated"] == 1
    watched.find(b"y")
    watched.ask(Opcode.UNLINK, 1, b"y\0")
    assert not watched.deliver()  # but only once


def test_directories_are_asked_for_anew_meanwhile(watched: Watched) -> None:
    """Else the kernel, which knows them from the replayer, would take the lock without a word."""
    root = watched.world.root
    watched.touch("x")
    assert not watched.operations.guest.history.is_sought(root)
    assert error(watched.ask(Opcode.UNLINK, 1, b"x\0")) == errno.ESTALE
    assert watched.operations.guest.history.is_sought(root)
    watched.deliver()
    assert error(watched.ask(Opcode.GETATTR, 1, GETATTR)) == 0
    assert not watched.operations.guest.history.is_sought(root)


# -- how it ends -----------------------------------------------------------------------------------


def waiting(watched: Watched, name: str = "x", pid: int = 7) -> Pending:
    """A request that waits."""
    watched.touch(name)
    node = watched.find(name.encode(), pid)
    pending = watched.ask(Opcode.GETATTR, node, GETATTR, pid)
    assert error(pending) is None
    return pending


def test_an_agent_that_does_nothing(watched: Watched) -> None:
    """A bound, and then nobody waits until it does something."""
    stat = waiting(watched)
    assert watched.guest.loop.timers == [PATIENCE]
    watched.guest.loop.expire()
    assert error(stat) == 0
    assert watched.counts["waits_cut"] == 1
    watched.touch("y")
    assert error(watched.ask(Opcode.GETATTR, watched.find(b"y"), GETATTR)) == 0
    watched.deliver()
    watched.deliver()
    waiting(watched, "z")


def test_an_agent_that_is_slow(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it delivers something, it is waited for a little longer."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watched.touch(*(f"a{i}" for i in range(60)))
    stat = waiting(watched)
    watched.orders()
    ledger = watched.operations.guest.ledger
    for waited in range(1, 20):
        now += PATIENCE
        ledger.failed(ledger.tasks[1].order.seq)
        watched.guest.loop.expire()
        if waited * PATIENCE >= LONGEST:
            break
        assert error(stat) is None
    assert error(stat) == 0
    assert watched.counts["waits_cut"] == 1


def test_an_agent_that_is_far_behind(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits in vain."""
    real = time.monotonic
    watched.touch("a", "b")
    watched.world.pump()
    watched.world.orders(watched.operations)
    watched.touch("c")
    watched.world.pump()
    monkeypatch.setattr(time, "monotonic", lambda: real() + LONGEST + 1)
    watched.operations.guest.take(1)  # those were executed, late
    stat = watched.ask(Opcode.GETATTR, watched.find(b"c"), GETATTR)
    assert error(stat) == 0
    assert watched.counts["waits_cut"] == 1


def test_an_agent_that_is_not_there(watched: Watched) -> None:
    stat = waiting(watched)
    watched.operations.guest.disconnect()
    watched.guest.loop.turn()
    assert error(stat) == 0
    watched.touch("y")
    assert error(watched.ask(Opcode.GETATTR, watched.find(b"y"), GETATTR)) == 0
    assert error(watched.ask(Opcode.UNLINK, 1, b"y\0")) == 0
    assert not watched.counts["waits_cut"]


def test_a_program_that_is_killed(watched: Watched) -> None:
    """An INTERRUPT has its request answered: a signal that it survives must not show as EINTR."""
    stat = waiting(watched)
    interrupt = watched.ask(Opcode.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(stat.unique))
    assert interrupt.lengths == [0]
    assert error(stat) == 0
    watched.deliver()


def test_the_end_of_the_session(watched: Watched) -> None:
    stat = waiting(watched)
    watched.guest.session.close()
    assert error(stat) == errno.EINTR
    watched.deliver()
    assert not watched.guest.loop.timers


def test_a_server_that_hands_over(watched: Watched) -> None:
    """The next one is asked again."""
    stat = waiting(watched)
    watched.guest.session.suspend()
    watched.deliver()
    assert stat.lengths == []


def test_so_many_may_wait(watched: Watched) -> None:
    """Others are answered at once: the agent's own requests need room."""
    waits = [waiting(watched, f"x{i}", pid=100 + i) for i in range(PARKED_LIMIT)]
    watched.touch("y")
    assert error(watched.ask(Opcode.GETATTR, watched.find(b"y"), GETATTR)) == 0
    assert watched.counts["waits_cut"] == 1
    watched.deliver()
    assert [error(wait) for wait in waits] == [0] * PARKED_LIMIT


# -- directories in use ----------------------------------------------------------------------------


def new_directory(watched: Watched) -> tuple[frames.Order, bytes]:
    """The order for a new directory that the agent has, and what the kernel is to look up first."""
    (watched.world.source / "d").mkdir()
    (order,) = watched.orders()
    nodeid = watched.world.node("d").nodeid
    assert (order.op, order.nodeid2, order.name2) == (Op.CREATE, STAGING, b"%d" % nodeid)
    return order, order.name2 + b"\0"


def look(watched: Watched, parent: int, name: bytes) -> int | None:
    return error(watched.ask(Opcode.LOOKUP, parent, name, pid=AGENT_PID))


def test_a_new_directory_is_moved_out_of_the_way(watched: Watched) -> None:
    _, away = new_directory(watched)
    watched.guest.session.nodes.restore({STAGING: 1}, {})
    assert look(watched, STAGING, away) == 0
    assert look(watched, 1, b"d\0") == errno.ENOENT
    made = watched.ask(Opcode.MKDIR, 1, fuse.MKDIR_IN.pack(0o755, 0) + b"d\0", pid=AGENT_PID)
    assert error(made) == 0


def test_a_new_directory_that_a_user_has_moved_back(watched: Watched) -> None:
    """It may be in use: the agent is to begin anew, and in the end it is delivered."""
    _, away = new_directory(watched)
    watched.guest.session.nodes.restore({STAGING: 1}, {})
    assert look(watched, STAGING, away) == 0
    watched.find(b"d")
    assert look(watched, 1, b"d\0") == 0
    assert look(watched, STAGING, away) == 0
    assert look(watched, 1, b"d\0") == errno.ENOENT
    for _ in range(KEPT_LIMIT - 1):
        watched.find(b"d")
        assert look(watched, 1, b"d\0") == 0
    watched.find(b"d")
    assert look(watched, 1, b"d\0") == errno.ENOENT


def test_a_new_directory_that_a_user_is_about_to_move_back(watched: Watched) -> None:
    (watched.world.source / "d").mkdir()
    watched.find(b"d")
    (order,) = watched.orders()
    watched.guest.session.nodes.restore({STAGING: 1}, {})
    assert look(watched, STAGING, order.name2 + b"\0") == 0
    assert look(watched, 1, b"d\0") == 0
    assert look(watched, STAGING, order.name2 + b"\0") == 0
    assert look(watched, 1, b"d\0") == errno.ENOENT
