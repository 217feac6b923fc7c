"""What is fuzzed: a function of bytes for each surface. It raises where a promise is broken.

A guest reaches the session and the virtqueue walker, a VMM the vhost-user parser and the device.
Bytes are read as a script of requests of which most are nearly right: random bytes alone would
seldom come behind the first check.
"""

from __future__ import annotations

import os
import resource
import struct
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from fsd.virtio.device import Device, DeviceError
from fsd.virtio.memory import GuestMemory, MappedRegion
from fsd.virtio.queue import MAX_CHAIN, ChainError, QueueError, VirtQueue
from protocol.vhostuser import NO_FD, Region, RequestReader, VhostUserError
from tests.core.hostile import (
    BAD_NAMES,
    FILE_SIZE,
    GOOD_NAMES,
    NAME_COUNT,
    NUMBERS,
    OPCODES,
    Bent,
    Target,
)
from tests.virtio.test_any_messages import Answering

_T = TypeVar("_T")
K = 4096


class Script:
    """Bytes as choices; zeros behind their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """The next bytes, or what is left."""
        part = self._data[self._at : self._at + size]
        self._at += size
        return part

    def byte(self) -> int:
        return self.number(1)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[self.byte() % len(choices)]

    def some(self) -> int:
        """A number: mostly one that means something."""
        choice = self.byte()
        if choice < 0x80:
            return choice & 7
        return NUMBERS[choice % len(NUMBERS)] if choice < 0xF0 else self.number(8)


# The FUSE session

_NAMES = (*GOOD_NAMES, *BAD_NAMES)
_ROOMS = (8192, 16, 0, 17, 160, 70_000)
_MESSAGES = 40


@cache
def _target() -> Target:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, hard))
    os.umask(0o022)
    return Target(Path(tempfile.mkdtemp(prefix="fsd-fuzz-")))  # whoever starts this removes it


def session(data: bytes) -> None:
    """A guest's requests: each answered once at most, nothing beside the export read or changed,
    nothing held at the end.
    """
    target = _target()
    target.refill()
    script = Script(data)
    for _ in range(_MESSAGES):
        if not script:
            break
        how = script.byte()
        cut = [script.byte()] if how & 0x10 else []
        room = script.pick(_ROOMS) if how & 0x20 else 8192
        message = script.take(script.byte()) if how >= 0xF0 else _bent(script, how).message(target)
        target.serve(message, room, cut)
    target.check()
    target.leave()
    assert not target.world.export.counts["faults"]


def _bent(script: Script, how: int) -> Bent:
    opcode = script.pick(OPCODES)
    node, handle = script.byte() % 9, script.byte() % 10 - 1
    numbers = [script.some() for _ in range(how & 7)]
    numbers += [0] * (16 - len(numbers))
    names = b"".join(script.pick(_NAMES) + b"\0" for _ in range(NAME_COUNT.get(opcode, 0)))
    rest = script.take(script.byte()) if how & 0x08 else b""
    lie = script.byte() - 128 if how & 0x40 else 0
    extensions = script.byte() if how & 0x80 else 0
    return Bent(opcode, node, handle, numbers, names + rest, lie, extensions, 0)


# The virtqueue walker

_SIZE = 16
_ADDRESSES = (0x500000, 2**64 - 2, 0x11FFF, 0x12000, 0, 0x411FF0)
_TABLE = 0x11FF0  # of an indirect descriptor: across the regions


class _Memory:
    """A guest's memory of two regions that are neighbours for the guest only."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 0x412000)
        regions = (
            Region(0, 0x12000, 0x100000, 0),
            Region(0x12000, 0x400000, 0x900000, 0x12000),
        )
        self.memory = GuestMemory()
        self.memory.replace([MappedRegion(region, self.fd) for region in regions])


@cache
def _memory() -> _Memory:
    return _Memory()


def _descriptor(script: Script) -> bytes:
    how, address, length = script.byte(), script.number(2), script.number(2)
    flags, following = how & 7, script.byte() % (_SIZE + 1)
    if how & 0x08:
        address = _ADDRESSES[address % len(_ADDRESSES)]
    if how & 0x10:
        length = (0xFFFFFFFF, 0x400000, 16 * MAX_CHAIN, 16 * MAX_CHAIN + 16)[length % 4]
    if flags & 4 and not how & 0x20:
        address, length = _TABLE, 16 * (length % 8)
    return struct.pack("<QIHH", address, length, flags, following)


