"""Servers that end under a running machine, and those that continue in their place."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fsd.virtio.device import MAX_QUEUES
from harness.mounts import wait_until
from protocol.vhostuser import U64, Inflight, Payload, Protocol, Region, Type, VringState

from .conftest import Server
from .test_device import M, Machine

pytestmark = pytest.mark.slow

KEEP = """
import sys
from fsd.process.keeper import Keeper
from fsd.process.logs import log_to_stderr
log_to_stderr("info")
command = [sys.executable, "-m", "tests.virtio.kept_echo", sys.argv[1]]
sys.exit(Keeper(command, [], {"kept-listen": sys.argv[1]}).run())
"""


class Kept:
    """A keeper, and the servers that it starts one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deadly = Path(f"{path}.deadly")
        """As long as it is there, the next message of the VMM's kills the server."""
        self.process = subprocess.Popen([sys.executable, "-c", KEEP, path], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self._lines = self.process.stdout
        self.pid = self.next()

    def next(self) -> int:
        """The process that serves, once it does."""
        self.pid = int(self._lines.readline())
        return self.pid

    def kill(self) -> None:
        """SIGKILL to the server, and another one."""
        os.kill(self.pid, signal.SIGKILL)
        self.next()

    def fault(self) -> None:
        """An exception that ends the server, and another one."""
        os.kill(self.pid, signal.SIGUSR1)
        self.next()

    def replace(self) -> None:
        """As for an upgrade."""
        self.process.send_signal(signal.SIGUSR2)
        self.next()

    def held(self) -> list[str]:
        """What the keeper has open."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        found = []
        for fd in folder.iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(re.sub(r"\d+", "N", os.readlink(fd)))
        return sorted(found)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path / "socket")
    yield made
    made.process.terminate()
    assert made.process.wait(10) == 0
    assert made.process.stdout is not None
    made.process.stdout.close()
    assert not made.path.exists()


@pytest.fixture
def running(kept: Kept) -> Iterator[Machine]:
    machine = Machine(kept.path)
    machine.start()
    machine.echo()
    yield machine
    machine.close()


def ask(machine: Machine, message: bytes) -> bytes:
    queue = machine.queues[1]
    head = queue.add([message], [4096])
    queue.kick()
    answered, data = queue.take_data()
    assert answered == head
    return data


@pytest.mark.parametrize("way", ["kill", "fault", "replace"])
def test_continues(kept: Kept, running: Machine, way: str) -> None:
    """The machine's connection, queues and memory stay; the VMM gets no message."""
    for _ in range(3):
        getattr(kept, way)()
        running.echo()
        running.echo(b"other queue", queue=0)
    assert ask(running, b"again") == b"[]"
    # And the VMM can send further messages.
    assert running.vmm.stop(2) == [3, 5]


def test_the_keeper_removes_nothing_by_a_vmms_word(tmp_path: Path) -> None:
    """Descriptors of a VMM's are held, too: a listening socket among them is none of the server's;
    and what has taken the place of the server's own socket stays.
    """
    kept = Kept(tmp_path / "socket")
    machine = Machine(kept.path)
    machine.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "of-somebody-else"))
        listener.listen(1)
        with suppress(ConnectionError, AssertionError):  # it may well be refused
            machine.vmm.ack(Type.SET_VRING_CALL, U64(1), [listener.fileno()])
    kept.path.unlink()
    kept.path.write_text("another file")
    kept.process.terminate()
    assert kept.process.wait(10) == 0
    assert (tmp_path / "of-somebody-else").is_socket()
    assert kept.path.read_text() == "another file"
    machine.close()
    assert kept.process.stdout is not None
    kept.process.stdout.close()


@pytest.mark.parametrize("way", ["kill", "fault", "replace"])
def test_requests_under_way(kept: Kept, running: Machine, way: str) -> None:
    """What waits for its answer waits with the next server, as often as it takes."""
    queue = running.queues[1]
    heads = [queue.add([b"wait"], [4]) for _ in range(3)]
    queue.kick()
    for _ in range(4):
        assert ask(running, b"again") == b"[]"
        getattr(kept, way)()
    queue.add([b"answer"], [6])
    queue.kick()
    assert sorted(queue.take()[0] for _ in range(4))[:3] == sorted(heads)


