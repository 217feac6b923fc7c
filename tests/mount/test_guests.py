"""Several guests in one server: two and two hundred simulated ones on the Unix socket."""

from __future__ import annotations

import itertools
import os
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted, wait_until
from protocol import frames
from protocol.masks import Mask

from .observing import SimulatedGuest, guests, status, watching

CREATE, DELETE, MODIFY, ATTRIB = (
    int(mask) for mask in (Mask.CREATE, Mask.DELETE, Mask.MODIFY, Mask.ATTRIB)
)


@dataclass(frozen=True)
class Served:
    """A mount and its server's socket."""

    share: Mount
    socket: Path

    @property
    def source(self) -> Path:
        return self.share.source

    def count(self) -> int:
        """Observers connected."""
        return sum(g["kind"] == "observer" for g in status(self.share.mountpoint)["guests"])

    def host_watches(self) -> int:
        watches: int = status(self.share.mountpoint)["host_watches"]
        return watches


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A mount with an agent, and a socket for the guests beside it."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    path = tmp_path / "socket"
    with mounted(source, mountpoint, "--socket", str(path)) as share:
        yield Served(share, path)
    assert not path.exists()


def all_events(guest: SimulatedGuest, count: int, timeout: float = 20) -> list[frames.Event]:
    wait_until(lambda: len(guest.take()) >= count, timeout, f"{count} events")
    return guest.take()


def names(events: list[frames.Event]) -> list[bytes]:
    return [event.name for event in events]


def test_two_guests_and_a_mount(served: Served) -> None:
    """Each gets what it asked for, from every origin, the mount's own users included."""
    (served.source / "d").mkdir()
    with guests(served.socket, 2) as (one, two), watching(served.share) as watcher:
        one.mark(b"", CREATE)
        two.mark(b"", CREATE | DELETE)
        two.mark(b"d", CREATE)
        (served.source / "host").mkdir()
        (served.share.mountpoint / "user").mkdir()
        (served.source / "host").rmdir()
        (served.source / "d/x").mkdir()
        assert names(all_events(two, 4)) == [b"host", b"user", b"host", b"x"]
        assert names(all_events(one, 2)) == [b"host", b"user"]
        lines = watcher.wait((os.fsencode(served.share.mountpoint / "host"), "DELETE,ISDIR"))
        made = [line.path.rpartition(b"/")[2] for line in lines if "CREATE" in line.kinds]
        assert sorted(made) == [b"host", b"user"], "each once: by its kernel, or by its agent"


def test_200_guests_are_isolated(served: Served) -> None:
    for i in range(200):
        (served.source / f"d{i}").mkdir()
    with guests(served.socket, 200) as all_guests:
        nodes = [guest.mark(b"d%d" % i, CREATE) for i, guest in enumerate(all_guests)]
        assert len(set(nodes)) == 200
        for i in range(200):
            (served.source / f"d{i}/for {i}").mkdir()
        for i, guest in enumerate(all_guests):
            (event,) = all_events(guest, 1)
            assert event == frames.Event(
                nodes[i], event.generation, CREATE | int(Mask.ISDIR), 0, b"for %d" % i
            )
        # Nothing more has come for anybody after all have been served once more.
        (served.source / "d199/end").mkdir()
        all_events(all_guests[199], 2)
        assert [len(guest.take()) for guest in all_guests] == [1] * 199 + [2]


def test_200_guests_aggregate(served: Served) -> None:
    """One host watch for all; each guest's own mask decides what it gets."""
    (served.source / "d").mkdir()
    before = served.host_watches()
    bits = [CREATE, DELETE, MODIFY, ATTRIB]
    with guests(served.socket, 200) as all_guests:
        for guest, mask in zip(all_guests, itertools.cycle(bits), strict=False):
            guest.mark(b"d", mask)
        assert served.host_watches() - before <= 2  # d, and the root that names it
        (served.source / "d/x").write_text("x")
        (served.source / "d/x").chmod(0o600)
        (served.source / "d/x").unlink()
        for guest, mask in zip(all_guests, itertools.cycle(bits), strict=False):
            assert {event.mask for event in all_events(guest, 1)} == {mask}
        for guest in all_guests[:100]:
            guest.close()
        wait_until(lambda: served.count() == 100, 10, "the end of 100 guests")
        (served.source / "d/y").mkdir()
        for guest in all_guests[100::4]:
            assert names(all_events(guest, 2)) == [b"x", b"y"]
    wait_until(lambda: served.count() == 0, 10, "the end of all")
    wait_until(lambda: served.host_watches() <= before, 10, "the end of the watches")


