"""A real Export on a real directory, used synchronously: what the core tests stand on."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

from fsd.events import missed, watcher
from fsd.export.export import Export
from fsd.files.caller import Caller
from fsd.files.inode import Inode
from fsd.fuse.operations import Operations
from fsd.guests.guest import OUTBOX_LIMIT, Guest, Observer
from fsd.servers.pump import Pump
from protocol import frames, masks
from protocol.frames import Order
from protocol.handles import NodeKey
from protocol.masks import EVENTS, Mask

AGENT_PID = 4_000_000_001  # above any pid of this machine
USER = Caller(os.geteuid(), os.getegid(), os.getpid())
AGENT = Caller(os.geteuid(), os.getegid(), AGENT_PID)
ALL = int(EVENTS)
STRUCTURE = int(masks.STRUCTURE)
DIRECTORY = int(watcher.DIRECTORY)
MARKED = int(watcher.MARKED)
WHOLE = NodeKey(0, 0)


class Seen(NamedTuple):
    """An event as an observer got it."""

    path: bytes  # below the root; of a node that is not known any more its nodeid
    mask: str
    cookie: int = 0


class World:
    """One export, its source directory, and the steps that a running server makes."""

    def __init__(
        self,
        source: Path,
        *,
        outbox_limit: int | None = None,
        watch_limit: int | None = None,
        read_only: bool = False,
        overflow_after_loss: bool = False,
    ) -> None:
        self.source = source
        self.pumping = Pump()
        self.export = Export(
            str(source),
            read_only=read_only,
            outbox_limit=OUTBOX_LIMIT if outbox_limit is None else outbox_limit,
            watch_limit=watch_limit,
            overflow_after_loss=overflow_after_loss,
            on_work=self.pumping.wake,
        )
        self.table = self.export.table
        self.root = self.table.root
        self.services: list[Operations] = []
        self._closed = False

    def close(self) -> None:
        """Once; also asserts that no fault was swallowed on the way."""
        if self._closed:
            return
        self._closed = True
        for operations in self.services:
            operations.close()
        self.export.close()
        assert not self.export.counts["faults"]

    # Guests

    def observer(self, name: str = "observer") -> Observer:
        """A guest that reads events."""
        return self.export.add_observer(name)

    def mount(self, name: str = "mount", *, agent: bool = True, local: bool = False) -> Operations:
        """A mount's operations, with its agent connected: another machine's, or a local one."""
        operations = Operations(self.export, self.export.add_mount_guest(name, is_local=local))
        if agent:
            hello = frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL)
            operations.guest.connect(AGENT_PID + len(self.services), hello)
        self.services.append(operations)
        return operations

    # Nodes and marks

    def node(self, path: str | bytes = b"") -> Inode:
        """The inode of a path, with a reference, as a guest's kernel would hold it."""
        inode = self.root
        for name in os.fsencode(path).split(b"/"):
            if name:
                inode = self.export.fs.lookup(inode, name).inode
        return inode

    def mark(self, guest: Guest, path: str | bytes = b"", mask: int = ALL) -> Inode:
        """Publish interest in a path; returns its inode."""
        inode = self.node(path)
        self.export.update(guest, inode.key, mask)
        return inode

    def host_mask(self, inode: Inode) -> Mask:
        """What the host is watched for."""
        return self.export.watcher.mask_of(inode)

    # Events

    def pump(self) -> None:
        """Process all that has happened up to now, waiting for the other halves of renames."""
        watcher = self.export.watcher
        deadline = time.monotonic() + 10
        watcher.drain()
        while True:
            self.export.process(1 << 20)
            if not self.export.is_busy and not watcher._readable():
                return
            assert time.monotonic() < deadline, "the queue does not become empty"
            watcher.drain()

    def take(self, guest: Observer) -> list[Seen]:
        """Everything that was delivered to a guest up to now."""
        self.pump()
        return self.taken(guest)

    def taken(self, guest: Observer) -> list[Seen]:
        """What is in a guest's outbox."""
        seen = []
        while messages := guest.take(1 << 20):
            for message in messages:
                assert isinstance(message, frames.Event)
                seen.append(self._seen(message))
        return seen

    def _seen(self, event: frames.Event) -> Seen:
        try:
            parent = self.table.find(NodeKey(event.nodeid, event.generation)).path()
        except OSError:
            parent = b"%d" % event.nodeid
        path = b"/".join(part for part in (parent, event.name) if part)
        return Seen(path, ",".join(masks.names(event.mask)), event.cookie)

    def orders(self, operations: Operations) -> list[Order]:
        """What the agent is asked to do; taking more means that it has done what it had."""
        self.pump()
        deadline = time.monotonic() + 10
        while operations.guest.held:  # an OPEN waits for what comes after it
            assert time.monotonic() < deadline, "events stay held"
            self.export.process(1 << 20)
        return [m for m in operations.guest.take(1 << 20) if isinstance(m, Order)]


def plain(seen: list[Seen]) -> list[tuple[bytes, str]]:
    """Paths and masks, without cookies."""
    return [(event.path, event.mask) for event in seen]


def merged(seen: list[Seen]) -> list[tuple[bytes, str]]:
    """``plain`` after collapsing consecutive repeats, as the kernel may or may not do."""
    events = plain(seen)
    return [event for i, event in enumerate(events) if not i or event != events[i - 1]]


def snapshot(source: Path) -> dict[bytes, tuple[object, ...]]:
    """All that a change of the backing store would change, taken without leaving a trace."""
    state: dict[bytes, tuple[object, ...]] = {}

    def note(fd: int, path: bytes) -> None:
        for name in os.listdir(fd):
            found = path + b"/" + os.fsencode(name)
            s = os.lstat(name, dir_fd=fd)
            content = b""
            if stat.S_ISREG(s.st_mode) or stat.S_ISDIR(s.st_mode):
                below = os.open(name, os.O_RDONLY | os.O_NOATIME, dir_fd=fd)
                if stat.S_ISDIR(s.st_mode):
                    note(below, found)
                else:
                    content = os.read(below, 1 << 20)
                os.close(below)
            times = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
            state[found] = (
                s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, *times, content
            )  # fmt: skip

    top = os.open(source, os.O_RDONLY | os.O_NOATIME)
    note(top, b"")
    os.close(top)
    return state


def settle(source: Path) -> None:
    """Wait until what was done is older than the clock lag that comparisons allow for."""
    newest = max(os.lstat(path).st_ctime_ns for path in [source, *source.rglob("*")])
    while time.time_ns() < newest + 2 * missed.CLOCK_LAG_NS:
        time.sleep(0.005)