def test_a_request_that_kills(kept: Kept, running: Machine) -> None:
    """It is begun twice: then it is not safe to do it, and it must be refused. What comes behind
    it is served.
    """
    queue = running.queues[1]
    deadly = queue.add([b"die"], [4])
    behind = queue.add([b"abc"], [4])
    queue.kick()
    kept.next()
    kept.next()
    assert queue.take_data() == (deadly, b"eid")
    assert queue.take_data() == (behind, b"cba")
    assert ask(running, b"again") == repr([(b"die", False)]).encode()


def test_between_messages(kept: Kept, tmp_path: Path) -> None:
    """At any place of what a VMM says; it sees nothing of it."""
    machine = Machine(kept.path)
    original = machine.vmm.send_bytes
    count = 0

    def send(data: bytes, fds: object = ()) -> None:
        nonlocal count
        # What was said before has no answer: it was done once this one is answered.
        machine.vmm.send_bytes = original  # type: ignore[method-assign]
        machine.vmm.number(Type.GET_FEATURES)
        count += 1
        if count % 5 == 0:
            kept.kill()
        original(data, fds)  # type: ignore[arg-type]
        machine.vmm.send_bytes = send  # type: ignore[method-assign]

    machine.vmm.send_bytes = send  # type: ignore[method-assign]
    machine.start()
    machine.vmm.send_bytes = original  # type: ignore[method-assign]
    assert count > 20
    machine.echo()
    machine.close()


def test_stopped_machine(kept: Kept, running: Machine) -> None:
    """A server that ends while its machine is paused; and memory that is added and taken away."""
    bases = running.vmm.stop(2)
    kept.kill()
    for index, queue in enumerate(running.queues):
        running.vmm.start_queue(index, queue, bases[index])
        assert running.vmm.ack(Type.SET_VRING_ENABLE, VringState(index, 1)) == 0
    running.echo()
    kept.kill()
    running.echo()
    extra = Region(64 * M, M, 0x7D00_0000_0000, 0)
    for code in (Type.ADD_MEM_REG, Type.REM_MEM_REG, Type.ADD_MEM_REG):
        fds = [running.ram.fd] if code == Type.ADD_MEM_REG else []
        assert running.vmm.ack(code, extra, fds) == 0
        kept.kill()
        running.echo()
    assert running.vmm.ack(Type.ADD_MEM_REG, extra, [running.ram.fd]) == 1, "it is there"


def test_what_is_held(kept: Kept, running: Machine) -> None:
    """A machine's descriptors, each once, for as long as it is there."""
    held = kept.held()
    for _ in range(3):
        kept.kill()
        running.echo()
    assert kept.held() == held
    running.vmm.close()
    wait_until(lambda: len(kept.held()) < len(held) - 8, 5, "what the machine had is let go")
    other = Machine(kept.path)
    other.start()
    other.echo()
    wait_until(lambda: kept.held() == held, 5, "as much for the next machine")
    other.close()


def test_many_deaths(kept: Kept, running: Machine) -> None:
    """Under requests all the time: each is answered once."""
    queue = running.queues[1]
    done = threading.Event()

    def deaths() -> None:
        for _ in range(4):
            kept.kill()
        done.set()

    killer = threading.Thread(target=deaths)
    killer.start()
    count = 0
    while not done.is_set() or count < 1000:
        count += 1
        message = b"message %d" % count
        running.ram._free = 1 << 16  # the same places again
        head = queue.add([message], [len(message)])
        queue.kick()
        assert queue.take_data() == (head, message[::-1])
    killer.join()
    assert not queue.used_count
    print(f"{count} requests")


