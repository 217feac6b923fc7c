"""The device as a VMM and a guest's driver see it: over a real socket, with real eventfds."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsd.transports.unix import listen
from fsd.virtio.device import MAX_QUEUES
from harness.mounts import wait_until
from harness.vhost_frontend import Frontend, Queue, Ram
from protocol.vhostuser import (
    NO_FD,
    U64,
    Config,
    Empty,
    Payload,
    Protocol,
    Region,
    Type,
    VringState,
    encode_request,
)

from .conftest import Server, served

M = 1 << 20


class Machine:
    """A VMM with two queues (FORGET and requests), its guest ready."""

    def __init__(self, path: Path) -> None:
        # As a machine of 4 GiB on q35: two regions, apart for the VMM.
        self.ram = Ram((0, 2 * M, 0x7F00_0000_0000), (2 * M, 2 * M, 0x7E00_0000_0000))
        self.queues = [Queue(self.ram), Queue(self.ram)]
        self.vmm = Frontend(path)

    def start(self) -> None:
        """Negotiate and run."""
        self.vmm.negotiate()
        self.vmm.start(self.ram, self.queues)

    def close(self) -> None:
        self.vmm.close()
        for queue in self.queues:
            queue.close()
        self.ram.close()

    def echo(self, message: bytes = b"abc", queue: int = 1, **options: bool) -> None:
        """One request and its answer."""
        head = self.queues[queue].add([message], [len(message)], **options)
        self.queues[queue].kick()
        assert self.queues[queue].take_data() == (head, message[::-1])


@pytest.fixture
def machine(server: Server) -> Iterator[Machine]:
    machine = Machine(server.path)
    yield machine
    machine.close()


@pytest.fixture
def running(machine: Machine) -> Machine:
    machine.start()
    return machine


def test_requests(running: Machine, server: Server) -> None:
    running.echo()
    running.echo(b"indirect", indirect=True)
    running.echo(b"other queue", queue=0)
    assert [session.sizes for session in server.sessions] == [[(3, 3), (8, 8), (11, 11)]]


def test_a_buffer_over_two_regions(running: Machine) -> None:
    running.ram.skip_to(2 * M - 10)
    running.echo(bytes(range(200)))
    ram, queue = running.ram, running.queues[1]
    ram.bytes[2 * M - 2 : 2 * M + 2] = b"1234"
    queue.add_buffers([(2 * M - 2, 4, 0), (2 * M - 2, 4, 2)])
    queue.kick()
    assert queue.take_data()[1] == b"4321"


def test_many_at_once(running: Machine) -> None:
    queue = running.queues[1]
    sent = {queue.add([f"message {n}".encode()], [20]): f"message {n}".encode() for n in range(32)}
    queue.kick()  # one for all
    for _ in range(32):
        head, data = queue.take_data()
        assert data == sent.pop(head)[::-1]
    assert not sent


def test_answers_out_of_order(running: Machine) -> None:
    queue = running.queues[1]
    wait, later, now = (queue.add([m], [9]) for m in (b"wait", b"later", b"now"))
    queue.kick()
    assert queue.take_data() == (now, b"won")
    assert queue.take_data() == (later, b"retal")
    answer = queue.add([b"answer"], [6])
    queue.kick()
    assert {queue.take()[0], queue.take()[0]} == {wait, answer}
    running.echo(b"thread")


def test_no_reply_and_faults(running: Machine) -> None:
    queue = running.queues[1]
    for message in (b"silent", b"raise"):
        head = queue.add([message], [10])
        queue.kick()
        assert queue.take() == (head, 0)
    running.echo(b"twice")
    running.echo()
    assert not queue.used_count, "an answer came twice"


def test_requests_before_the_queue_runs(machine: Machine) -> None:
    """The kick came, and was read by nobody, before the queue was enabled."""
    queue = machine.queues[1]
    head = queue.add([b"early"], [5])
    queue.kick()
    os.eventfd_read(queue.kick_fd)
    machine.start()
    assert queue.take_data() == (head, b"ylrae")


def test_messages_in_parts(running: Machine) -> None:
    """No front-end sends one so, but the protocol does not forbid it."""
    vmm, queue = running.vmm, running.queues[1]
    for byte in encode_request(Type.GET_QUEUE_NUM, Empty()):
        vmm.send_bytes(bytes([byte]))
    assert vmm.reply(Type.GET_QUEUE_NUM, U64) == U64(MAX_QUEUES)
    message = encode_request(Type.SET_VRING_CALL, U64(1))
    vmm.send_bytes(message[:12], [queue.call_fd])
    vmm.send_bytes(message[12:] + encode_request(Type.GET_QUEUE_NUM, Empty()))
    assert vmm.reply(Type.GET_QUEUE_NUM, U64) == U64(MAX_QUEUES)
    running.echo()


def test_each_message_has_its_own_descriptors(running: Machine) -> None:
    """Of several that wait at once: the kernel shows later ones' with an earlier message."""
    vmm, queue = running.vmm, running.queues[1]
    for _ in range(50):
        vmm.tell(Type.SET_VRING_ENABLE, VringState(1, 1))
        vmm.tell(Type.SET_VRING_CALL, U64(1), [queue.call_fd])
        vmm.tell(Type.SET_VRING_ERR, U64(1 | NO_FD))
        vmm.tell(Type.SET_VRING_ERR, U64(1), [queue.err_fd])
    assert vmm.number(Type.GET_QUEUE_NUM) == MAX_QUEUES
    running.echo()


