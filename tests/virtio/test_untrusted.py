"""VMMs that turn against the server: with memory that goes, descriptors of other kinds, eventfds
that wait. It is their own session that ends, by one line, and the next machine is served.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fsd.virtio import eventfds
from fsd.virtio.eventfds import Reader, StuckError, Writer, is_eventfd
from fsd.virtio.mapping import is_memory, map_memory
from fsd.virtio.memory import MAPPED_LIMIT, GuestMemory, GuestMemoryError, MappedRegion
from harness.mounts import wait_until
from harness.vhost_frontend import Frontend
from protocol.vhostuser import U64, Inflight, Protocol, Region, Regions, Type, VringState

from .conftest import Server
from .test_device import M, Machine

SIZE = 1 << 20


@pytest.fixture
def running(server: Server) -> Iterator[Machine]:
    machine = Machine(server.path)
    machine.start()
    machine.echo()
    yield machine
    machine.close()


def assert_serves(server: Server) -> None:
    machine = Machine(server.path)
    machine.start()
    machine.echo()
    machine.close()


# Memory

TOUCHES: dict[str, Callable[[memoryview], object]] = {
    "a number": lambda view: view.cast("H")[9],
    "a number stored": lambda view: view.cast("H").__setitem__(9, 1),
    "a struct": lambda view: struct.unpack_from("<QIHH", view, 64),
    "structs": lambda view: list(struct.iter_unpack("<QIHH", view[:1600])),
    "a struct stored": lambda view: struct.pack_into("<II", view, 8, 1, 2),
    "bytes": lambda view: bytes(view[1:9000]),
    "parts": lambda view: b"".join([view[:10], view[5000:9000]]),
    "every other": lambda view: view[:1600].cast("Q")[::2].tobytes(),
    "bytes stored": lambda view: view.__setitem__(slice(10, 20), bytes(10)),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=list(TOUCHES))
def test_memory_that_is_cut_short_is_zeros(touch: Callable[[memoryview], object]) -> None:
    fd = os.memfd_create("ram")
    lost: list[bool] = []
    try:
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, b"\xff" * SIZE, 0)
        view = map_memory(fd, SIZE, lambda: lost.append(True))
        other = map_memory(fd, SIZE // 2, lambda: lost.append(False))
        touch(view)
        assert not lost
        os.ftruncate(fd, 4096)
        touch(view[8192:])
        assert lost == [True], "reported once, and for this mapping alone"
        assert bytes(view[8192 + 64 : 16384]) == bytes(8192 - 64)
        assert other[0] == 0xFF, "what is still there is as it was"
        os.ftruncate(fd, 0)
        assert other[0] == 0
        assert lost == [True, False]
    finally:
        os.close(fd)


_SAME_PLACE = """
import os, weakref
from fsd.virtio.mapping import map_memory

