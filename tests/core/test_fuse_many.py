"""Many requests of one guest leave nothing behind: no node, no descriptor, no state."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fsd.export.stats import snapshot
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import ALL, World


@pytest.mark.slow
def test_a_hundred_thousand_requests(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"f{number}").write_bytes(b"data")
    (tmp_path / "d").mkdir()
    world = World(tmp_path)
    guest = GuestKernel(world.mount(agent=False))

    def held() -> tuple[int, int, int]:
        loop = guest.loop
        return len(world.table), len(os.listdir("/proc/self/fd")), len(loop.timers)

    def round_of_requests() -> int:
        for number in range(10):
            name = b"f%d" % number
            node = guest.lookup(name)
            guest.ok(Opcode.GETATTR, node.nodeid, fuse.GETATTR_IN.pack(0, 0))
            fh = guest.open(node.nodeid)
            assert guest.read(node.nodeid, fh) == b"data"
            guest.release(node.nodeid, fh)
            assert guest.ask(Opcode.LOOKUP, 1, b"none\0").error == errno.ENOENT
            assert guest.ask(Opcode.OPEN, node.nodeid + (1 << 32), bytes(8)).error == errno.ESTALE
            guest.lookup(name)
            guest.forget(node.nodeid, 2)
        fh = fuse.OPEN_OUT.unpack(guest.ok(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0)))[0]
        guest.ok(Opcode.READDIR, 1, fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0))
        guest.ok(Opcode.RELEASEDIR, 1, fuse.RELEASE_IN.pack(fh, 0, 0, 0))
        return 10 * 9 + 3

    round_of_requests()
    before, sent = held(), 0
    while sent < 100_000:
        sent += round_of_requests()
    assert held() == before
    guest.session.close()
    world.close()


def test_a_machine_sees_no_other_and_nothing_of_the_host(tmp_path: Path) -> None:
    """In the statistics: what it and its own observers have; the host and its mounts see all."""
    for name in ("d", "of-two", "of-the-host"):
        (tmp_path / name).mkdir()
    world = World(tmp_path, watch_limit=2)
    local = world.mount("local", local=True)
    one, two = world.mount("/run/one.sock"), world.mount("/run/two.sock")
    through_two = world.observer("of two")
    through_two.via = two.guest
    world.mark(one.guest, "d", ALL)
    with pytest.raises(OSError, match="limit on host watches"):  # no watch is left
        world.mark(through_two, "of-two", ALL)
    with pytest.raises(OSError, match="limit on host watches"):
        world.mark(world.observer("of the host"), "of-the-host", ALL)
    (tmp_path / "d/f").touch()
    world.pump()
    states = {
        viewer: snapshot(world.export, viewer)
        for viewer in (None, local.guest, one.guest, two.guest)
    }
    names = [[guest["name"] for guest in state["guests"]] for state in states.values()]
    everybody = ["local", "/run/one.sock", "/run/two.sock", "of two", "of the host"]
    assert names == [everybody, everybody, ["mount"], ["mount", "of two"]]
    unwatched = [{row["path"] for row in state["unwatched"]} for state in states.values()]
    assert unwatched == [{"of-two", "of-the-host"}] * 2 + [set(), {"of-two"}]
    seen = json.dumps(states[one.guest])
    assert "of-two" not in seen
    assert "sock" not in seen
    assert str(tmp_path) not in seen
    assert states[two.guest]["by_kind"] == {}, "what happens where others watch"
    assert states[two.guest]["host_watches"] == 0
    world.close()
