"""A guest that goes with much: others wait for a part of the work only."""

from __future__ import annotations

import errno
import struct

from fsd.fuse.leaving import AT_A_TIME, AT_ONCE
from fsd.fuse.session import FORGETS_LIMIT
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import World

MORE = 3 * AT_A_TIME


def test_nodes_are_given_back_a_part_at_a_time(world: World, guest: GuestKernel) -> None:
    count = AT_ONCE + MORE
    for n in range(count):
        (world.source / f"{n}").touch()
    last = guest.lookup(b"%d" % (count - 1)).nodeid
    held = len(world.table)
    for n in range(count - 1):
        guest.lookup(b"%d" % n)
    guest.forget(last, 1)
    assert guest.lookup(b"%d" % (count - 1)).nodeid == last
    assert len(world.table) == held + count - 1
    guest.session.close()
    assert held < len(world.table) <= held + MORE
    # The guest boots again, and looks up what is still to be given back.
    guest.init()
    assert guest.ask(Opcode.GETATTR, last, bytes(16)).error == errno.ESTALE
    assert guest.lookup(b"%d" % (count - 1)).nodeid == last
    for _ in range(MORE // AT_A_TIME + 1):
        guest.loop.turn()
    assert len(world.table) == held
    assert world.table.get(last).lookups == 1
    guest.forget(last, 1)
    assert len(world.table) == held - 1


def test_a_batch_of_forgets_is_done_a_part_at_a_time(world: World, guest: GuestKernel) -> None:
    (world.source / "f").touch()
    node = guest.lookup(b"f").nodeid

    def forget(count: int) -> None:
        body = struct.pack("<II", count, 0) + struct.pack("<QQ", node, 0) * (count - 1)
        guest.begin(Opcode.BATCH_FORGET, 0, body + struct.pack("<QQ", node, 1), room=0)

    forget(AT_ONCE + AT_A_TIME)
    guest.ok(Opcode.GETATTR, node, bytes(16))  # the last one is still to be done
    guest.loop.turn()
    guest.loop.turn()
    assert guest.ask(Opcode.GETATTR, node, bytes(16)).error == errno.ESTALE
    # What is under way is not done to the next session, and there is no end of how much it is.
    assert guest.lookup(b"f").nodeid == node
    for _ in range(2 * FORGETS_LIMIT // (16 * 60_000)):
        forget(60_000)
    guest.init()
    assert guest.lookup(b"f").nodeid == node
    for _ in range(60_000 // AT_A_TIME + 2):
        guest.loop.turn()
    guest.ok(Opcode.GETATTR, node, bytes(16))
    forget(1)
    assert guest.ask(Opcode.GETATTR, node, bytes(16)).error == errno.ESTALE