def queue(data: bytes) -> None:
    """A ring with anything in it: requests whose views are the guest's memory, or one of two
    errors; and each entry is taken once.
    """
    ram, script = _memory(), Script(data)
    desc, avail, used = 0x1000, 0x2000, 0x3000
    shift, claimed = script.byte(), script.byte()
    heads = [script.byte() % (_SIZE + 1) for _ in range(claimed % (_SIZE + 2))]
    inner = b"".join(_descriptor(script) for _ in range(8))
    outer = b"".join(_descriptor(script) for _ in range(_SIZE))
    for place, content in (
        (desc, outer),
        (_TABLE, inner),
        (avail, struct.pack(f"<2H{len(heads)}H", 0, len(heads), *heads).ljust(4 + 2 * _SIZE)),
    ):
        os.pwrite(ram.fd, content, place)
    if shift & 0x80:
        os.pwrite(ram.fd, script.take(200), (desc, avail)[shift & 1] + (shift >> 1 & 0x1F))
    user = 0x100000
    device = VirtQueue(ram.memory, _SIZE, user + desc, user + avail, user + used, 0)
    for _ in range(0x10000):
        try:
            chain = device.pop()
        except ChainError as error:
            device.push(error.head, 0)
            continue
        except QueueError:
            return
        if chain is None:
            return
        assert 0 <= chain.head < _SIZE
        assert len(chain.readable) + len(chain.writable) <= 2 * MAX_CHAIN
        for view in (*chain.readable, *chain.writable):
            assert 0 < len(view) <= 0x400000
        device.push(chain.head, 0)
    raise AssertionError("a ring without an end")


# vhost-user


def vhostuser(data: bytes) -> None:
    """A VMM's bytes, cut anywhere: requests done or refused, one of two errors, and no descriptor
    is left.
    """
    before = len(os.listdir("/proc/self/fd"))
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(ram, 1 << 16)
    os.pwrite(ram, b"".join(struct.pack("<QIHH", 4096, 8, n & 3, 0) for n in range(16)), 0)
    os.pwrite(ram, struct.pack("<HH8H", 0, 8, *range(8)), 512)
    running: set[int] = set()
    device = Device(
        Answering, on_start=running.add, on_stop=running.remove, tag="t", request_queues=1
    )
    reader = RequestReader()
    try:
        _converse(Script(data), reader, device, ram, running)
    except (VhostUserError, DeviceError):
        pass
    finally:
        for fd in reader.take_fds():
            os.close(fd)
        device.close()
        os.close(ram)
    assert not running
    del device
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left"


def _converse(
    script: Script, reader: RequestReader, device: Device, ram: int, running: set[int]
) -> None:
    while script:
        how = script.byte()
        if how & 0x80:  # bytes as they are
            stream = script.take(how & 0x7F)
        else:
            code, payload = script.byte() % 45, _payload(script, how & 7)
            flags, lie = 1 | how & 8, script.byte() if how & 0x40 else 0
            stream = struct.pack("<III", code, flags, len(payload) + lie) + payload
        kinds = script.byte() if how & 0x30 else 0
        count = kinds & 7 if kinds < 0xF0 else 9
        fds = tuple(os.dup(ram) if kinds & 8 else os.eventfd(0) for _ in range(count))
        while stream:
            size = min(reader.wanted, len(stream), 7 if how & 0x10 else 1 << 12)
            part, stream = stream[:size], stream[size:]
            request = reader.receive(part, fds)
            fds = ()
            if request is not None:
                device.handle(request)
                for index in list(running):
                    assert device.rings[index].kick >= 0
                    device.process(index, 20)
        for fd in fds:
            os.close(fd)


_USER = 0x7000_0000


def _payload(script: Script, kind: int) -> bytes:
    """A payload, by its shape."""

    def small() -> int:
        return script.byte() & 0x1F

    def place() -> int:
        return _USER + 64 * script.byte()

    if kind == 1:
        return struct.pack("<Q", script.some() & 2**64 - 1)
    if kind == 2:
        return struct.pack("<II", small(), small())
    if kind == 3:
        return struct.pack("<IIQQQQ", small(), 0, place(), place(), place(), 0)
    if kind == 4:
        return struct.pack("<IIQQQQ", 1, 0, 0, 1 << 16, _USER, 0)
    if kind == 5:
        numbers = [script.some() & 2**64 - 1 for _ in range(4)]
        return struct.pack("<QQQQQ", 0, *numbers)
    if kind == 6:
        return struct.pack("<Q", small() | (NO_FD if script.byte() & 1 else 0))
    return script.take(script.byte()) if kind == 7 else b""


TARGETS: dict[str, Callable[[bytes], None]] = {
    "session": session,
    "queue": queue,
    "vhostuser": vhostuser,
}
