"""Many requests of one guest leave nothing behind: no node, no descriptor, no state."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fsd.stats import snapshot
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel
from .support import World


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


def test_a_mount_does_not_see_another(tmp_path: Path) -> None:
    """In the statistics: neither its name nor its marks; the host sees all."""
    (tmp_path / "d").mkdir()
    world = World(tmp_path)
    one, two = world.mount("one"), world.mount("two")
    watcher = world.observer("of the host")
    through_two = world.observer("of two")
    through_two.via = two.guest
    world.mark(two.guest, "d")
    seen = {
        viewer.name if viewer else "": [g["name"] for g in snapshot(world.export, viewer)["guests"]]
        for viewer in (None, one.guest, two.guest)
    }
    assert seen == {
        "": ["one", "two", "of the host", "of two"],
        "one": ["one", "of the host"],
        "two": ["two", "of the host", "of two"],
    }
    assert watcher.via is None
    world.close()