@pytest.mark.parametrize(
    ("code", "payload"), [(Type.GET_FEATURES, Empty()), (Type.SET_VRING_CALL, U64(1 | NO_FD))]
)
def test_a_descriptor_that_no_message_wants(machine: Machine, code: Type, payload: Payload) -> None:
    machine.vmm.send_bytes(encode_request(code, payload), [machine.queues[1].call_fd])
    assert machine.vmm.is_dropped()


def test_a_vmm_that_reads_no_answers_is_dropped(machine: Machine) -> None:
    machine.vmm.socket.settimeout(20)

    def ask() -> None:
        while True:
            machine.vmm.tell(Type.GET_FEATURES)

    with pytest.raises(ConnectionError):
        ask()


def test_stop_and_continue(running: Machine, server: Server) -> None:
    """A machine that is paused: requests under way are answered when it continues."""
    queue = running.queues[1]
    running.echo()
    waiting = queue.add([b"wait"], [4])
    queue.kick()
    wait_until(lambda: server.sessions[0].waiting)
    bases = running.vmm.stop(2)
    assert bases == [0, 2]
    late = queue.add([b"late"], [4])  # nobody takes it now
    queue.kick()
    assert not queue.used_count
    server.sessions[0].waiting[0]()  # answered while it is stopped
    assert not queue.used_count
    running.vmm.start(running.ram, running.queues, bases)
    assert sorted([queue.take_data(), queue.take_data()]) == sorted(
        [(waiting, b"tiaw"), (late, b"etal")]
    )
    assert len(server.sessions) == 1
    assert not server.sessions[0].is_closed


def test_a_machine_is_reset(running: Machine, server: Server) -> None:
    """Its queues begin anew: what was under way is dropped, and the session is another."""
    queue = running.queues[1]
    queue.add([b"wait"], [4])
    queue.kick()
    wait_until(lambda: server.sessions and server.sessions[0].waiting)
    running.vmm.stop(2)
    running.ram.bytes[:] = bytes(len(running.ram.bytes))
    running.vmm.start(running.ram, running.queues)
    assert server.sessions[0].is_closed
    server.sessions[0].waiting[0]()
    assert not any(running.ram.bytes[:]), "a late answer was written to memory of another use"
    fresh = Queue(running.ram)  # the driver knows nothing of before either
    running.queues[1].close()
    running.queues[1] = fresh
    running.vmm.stop(2)
    running.vmm.start(running.ram, running.queues)
    running.echo()
    assert fresh.used_count == 0
    assert len(server.sessions) == 2


@pytest.mark.parametrize("how", ["status", "message"])
def test_reset_by_name(running: Machine, server: Server, how: str) -> None:
    running.echo()
    vmm = running.vmm
    assert vmm.ack(Type.SET_STATUS, U64(15)) == 0
    assert vmm.number(Type.GET_STATUS) == 15
    if how == "status":
        assert vmm.ack(Type.SET_STATUS, U64(0)) == 0
        assert vmm.number(Type.GET_STATUS) == 0
    else:
        assert vmm.ack(Type.RESET_DEVICE) == 0
    assert server.sessions[0].is_closed
    running.queues[1].add([b"x"], [1])
    running.queues[1].kick()
    assert vmm.ask(Type.GET_VRING_BASE, VringState(1, 0), VringState) == VringState(1, 0)
    assert not running.queues[1].used_count