fd = os.memfd_create("ram")
os.ftruncate(fd, 1 << 20)
found, lost = [], []
view = map_memory(fd, 1 << 20, lambda: lost.append("old"))
next_one = weakref.ref(
    view.obj, lambda _: found.append(map_memory(fd, 1 << 20, lambda: lost.append("new")))
)
del view
os.ftruncate(fd, 0)
assert found[0][0] == 0
assert lost == ["new"], lost
"""


def test_memory_in_the_place_of_other_memory() -> None:
    """Mapped between the end of that and the news of it, as when a thread holds the last view."""
    subprocess.run([sys.executable, "-c", _SAME_PLACE], check=True, timeout=60)


def test_system_calls_on_memory_that_was_cut_short_fail() -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, SIZE)
        view = map_memory(fd, SIZE, lambda: None)
        os.ftruncate(fd, 0)
        with tempfile.TemporaryFile() as file, pytest.raises(OSError, match="Bad address"):
            os.pwritev(file.fileno(), [view[:100]], 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("when", ["at rest", "while one waits"])
@pytest.mark.parametrize("left", [0, M])
def test_a_vmm_that_takes_its_memory_away(
    server: Server, running: Machine, when: str, left: int
) -> None:
    queue = running.queues[1]
    if when == "while one waits":
        queue.add([b"wait"], [4])
        queue.kick()
        wait_until(lambda: server.sessions[0].waiting)
    os.ftruncate(running.ram.fd, left)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        queue.kick()
        if left:  # rings are in what is left: a request has its buffers in what is not
            os.ftruncate(running.ram.fd, 4 * M)
            queue.ram.skip_to(3 * M)
            queue.add([b"abc"], [3])
            os.ftruncate(running.ram.fd, left)
            queue.kick()
        running.vmm.socket.settimeout(0.1)
        with suppress(TimeoutError):
            assert running.vmm.is_dropped()
            break
    else:
        raise AssertionError("the session continues")
    assert_serves(server)


def test_what_is_under_way_is_noted_in_memory_that_goes(server: Server, running: Machine) -> None:
    machine = Machine(server.path)
    running.vmm.close()
    machine.vmm.negotiate()
    machine.vmm.tell(Type.SET_PROTOCOL_FEATURES, U64(Protocol.REPLY_ACK | Protocol.INFLIGHT_SHMFD))
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, M)
    assert machine.vmm.ack(Type.SET_INFLIGHT_FD, Inflight(M, 0, 2, 64), [fd]) == 0
    machine.vmm.start(machine.ram, machine.queues)
    machine.echo()
    os.ftruncate(fd, 0)
    os.close(fd)
    machine.queues[1].add([b"abc"], [3])
    machine.queues[1].kick()
    assert machine.vmm.is_dropped()
    machine.close()
    assert_serves(server)


def test_memory_of_other_kinds(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    with tempfile.TemporaryFile(dir=shared) as file:
        assert is_memory(file.fileno())
    sealed = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, 1033, 0x1 | 0x2 | 0x4)  # F_ADD_SEALS: SEAL, SHRINK, GROW, as QEMU does
    assert is_memory(sealed)
    os.close(sealed)
    with Path(__file__).open("rb") as source:
        assert not is_memory(source.fileno())
        with pytest.raises(GuestMemoryError, match="memfd"):
            MappedRegion(Region(0, 10, 0, 0), source.fileno())


def test_address_space_is_not_one_guests() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, MAPPED_LIMIT + 1)
    try:
        with pytest.raises(GuestMemoryError, match="limit"):
            MappedRegion(Region(0, MAPPED_LIMIT + 1, 0, 0), fd)
        half = MAPPED_LIMIT // 2
        regions = [MappedRegion(Region(n * half, half, n * half, 0), fd) for n in range(3)]
        with pytest.raises(GuestMemoryError, match="more than"):
            GuestMemory().replace(regions)
    finally:
        os.close(fd)


# Descriptors


def others(tmp_path: Path) -> dict[str, int]:
    """Descriptors that have no place in vhost-user."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(tmp_path / "listener"))
    listener.listen(1)
    reading, writing = os.pipe()
    os.close(writing)
    return {
        "a listening socket": listener.detach(),
        "a pipe": reading,
        "a directory": os.open(tmp_path, os.O_RDONLY),
        "a path": os.open(tmp_path, os.O_PATH),
        "a file with the name": os.open(tmp_path / "anon_inode:[eventfd]", os.O_RDWR | os.O_CREAT)
        if not is_tmpfs(tmp_path)
        else os.open("/proc/self/status", os.O_RDONLY),
    }


def is_tmpfs(path: Path) -> bool:
    with tempfile.TemporaryFile(dir=path) as file:
        return is_memory(file.fileno())


@pytest.mark.parametrize("code", [Type.SET_VRING_KICK, Type.SET_VRING_CALL, Type.SET_VRING_ERR])
def test_signals_go_to_eventfds_alone(server: Server, tmp_path: Path, code: Type) -> None:
    for what, fd in others(tmp_path).items():
        machine = Machine(server.path)
        machine.start()
        machine.vmm.tell(code, U64(1), [fd])
        os.close(fd)
        assert machine.vmm.is_dropped(), what
        machine.close()
    machine = Machine(server.path)
    machine.start()
    assert machine.vmm.ack(code, U64(1), [machine.ram.fd]) == 1, "memory"
    machine.close()
    assert_serves(server)


def test_memory_that_is_none_is_never_touched(server: Server, tmp_path: Path) -> None:
    for what, fd in others(tmp_path).items():
        vmm = Frontend(server.path)
        vmm.negotiate()
        vmm.tell(Type.SET_MEM_TABLE, Regions((Region(0, M, 0, 0),)), [fd])
        os.close(fd)
        assert vmm.is_dropped(), what
        vmm.close()
    assert_serves(server)


