"""What a hostile guest does with the hidden directory: channels, frames, and what is no frame."""

from __future__ import annotations

import os
import struct

from protocol import frames, fuse
from protocol.fuse import Opcode

from .guest import Guest
from .machine import entry
from .operations import operation

FILES = (b"control", b"session", b"session", b"status", b"checkpoint", b"staging", b"alias")
CHANNELS = 60
"""Channels that the guest keeps open."""


@operation(1.5)
def open_channel(guest: Guest) -> None:
    """Look `.fsd` and a file of it up, open that, and mostly say Hello."""
    name = guest.rng.choice(FILES)
    flags = guest.rng.choice((os.O_RDWR, os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY))

    def found_directory(error: int, payload: bytes) -> None:
        if not error and len(payload) >= fuse.ENTRY_SIZE:
            guest.operation = "open_channel"
            guest.send(Opcode.LOOKUP, entry(payload)[0], name + b"\0", found)

    def found(error: int, payload: bytes) -> None:
        if not error and len(payload) >= fuse.ENTRY_SIZE:
            nodeid = entry(payload)[0]
            directory = name in (b"staging", b"alias")
            opcode = Opcode.OPENDIR if directory else Opcode.OPEN
            guest.operation = f"open_{name.decode()}"
            guest.send(
                opcode, nodeid, fuse.OPEN_IN.pack(flags, 0), lambda e, p: opened(nodeid, e, p)
            )

    def opened(nodeid: int, error: int, payload: bytes) -> None:
        if error or len(payload) < fuse.OPEN_OUT.size:
            return
        fh = fuse.OPEN_OUT.unpack(payload)[0]
        guest.channels.append((nodeid, fh))
        if guest.rng.random() < 0.9:
            role = 1 if name == b"control" else guest.rng.choice((2, 2, 3, 9))
            _write(guest, nodeid, fh, frames.encode(frames.Hello(1, role, 0xFFF)))
        if len(guest.channels) > CHANNELS:
            _close(guest, 0)

    guest.send(Opcode.LOOKUP, 1, b".fsd\0", found_directory)


def _write(guest: Guest, nodeid: int, fh: int, data: bytes) -> None:
    guest.send(Opcode.WRITE, nodeid, fuse.WRITE_IN.pack(fh, 0, len(data), 0, 0, 0) + data)


def _close(guest: Guest, index: int) -> None:
    nodeid, fh = guest.channels.pop(index)
    guest.send(Opcode.RELEASE, nodeid, fuse.RELEASE_IN.pack(fh, 0, 0, 0))


def _channel(guest: Guest) -> tuple[int, int] | None:
    return guest.rng.choice(guest.channels) if guest.channels else None


@operation(1)
def close_channel(guest: Guest) -> None:
    if guest.channels:
        _close(guest, guest.rng.randrange(len(guest.channels)))


def _frame(guest: Guest) -> bytes:
    rng = guest.rng
    request = rng.choice((0, 1, 7, 0xFFFF_FFFF))
    nodeid = rng.choice((guest.directory(), guest.node(), 0))
    mask = rng.choice((0, 0xFFF, 0x100, 0x3C0, rng.getrandbits(64)))
    generation = rng.choice((0, 1, 1, guest.number()))
    path = b"/".join(guest.some_name() for _ in range(rng.randrange(6)))
    message: frames.Message = rng.choice(
        (
            frames.Hello(1, rng.randrange(4), 0xFFF),
            frames.Update(request, nodeid, generation, mask),
            frames.Update(request, nodeid, generation, mask),
            frames.Update(0, nodeid, generation, mask),
            frames.ScanEnd(guest.number(), rng.randrange(2)),
            frames.Resolve(request, path),
            frames.Resolve(request, b"d/" * rng.choice((1, 100, 2000))),
            frames.List(request, nodeid, generation),
            frames.StatsRequest(request),
            frames.Ack(rng.randrange(2000), rng.choice((0, 2, 5, 0xFFFF_FFFF))),
            frames.Keep(request, guest.number(), rng.randbytes(rng.choice((0, 16, 200)))),
            frames.Bye(),
            frames.Order(1, 1, 0, 1, 1, 1, 1, 0, b"../x", b"", b"", b""),
        )
    )
    return frames.encode(message)


@operation(6)
def write_frames(guest: Guest) -> None:
    """One frame or a few, sometimes cut."""
    channel = _channel(guest)
    if channel is None:
        return
    data = b"".join(_frame(guest) for _ in range(guest.rng.randrange(1, 6)))
    if guest.rng.random() < 0.1:
        data = data[: guest.rng.randrange(len(data))]
    _write(guest, *channel, data[:200_000])


@operation(0.3)
def write_very_many_frames(guest: Guest) -> None:
    """As many of one kind as a write holds."""
    channel = _channel(guest)
    if channel is None:
        return
    frame = _frame(guest)
    _write(guest, *channel, frame * (guest.rng.choice((20_000, 290_000)) // len(frame)))


@operation(0.5)
def write_garbage(guest: Guest) -> None:
    channel = _channel(guest)
    if channel is None:
        return
    length = guest.rng.choice((0, 7, 8, 65536, 65537, 0xFFFF_FFFF))
    noise = guest.rng.randbytes(guest.rng.randrange(100))
    _write(guest, *channel, struct.pack("<IHH", length, guest.rng.randrange(30), 0) + noise)


@operation(6)
def read_channel(guest: Guest) -> None:
    """By any size. It waits where there is nothing, for as long as the server lets it."""
    channel = _channel(guest)
    if channel is None or len(guest.waiting) > 8:
        return
    nodeid, fh = channel
    size = guest.rng.choice((0, 1, 1, 7, 100, 4096, 65536, 0xFFFF_FFFF))
    body = fuse.READ_IN.pack(fh, guest.rng.choice((0, guest.number())), size, 0, 0, 0)
    guest.send(Opcode.READ, nodeid, body, room=size + 16, waits=True)


@operation(2)
def poll_channel(guest: Guest) -> None:
    channel = _channel(guest)
    if channel is not None:
        nodeid, fh = channel
        body = fuse.POLL_IN.pack(fh, guest.number(), guest.rng.choice((0, 1)), 1)
        guest.send(Opcode.POLL, nodeid, body)


@operation(1)
def change_hidden(guest: Guest) -> None:
    """Make, remove or rename in `.fsd` and its directories, which nobody may."""
    nodeid = guest.rng.choice((frames.FSD_DIR, frames.STAGING, frames.ALIAS, frames.CONTROL))
    name = guest.some_name() + b"\0"
    opcode, body = guest.rng.choice(
        (
            (Opcode.UNLINK, b"control\0"),
            (Opcode.MKDIR, fuse.MKDIR_IN.pack(0o755, 0) + name),
            (Opcode.RENAME, fuse.RENAME_IN.pack(guest.directory()) + b"control\0" + name),
            (Opcode.LOOKUP, b"%d\0" % guest.node()),
            (Opcode.LOOKUP, name),
            (Opcode.READDIR, fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0)),
        )
    )
    guest.send(opcode, nodeid, body)