def test_memory_comes_and_goes(running: Machine) -> None:
    vmm, queue = running.vmm, running.queues[1]
    more = Ram((64 * M, M, 0x7D00_0000_0000))
    more.bytes[:5] = b"added"
    region = more.regions[0]

    def read_added() -> tuple[int, int]:
        head = queue.add([b"x"], [5])
        queue.put_desc(head, region.guest_addr, 5, 1, queue._chains[head][1])
        queue.kick()
        return queue.take()

    assert vmm.number(Type.GET_MAX_MEM_SLOTS) >= 8
    assert read_added()[1] == 0
    assert vmm.ack(Type.ADD_MEM_REG, region, [more.fd]) == 0
    assert read_added()[1] == 5
    assert vmm.ack(Type.ADD_MEM_REG, region, [more.fd]) == 1, "it is there already"
    assert vmm.ack(Type.REM_MEM_REG, region._replace(mmap_offset=99)) == 0
    assert vmm.ack(Type.REM_MEM_REG, region) == 1
    assert read_added()[1] == 0
    vmm.set_memory(running.ram)  # all at once, while queues run
    running.echo()
    more.close()


def test_memory_of_a_running_queue_goes(running: Machine) -> None:
    """The queue stops, the VMM is notified, and may start it anew."""
    running.echo()
    queue = running.queues[1]
    assert running.vmm.ack(Type.REM_MEM_REG, running.ram.regions[0]) == 0
    assert os.eventfd_read(queue.err_fd) == 1
    assert running.vmm.stop(2) == [0, 1]
    running.vmm.start(running.ram, running.queues, [0, 1])
    running.echo()


def test_a_broken_queue_costs_itself(running: Machine) -> None:
    broken, other = running.queues
    broken.make_available(broken.size + 1)
    broken.kick()
    wait_until(lambda: _signalled(broken.err_fd))
    broken.add([b"abc"], [3])
    broken.kick()
    running.echo()
    assert not broken.used_count
    assert other.used_count == 0


def _signalled(eventfd: int) -> bool:
    try:
        return os.eventfd_read(eventfd) > 0
    except BlockingIOError:
        return False


def test_a_bad_chain_costs_itself(running: Machine) -> None:
    queue = running.queues[1]
    queue.put_desc(40, 0x1000, 4, 1, 40)
    queue.make_available(40)
    queue.kick()
    assert queue.take() == (40, 0)
    running.echo()


def test_a_descriptor_that_is_in_use(running: Machine, server: Server) -> None:
    queue = running.queues[1]
    head = queue.add([b"wait"], [4])
    queue.make_available(head)
    queue.kick()
    wait_until(lambda: _signalled(queue.err_fd))
    running.echo(queue=0)


def test_the_call_changes(running: Machine) -> None:
    """QEMU sends other eventfds while queues run; the old ones are closed, none is missed."""
    queue = running.queues[1]
    other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    assert running.vmm.ack(Type.SET_VRING_CALL, U64(1), [other]) == 0
    assert os.eventfd_read(other) == 1, "what the old one got may not have been seen"
    os.close(queue.call_fd)
    queue.call_fd = other
    running.echo()
    assert running.vmm.ack(Type.SET_VRING_CALL, U64(1 | NO_FD)) == 0
    _signalled(other)  # the last answer may have been seen without
    queue.add([b"quiet"], [5])
    queue.kick()
    wait_until(lambda: queue.used_count)
    assert not _signalled(other)


def test_the_kick_changes(running: Machine) -> None:
    queue = running.queues[1]
    other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    assert running.vmm.ack(Type.SET_VRING_KICK, U64(1), [other]) == 0
    os.close(queue.kick_fd)
    queue.kick_fd = other
    running.echo()
    running.echo()


def test_the_next_vmm(running: Machine, server: Server) -> None:
    """A VMM that has ended, however it did, makes room for the next."""
    running.echo()
    running.vmm.close()
    again = Machine(server.path)
    again.start()
    again.echo()
    again.vmm.close()
    again.close()
    running.vmm = Frontend(server.path)
    running.vmm.send_bytes(b"\x01\0\0")  # and dies in the middle of a message
    running.vmm.close()
    third = Machine(server.path)
    third.start()
    third.echo()
    third.close()
    assert len(server.sessions) == 3
    wait_until(lambda: all(session.is_closed for session in server.sessions))