def test_a_message_that_was_not_carried_out(kept: Kept, running: Machine) -> None:
    """The server ends in the middle of it: the next one carries it out, and answers."""
    messages: list[tuple[Type, Payload | None, list[int]]] = [
        (Type.SET_VRING_ENABLE, VringState(1, 1), []),
        (Type.SET_VRING_CALL, U64(1), [running.queues[1].call_fd]),
        (Type.GET_QUEUE_NUM, None, []),
    ]
    for code, payload, fds in messages:
        kept.deadly.touch()
        running.vmm.tell(code, payload, fds)
        kept.next()
        assert not kept.deadly.exists()
        if code == Type.GET_QUEUE_NUM:
            assert running.vmm.reply(code, U64) == U64(MAX_QUEUES)
        running.echo()


def inflight(machine: Machine) -> tuple[Inflight, int]:
    """GET_INFLIGHT_FD: the layout and the memory."""
    machine.vmm.tell(Type.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64))
    layout, fd = machine.vmm.reply_with_fd(Type.GET_INFLIGHT_FD, Inflight)
    assert isinstance(layout, Inflight)
    return layout, fd


def start_tracked(machine: Machine, layout: Inflight, fd: int) -> None:
    """As cloud-hypervisor starts a device, or starts it again after it has connected anew."""
    offered = machine.vmm.negotiate()
    assert offered & Protocol.INFLIGHT_SHMFD
    machine.vmm.tell(Type.SET_INFLIGHT_FD, layout, [fd])
    machine.vmm.start(machine.ram, machine.queues, [queue.seen for queue in machine.queues])


def test_a_vmm_connects_again(machine: Machine, server: Server) -> None:
    """With the memory that it was given: the session continues, requests under way are redone."""
    machine.vmm.negotiate()
    layout, fd = inflight(machine)
    machine.vmm.tell(Type.SET_INFLIGHT_FD, layout, [fd])
    machine.vmm.start(machine.ram, machine.queues)
    machine.echo()
    queue = machine.queues[1]
    head = queue.add([b"wait"], [4])
    queue.kick()
    machine.echo()
    machine.vmm.close()
    later = queue.add([b"abc"], [3])
    machine.vmm = type(machine.vmm)(server.path)
    start_tracked(machine, layout, fd)
    assert queue.take_data() == (later, b"cba")
    answer = queue.add([b"answer"], [6])
    queue.kick()
    assert [queue.take()[0], queue.take()[0]] == [head, answer]
    (session,) = server.sessions
    assert session.again == []
    assert not session.is_closed
    # Another machine, or one that does not know of it, has a session of its own.
    machine.vmm.close()
    other = Machine(server.path)
    other.start()
    other.echo()
    wait_until(lambda: session.is_closed, 5)
    assert len(server.sessions) == 2
    other.close()
    os.close(fd)


@pytest.fixture
def machine(server: Server) -> Iterator[Machine]:
    machine = Machine(server.path)
    yield machine
    machine.close()


def test_bad_inflight(machine: Machine) -> None:
    """Memory that is too small, of another layout, or none."""
    machine.vmm.negotiate()
    small = os.memfd_create("small")
    os.ftruncate(small, 4096)
    for layout in (
        Inflight(8192, 0, 1, 64),
        Inflight(4096, 0, 64, 64),
        Inflight(1 << 63, 1 << 63, 1, 1),
    ):
        assert machine.vmm.ack(Type.SET_INFLIGHT_FD, layout, [small]) == 1
    os.pwrite(small, b"\0" * 8 + b"\7\0", 0)
    assert machine.vmm.ack(Type.SET_INFLIGHT_FD, Inflight(4096, 0, 2, 64), [small]) == 0
    for index, queue in enumerate(machine.queues):
        machine.vmm.tell(Type.SET_VRING_CALL, U64(index), [queue.call_fd])
    machine.vmm.set_memory(machine.ram)
    machine.vmm.start_queue(0, machine.queues[0])
    assert machine.vmm.ack(Type.SET_VRING_ENABLE, VringState(0, 1)) == 1
    os.close(small)


def test_no_use_in_another(tmp_path: Path) -> None:
    """A server that dies young again and again is given up, and leaves no socket."""
    kept = Kept(tmp_path / "socket")
    with kept.process as process:
        for _ in range(5):
            kept.kill()
        os.kill(kept.pid, signal.SIGKILL)
        assert process.wait(10) == signal.SIGKILL
    assert not kept.path.exists()