def test_a_file_on_tmpfs_is_memory_as_well(server: Server) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        machine = Machine(server.path)
        os.dup2(file.fileno(), machine.ram.fd)
        file.truncate(len(machine.ram.bytes))
        machine.ram.bytes.close()
        machine.ram.bytes = mmap.mmap(file.fileno(), 0)
        machine.start()
        machine.echo()
        machine.close()


# Eventfds


def fill(fd: int) -> None:
    """Full, and whoever writes there waits."""
    with suppress(BlockingIOError):
        os.eventfd_write(fd, 0xFFFF_FFFF_FFFF_FFFE)
    with suppress(BlockingIOError):
        os.set_blocking(fd, False)
        while True:
            os.eventfd_write(fd, 1)
    os.set_blocking(fd, True)


@pytest.mark.parametrize("how", ["answer", "late answer", "err"])
def test_a_signal_that_waits(server: Server, running: Machine, how: str) -> None:
    queue = running.queues[1]
    if how == "late answer":
        queue.add([b"wait"], [4])
        queue.kick()
        wait_until(lambda: server.sessions[0].waiting)
        queue = running.queues[0]
        fill(running.queues[1].call_fd)
        queue.add([b"answer"], [6])
    elif how == "err":
        fill(queue.err_fd)
        queue.make_available(queue.size)  # no such descriptor: the queue is broken
    else:
        fill(queue.call_fd)
        queue.add([b"abc"], [3])
    queue.kick()
    assert running.vmm.is_dropped()
    assert_serves(server)


def test_a_write_that_waits_is_interrupted() -> None:
    writer = Writer()
    full, free = os.eventfd(0), os.eventfd(0)
    fill(full)
    try:
        for _ in range(3):
            writer.signal(free)
            begun = time.monotonic()
            stuck = os.dup(full)
            with pytest.raises(StuckError):
                writer.signal(stuck)
            assert time.monotonic() - begun < 5
            assert not is_eventfd(stuck), "the file behind the number is another now"
            os.close(stuck)
        assert os.eventfd_read(free) == 3
        assert is_eventfd(full)
        os.set_blocking(full, False)
        writer.signal(full)  # it does not wait: nothing is wrong
    finally:
        os.close(full)
        os.close(free)


def test_a_write_whose_thread_has_no_processor_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for no VMM: nothing is wrong with the eventfd."""
    real = os.write

    def write(fd: int, data: bytes) -> int:
        time.sleep(10 * eventfds.TICK)
        return real(fd, data)

    writer, free = Writer(), os.eventfd(0)
    monkeypatch.setattr(os, "write", write)
    try:
        for _ in range(3):
            writer.signal(free)
        assert os.eventfd_read(free) == 3
    finally:
        os.close(free)


def test_a_kick_that_somebody_else_reads() -> None:
    """The VMM has read it between our waking up and our reading, and made reads wait."""
    fd = os.eventfd(0)
    done = threading.Event()

    def drain() -> None:
        Reader().drain(fd)
        done.set()

    threading.Thread(target=drain, daemon=True).start()
    assert done.wait(10)
    os.close(fd)


def test_a_kick_that_never_ends(server: Server, running: Machine) -> None:
    queue = running.queues[1]
    kick = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    os.eventfd_write(kick, 1 << 60)
    assert running.vmm.stop(2)[1]
    os.dup2(kick, queue.kick_fd)
    os.close(kick)
    running.vmm.start_queue(1, queue, 1)
    assert running.vmm.ack(Type.SET_VRING_ENABLE, VringState(1, 1)) == 0
    running.echo()
    time.sleep(0.2)  # of which it uses next to nothing
    begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.5)
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    assert cpu < (time.monotonic() - begun) / 3
    running.echo()


@pytest.mark.slow
def test_a_vmm_that_does_so_again_and_again_has_to_wait(server: Server) -> None:
    begun = time.monotonic()
    for _ in range(5):
        machine = Machine(server.path)
        machine.start()
        machine.echo()
        fill(machine.queues[1].call_fd)
        machine.queues[1].add([b"abc"], [3])
        machine.queues[1].kick()
        assert machine.vmm.is_dropped()
        machine.close()
    assert time.monotonic() - begun > 0.1 + 0.3 + 0.7
    assert_serves(server)