def test_configuration(tmp_path: Path) -> None:
    """For VMMs that ask the device for its tag."""
    with served(tmp_path / "socket", tag="share") as server:
        vmm = Frontend(server.path)
        assert vmm.negotiate() & Protocol.CONFIG
        answer = vmm.ask(Type.GET_CONFIG, Config(0, 44, 0, bytes(44)), Config)
        assert isinstance(answer, Config)
        tag, queues, _ = struct.unpack("<36sII", answer.data)
        assert (tag.rstrip(b"\0"), queues) == (b"share", 1)
        part = vmm.ask(Type.GET_CONFIG, Config(2, 3, 0, bytes(3)), Config)
        assert part == Config(2, 3, 0, b"are")
        vmm.close()


def test_what_is_offered(machine: Machine) -> None:
    offered = machine.vmm.negotiate()
    wanted = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIGURE_MEM_SLOTS | Protocol.STATUS
    assert offered & wanted == wanted
    assert not offered & (Protocol.LOG_SHMFD | Protocol.CONFIG)
    assert machine.vmm.number(Type.GET_QUEUE_NUM) == MAX_QUEUES
    assert machine.vmm.ack(Type.SET_LOG_BASE) != 0
    machine.vmm.tell(Type.SET_LOG_BASE)  # without an answer it is passed over
    machine.vmm.start(machine.ram, machine.queues)
    machine.echo()


REFUSED: list[tuple[str, Callable[[Machine], int]]] = [
    ("features", lambda m: m.vmm.ack(Type.SET_FEATURES, U64(1 << 26))),
    ("protocol", lambda m: m.vmm.ack(Type.SET_PROTOCOL_FEATURES, U64(Protocol.LOG_SHMFD))),
    ("queue", lambda m: m.vmm.ack(Type.SET_VRING_NUM, VringState(MAX_QUEUES, 64))),
    ("kick", lambda m: m.vmm.ack(Type.SET_VRING_KICK, U64(MAX_QUEUES), [m.ram.fd])),
    ("polling", lambda m: m.vmm.ack(Type.SET_VRING_KICK, U64(1 | NO_FD))),
    ("size", lambda m: m.vmm.ack(Type.SET_VRING_NUM, VringState(5, 100))),
    ("base", lambda m: m.vmm.ack(Type.SET_VRING_BASE, VringState(5, 1 << 16))),
    ("running", lambda m: m.vmm.ack(Type.SET_VRING_NUM, VringState(1, 64))),
    ("region", lambda m: m.vmm.ack(Type.ADD_MEM_REG, Region(1 << 40, M, 0, 64 * M), [m.ram.fd])),
]


@pytest.mark.parametrize("ask", [ask for _, ask in REFUSED], ids=[name for name, _ in REFUSED])
def test_what_makes_no_sense_is_refused(running: Machine, ask: Callable[[Machine], int]) -> None:
    assert ask(running) == 1
    running.echo()


def test_a_vmm_that_does_not_ask_is_dropped(running: Machine, server: Server) -> None:
    running.vmm.tell(Type.SET_FEATURES, U64(1 << 26))
    assert running.vmm.is_dropped()
    again = Machine(server.path)
    again.start()
    again.echo()
    again.close()


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 12, struct.pack("=3I", 1, 1, 1 << 30), struct.pack("=3IB", 2, 1, 1, 0)],
    ids=["noise", "length", "payload"],
)
def test_a_vmm_that_sends_nonsense_is_dropped(
    server: Server, machine: Machine, data: bytes
) -> None:
    machine.vmm.send_bytes(data, [machine.ram.fd])
    assert machine.vmm.is_dropped()
    again = Machine(server.path)
    again.start()
    again.echo()
    again.close()


def test_a_kick_that_cannot_be_waited_for(running: Machine, server: Server, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        running.vmm.tell(Type.SET_VRING_KICK, U64(1), [file.fileno()])
    assert running.vmm.is_dropped()
    again = Machine(server.path)
    again.start()
    again.echo()
    again.close()


def test_queues_without_protocol_features(machine: Machine) -> None:
    """Nothing enables them: they run once they have a kick."""
    vmm = machine.vmm
    vmm.tell(Type.SET_FEATURES, U64(1 << 32))
    vmm.set_memory(machine.ram)
    queue = machine.queues[1]
    vmm.tell(Type.SET_VRING_CALL, U64(1), [queue.call_fd])
    vmm.start_queue(1, queue)
    machine.echo()


def test_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen(os.fspath(path)) as first:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="in use"):
            listen(os.fspath(path))
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    with listen(os.fspath(path), group="nogroup"):  # the one before has gone, its file has not
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert status.st_gid == 65534
    with pytest.raises(LookupError):
        listen(os.fspath(tmp_path / "other"), group="no such group")
