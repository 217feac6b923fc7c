"""What could not be looked at is not gone: every system call of the core fails once, and for long.

A scenario of guests' requests, host events, new marks and comparisons runs again and again, each
time with another call failing. Whatever fails: no guest learns that something ended that is
there, no request says so, and afterwards every mark that was set delivers. tests/core/failing.py
reads the table of calls from the source: a new one is tried without being named here.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fsd.export import watches
from fsd.files.changes import Changes
from fsd.files.locks import Lock
from fsd.guests.guest import Observer
from fsd.pacing import windows
from protocol.handles import NodeKey
from protocol.masks import Mask

from .failing import LEFT_OUT, PURE, Call, Injector, modules, table
from .support import ALL, USER, Seen, World

pytestmark = pytest.mark.slow

NUMBERS = (errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EIO)
UNREACHED = {
    "syscalls.syncfs": "in a thread of a transport",
    "os.fdatasync": "in a thread of a transport",
    "os.fsync": "in a thread of a transport",
    "os.sysconf": "when its module is imported",
    "os.write": "to a guest's kernel, in a thread of a transport",
    "os.memfd_create": "what is kept for the next process",
    "os.dup2": "handing over to the next process",
    "os.access": "only where the kernel does not judge permissions",
    "syscalls.file_handle": "at the start, which may fail",
    "credentials.supplementary_groups": "only of users that are not root",
    "syscalls.mount_id": "at the start, which may fail",
    "credentials.cannot_change_identity": "at the start, which may fail",
    "credentials.obey_limits_of_disks": "at the start, which may fail",
    "os.listdir": "of /proc, for a lone OPEN",
}
BY_HANDLE = {
    "syscalls.open_by_handle",
    "syscalls.open_below",
}  # an ordinary user's server calls neither
ENDS = {"delete", "delete_self", "moved_from", "moved_to", "move_self", "unmount", "ignored"}
FILES = ("d/a", "d/b", "d/sub/x", "e/f")
THERE = {b"", b"d", b"d/a", b"d/b", b"d/sub", b"d/sub/x", b"e", b"e/f", b"d/new"}
MARKS = ("", "d", "d/a", "d/sub")
SAMPLES = 4
"""Of the calls of one function, how many fail each in a run of its own."""
_tops = count()


class Scenario:
    """One run: a fresh tree, marks on it, then all that the server does."""

    def __init__(self, top: Path, *, handles: bool) -> None:
        self.source = top / f"{next(_tops)}"
        for directory in ("d/sub", "e", "s"):
            (self.source / directory).mkdir(parents=True)
        for file in FILES:
            (self.source / file).write_text("content")
        self.world = World(self.source)
        self.world.table.reach.by_handle = handles
        self.mount = self.world.mount(agent=False)
        self.mount.guest.device = os.stat(self.source).st_dev
        self.nodes = {p: self.world.node(p) for p in (*MARKS, *FILES, "e", "s")}
        self.observer = self.world.observer()
        for path in MARKS:
            self.world.export.update(self.observer, self.nodes[path].key, ALL)
        self.world.take(self.observer)
        self.seen: list[Seen] = []
        self.whole: Observer | None = None

    @staticmethod
    def _try(request: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """A request about what is there: it may fail, and not by saying that it is not."""
        error = None
        try:
            return request(*args, **more)
        except OSError as raised:
            error = raised
        assert error.errno not in (errno.ENOENT, errno.ESTALE), f"{error!r} of what is there"
        return None

    def run(self) -> None:
        """What the transports and the pump have the core do."""
        self._look()
        self._arm()
        self._hear()
        self._mark()
        self._change()
        self._hear()

    def _hear(self) -> None:
        """The host changes something, then nobody knows what, and all is compared."""
        world = self.world
        (self.source / "d/new").write_text("x")
        (self.source / "d/a").write_text("changed")
        self._pump()
        world.export.recovery.resync(world.export.watcher.inodes())
        self._pump()

    def _pump(self) -> None:
        export = self.world.export
        export.watcher.drain()
        while export.watcher.backlog:
            export.process(1 << 20)
        self.seen += self.world.taken(self.observer)

    def _arm(self) -> None:
        """A local program looks at a directory again, after something has happened there."""
        for _ in range(2):
            self._try(
                self.world.export.arming.looked_up, self.mount.guest, self.nodes["s"], USER.pid
            )
            (self.source / "s/made").touch()

    def _mark(self) -> None:
        for path in ("e", "d/b"):
            with suppress(OSError):  # ENOSPC: the mark holds all the same
                self.world.export.update(self.observer, self.nodes[path].key, ALL)
        self.whole = self.world.observer("whole")
        with suppress(OSError):
            self.world.export.update(self.whole, NodeKey(0, 0), int(Mask.CREATE))

    def _look(self) -> None:
        """Requests that change nothing."""
        mount, nodes = self.mount, self.nodes
        for path in FILES:
            node = nodes[path]
            parent = nodes.get(os.path.dirname(path))
            self._try(mount.getattr, USER, node.nodeid)
            self._try(mount.born_ns, USER, node.nodeid)
            if parent is not None:
                name = os.fsencode(os.path.basename(path))
                self._try(mount.lookup, USER, parent.nodeid, name)
        self._try(mount.lookup, USER, nodes["d/sub"].nodeid, b"..")
        self._try(mount.listxattr, nodes["d/a"].nodeid)
        self._try(mount.statfs, nodes["d/a"].nodeid)
        listing = self._try(mount.files.opendir, USER, nodes["d"].nodeid)
        if listing is not None:
            names = self._try(mount.files.names, listing, 0)
            found = {entry.name for entry in names[1]} if names is not None else None
            assert found is None or found >= {b"a", b"b", b"sub"}
            self._try(mount.files.entry, listing, b"a")
            self._try(mount.files.release, listing)

    def _change(self) -> None:
        """Requests that change things, in a directory of their own."""
        mount, there = self.mount, self.nodes["s"].nodeid
        made = self._try(mount.create, USER, there, b"c", 0o644, os.O_RDWR)
        if made is None:
            return
        (entry, fh), attempt = made, self._try
        node = entry.inode.nodeid
        attempt(mount.files.write, fh, 0, b"12345678")
        attempt(mount.files.write_from, USER, fh, [memoryview(b"1")], 0, kill=True)
        attempt(mount.files.read, fh, 0, 4)
        attempt(mount.files.read_into, fh, [memoryview(bytearray(4))], 0)
        attempt(mount.files.fallocate, USER, fh, 0, 0, 64)
        attempt(mount.files.lseek, fh, 0, os.SEEK_DATA)
        attempt(mount.files.copy_file_range, USER, fh, 0, fh, 4, 2)
        attempt(mount.files.ioctl, USER, fh, 0x8008_6601, b"")
        lock = Lock(fcntl.F_WRLCK, 0, 9, 1)
        attempt(mount.files.setlk, USER, fh, 1, lock)
        attempt(mount.files.getlk, USER, fh, 2, lock)
        attempt(mount.files.flock, USER, fh, fcntl.F_WRLCK)
        for changes in (
            Changes(mode=0o600), Changes(uid=0, gid=0), Changes(size=3), Changes(atime_ns=1)
        ):  # fmt: skip
            attempt(mount.setattr, USER, node, changes, None)
        attempt(mount.setattr, USER, node, Changes(size=2), fh)
        attempt(mount.setxattr, USER, node, b"user.x", b"y", 0)
        attempt(mount.getxattr, USER, node, b"user.x")
        with suppress(OSError):  # ENODATA, where it could not be set
            mount.removexattr(USER, node, b"user.x")
        unnamed = attempt(mount.tmpfile, USER, there, 0o600, os.O_RDWR)
        for handle in (fh, *([unnamed[1]] if unnamed else ())):
            attempt(mount.files.flush, handle, 1)
            attempt(mount.files.release, handle)
        reopened = attempt(mount.files.open, USER, node, os.O_RDONLY)
        if reopened is not None:
            attempt(mount.files.release, reopened)
        attempt(mount.link, USER, node, there, b"l")
        attempt(mount.mkdir, USER, there, b"m", 0o755)
        attempt(mount.mknod, USER, there, b"p", 0o010644, 0)
        attempt(mount.mknod, USER, there, b"z", 0o020600, os.makedev(1, 3))
        if (link := attempt(mount.symlink, USER, there, b"y", b"c")) is not None:
            attempt(mount.readlink, link.inode.nodeid)
        with suppress(OSError):  # not there, where it could not be made
            mount.rmdir(USER, there, b"m")
        attempt(mount.rename, USER, there, b"c", there, b"r", 0)
        with suppress(OSError):
            mount.unlink(USER, there, b"r")

    def check(self) -> None:
        """The fault is over: everything that was marked is watched."""
        export = self.world.export
        for _ in range(3):
            self.seen += self.world.take(self.observer)
            if not export.watches.unwatched:
                break
        assert not export.watches.unwatched
        before = len(self.seen)
        for path in ("", "d", "d/sub", "e"):
            (self.source / path / "after").touch()
        for path in ("d/a", "d/b"):
            (self.source / path).chmod(0o600)
        self.seen += self.world.take(self.observer)
        last = {(seen.path, seen.mask) for seen in self.seen[before:]}
        for name in (b"after", b"d/after", b"d/sub/after", b"e/after"):
            assert (name, "create") in last, f"{name!r} was not delivered"
        for name in (b"d/a", b"d/b"):
            assert (name, "attrib") in last, f"a change of {name!r} was not delivered"
        assert any((s.path, s.mask) == (b"d/new", "create") for s in self.seen)
        ended = [s for s in self.seen if s.path in THERE and ENDS & set(s.mask.split(","))]
        assert not ended, "the end of what is still there was delivered"
        if self.whole is not None:
            reported = self.world.take(self.whole)
            assert (b"after", "create") in {(seen.path, seen.mask) for seen in reported}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is tried again at once."""
    monkeypatch.setattr(watches, "COMPARE_EVERY", 0.0)
    monkeypatch.setattr(windows, "RENAME_WAIT", 0.0)