def test_a_guest_that_never_reads_delays_nobody(served: Served) -> None:
    count = 5000
    with guests(served.socket, 2) as (fast, other), a_stuck_guest(served.socket) as stuck:
        for guest in (fast, other, stuck):
            guest.mark(b"", CREATE | DELETE)
        latencies = []
        for i in range(count):
            begin = time.monotonic()
            (served.source / f"n{i}").mkdir()
            (served.source / f"n{i}").rmdir()
            if i % 100 == 0:
                all_events(fast, 2 * (i + 1), timeout=5)
                latencies.append(time.monotonic() - begin)
        assert len(all_events(fast, 2 * count)) == 2 * count
        assert len(all_events(other, 2 * count)) == 2 * count
        assert sorted(latencies)[len(latencies) // 2] < 0.5
        depth = max(g["depth"] for g in status(served.share.mountpoint)["guests"])
        assert depth > count, "the stuck guest's socket took all: the test proves nothing"
        # And what waits for it is still complete and in order, when it reads at last.
        late = all_events(stuck, 2 * count)
        assert [(e.name, e.mask) for e in late] == [(e.name, e.mask) for e in fast.events]


@contextmanager
def a_stuck_guest(path: Path) -> Iterator[SimulatedGuest]:
    """One that will not read, and has little room for what it does not read."""
    with closing(SimulatedGuest(path, receive_buffer=4096)) as stuck:
        stuck.hello()
        yield stuck


def test_a_stuck_guest_holds_up_no_request_of_the_mount(served: Served) -> None:
    with (
        a_stuck_guest(served.socket) as stuck,
        watching(served.share, events="create") as watcher,
    ):
        stuck.mark(b"", CREATE | DELETE)
        for i in range(2000):
            (served.source / f"n{i}").mkdir()
        last = os.fsencode(served.share.mountpoint / "n1999")
        watcher.wait((last, "CREATE,ISDIR"))
        assert len(os.listdir(served.share.mountpoint)) == 2000


# Permission to connect


def test_the_socket_is_its_owners(served: Served) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o600
    assert served.socket.stat().st_uid == os.geteuid()


CONNECT = """
import os, socket, sys
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.chdir("/proc/self/fd/" + sys.argv[1])
with socket.socket(socket.AF_UNIX) as peer:
    peer.settimeout(10)
    try:
        peer.connect("socket")
    except PermissionError:
        sys.exit("mode")
    try:
        peer.sendall(bytes.fromhex(sys.argv[2]))
        answer = peer.recv(100)
    except ConnectionError:
        answer = b""
    sys.exit("answered" if answer else "closed")
"""


def as_nobody(served: Served) -> str:
    """What another user's connection comes to."""
    hello = frames.encode(frames.Hello(frames.VERSION, frames.Role.OBSERVER, 0xFFF))
    directory = os.open(served.socket.parent, os.O_RDONLY)
    os.chmod(served.socket.parent, 0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CONNECT, str(directory), hello.hex()],
            pass_fds=[directory], capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    finally:
        os.close(directory)
    return done.stderr.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_another_user_is_refused(served: Served) -> None:
    assert as_nobody(served) == "mode"
    served.socket.chmod(0o666)  # now the peer's credentials alone decide
    assert as_nobody(served) == "closed"
    assert served.count() == 0
    with guests(served.socket, 1):
        assert served.count() == 1


# Guests that misbehave


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 64,
        b"\xff" * 64,
        frames.encode(frames.Update(1, 1, 0, 1)),
        frames.encode(frames.Hello(frames.VERSION, frames.Role.REPLAYER, 0xFFF)),
        frames.encode(frames.Hello(99, frames.Role.OBSERVER, 0xFFF)),
    ],
    ids=["http", "zeros", "ones", "no hello", "replayer", "version"],
)
def test_what_is_no_frame_ends_that_session_alone(served: Served, data: bytes) -> None:
    with guests(served.socket, 1) as (good,):
        good.mark(b"", CREATE)
        with connected(served.socket) as bad:
            bad.sendall(data)
            assert bad.recv(100) == b""
        (served.source / "x").mkdir()
        assert names(all_events(good, 1)) == [b"x"]
        assert served.count() == 1


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(os.fspath(path))
        yield peer


def test_bytes_one_by_one(served: Served) -> None:
    hello = frames.encode(frames.Hello(frames.VERSION, frames.Role.OBSERVER, 0xFFF))
    with connected(served.socket) as slow:
        for byte in hello:
            slow.sendall(bytes([byte]))
        assert isinstance(frames.decode(slow.recv(100)), frames.Welcome)


def test_connections_are_bounded(served: Served) -> None:
    """Descriptors stay for files; guests that leave make room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    limit = 1024
    try:
        with guests(served.socket, limit):
            assert served.count() == limit
            with connected(served.socket) as one_more:
                assert one_more.recv(1) == b""
            assert os.listdir(served.share.mountpoint) == []
        wait_until(lambda: served.count() == 0, 20, "the end of all")
        with guests(served.socket, 1):
            assert served.count() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_says_bye(served: Served) -> None:
    guest = SimulatedGuest(served.socket)
    guest.hello()
    guest.socket.sendall(frames.encode(frames.Bye()))
    assert guest.socket.recv(100) == b""
    guest.close()
    assert served.count() == 0