def lasting(call: Call, number: int) -> int:
    """How many calls fail: there are no descriptors for a while; one disk block is bad. A read of
    the queue of events needs neither descriptors nor memory: it fails once at most.
    """
    lasts = number in (errno.EMFILE, errno.ENOMEM) and call.label != "os.read"
    return 1 << 30 if lasts else 1


def reached(call: Call, top: Path, *, handles: bool) -> int:
    """How many calls of it the scenario has."""
    scenario = Scenario(top, handles=handles)
    injector = Injector(call, errno.EIO, 0, 0)
    with injector.active():
        scenario.run()
    scenario.check()
    scenario.world.close()
    return injector.count


CALLS = table()


def samples(calls: int) -> Iterator[int]:
    """Which of so many calls fail first."""
    step = max(1, -(-calls // SAMPLES))
    yield from range(1, calls + 1, step)


@pytest.mark.parametrize("handles", [True, False], ids=["handles", "paths"])
@pytest.mark.parametrize("call", CALLS, ids=[call.label for call in CALLS])
@pytest.mark.usefixtures("quick")
def test_a_call_that_fails(call: Call, handles: bool, tmp_path: Path) -> None:
    """By file handles, and as an ordinary user's server, which opens none."""
    if not handles and call.label in BY_HANDLE:
        return
    calls = reached(call, tmp_path, handles=handles)
    if call.label in UNREACHED:
        assert not calls, "it is reached: it belongs to the others"
        return
    assert calls, "no part of the scenario makes this call: add one that does"
    before = set(os.listdir("/proc/self/fd"))
    for number in NUMBERS:
        for first in samples(calls):
            scenario = Scenario(tmp_path, handles=handles)
            injector = Injector(call, number, first, lasting(call, number))
            note = f"{errno.errorcode[number]} of call {first} of {calls}"
            try:
                with injector.active():
                    scenario.run()
                scenario.check()
            except AssertionError as error:
                error.add_note(note)
                raise
            finally:
                scenario.world._closed = True  # its faults are counted below
                for operations in scenario.world.services:
                    operations.close()
                scenario.world.export.close()
            assert injector.failed or first > 1, note  # how often depends on the time
            assert not scenario.world.export.counts["faults"], note
            assert set(os.listdir("/proc/self/fd")) == before, f"descriptors are left: {note}"


def test_the_table_knows_its_exceptions() -> None:
    """What is left out by name is called at all, and is in the table else."""
    labels = {call.label for call in CALLS}
    assert set(UNREACHED) <= labels
    assert not labels & (PURE | set(LEFT_OUT))
    known = {
        "files.table",
        "files.passthrough",
        "events.watcher",
        "events.compare",
        "events.reading",
    }
    assert known <= set(modules())
