"""fsd's own messages: versioned, length-framed, sans-IO. docs/protocol.md is the specification.

A frame is {u32 length of the whole frame, u16 type, u16 zero} and a body: the fixed fields of the
message, then each bytes field as {u16 length, bytes}. Everything is little-endian. The same frames
run over `.fsd/control` in a mount, over `.fsd/session`, and over the server's Unix socket.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple, Union

VERSION = 1
MAX_FRAME = 64 * 1024
"""Longest accepted frame: two paths of PATH_MAX, two names, and some room. Statistics come in
parts."""

ROOT = 1
"""The root of the mount, FUSE_ROOT_ID."""
# Nodes that exist only in the mount. Above 2**63, where no host inode number is used.
FSD_DIR = 1 << 63 | 1  # .fsd itself
CONTROL = 1 << 63 | 2  # .fsd/control, the replayer's channel
SESSION = 1 << 63 | 3  # .fsd/session, a channel for an observer
STATUS = 1 << 63 | 4  # .fsd/status, the server's statistics as JSON
STAGING = 1 << 63 | 5  # .fsd/staging, where names are moved out of and into
ALIAS = 1 << 63 | 6  # .fsd/alias: any node, named by its nodeid in decimal
CHECKPOINT = 1 << 63 | 7  # .fsd/checkpoint, saves the server's state when it is opened
FSD_NAME = b".fsd"
ALL_PROCESSES = 0
"""In a Hint: all processes."""


class ProtocolError(ValueError):
    """The peer sent bytes that are no frame of this protocol. Only the session ends."""


class Role(IntEnum):
    """The purpose of a session. BY_HAND sets marks that outlive the session, for experiments."""

    REPLAYER = 1
    OBSERVER = 2
    BY_HAND = 3


class Op(IntEnum):
    """What an order asks the agent to do on the mount."""

    CREATE = 1
    REMOVE = 2
    RENAME = 3
    TOUCH = 4
    OPEN = 5
    CLOSE = 6
    LONE_CLOSE = 7


class Scan(IntFlag):
    """Of a ScanEnd. FULL: all processes were read. LONE_CLOSE: the agent can make such orders.
    CREATE_OPEN: also a CREATE that keeps the file open.
    """

    FULL = 1
    LONE_CLOSE = 2
    CREATE_OPEN = 4


class Hello(NamedTuple):
    """First message of a guest: protocol version, role, and the events that it can use."""

    version: int
    role: int
    events: int


class Update(NamedTuple):
    """fsnotify_update: the aggregated mask of one inode; 0: no events any more.

    nodeid 0 stands for the whole file system. A request other than 0 is answered at once. An
    agent's updates have request 0 and take effect at its ScanEnd; only failures of these are
    answered.
    """

    request: int
    nodeid: int
    generation: int
    mask: int


class ScanEnd(NamedTuple):
    """The agent has read the marks of all processes hinted up to ``hint``; flags: Scan. The Updates
    before it are the changes, and are applied as one.
    """

    hint: int
    flags: int


class Calls(NamedTuple):
    """The agent traces the calls that set marks. The first of those whose marks the next ScanEnd
    reports returned at ``first``; it is ``now``. Both are microseconds of the guest's
    CLOCK_MONOTONIC.
    """

    first: int
    now: int


class Resolve(NamedTuple):
    """Ask for the node of a path in the share (relative to its root)."""

    request: int
    path: bytes


class List(NamedTuple):
    """Ask for the directories in a directory; answered by Name messages."""

    request: int
    nodeid: int
    generation: int


class Ack(NamedTuple):
    """Order ``seq`` was executed (errno 0), or failed in the guest's kernel with errno."""

    seq: int
    errno: int


class StatsRequest(NamedTuple):
    """Ask for the server's statistics."""

    request: int


class Bye(NamedTuple):
    """The guest ends the session; a waiting read is answered at once."""


class Keep(NamedTuple):
    """Ask to be known to the next server; if sent, the first message after Hello.

    Without a token: keep my marks and events from now on. With one: I am the guest that got this
    token, and have received so many events since. Answered by Kept: the same token if the server
    knows it, else a new one.
    """

    request: int
    received: int
    token: bytes


class Welcome(NamedTuple):
    """The server's answer to Hello: the version and the events that it can deliver."""

    version: int
    guest: int
    events: int


class Result(NamedTuple):
    """Answer to an Update or a Resolve. errno 0 = done; mode is the node's st_mode."""

    request: int
    errno: int
    nodeid: int
    generation: int
    mode: int


class Event(NamedTuple):
    """One event with the RFC's fields: on which node, which event, which name in it."""

    nodeid: int
    generation: int
    mask: int
    cookie: int
    name: bytes


class Order(NamedTuple):
    """One system call for the agent to make on the mount.

    CREATE name in node (mode: file type; arg 1: and keep the file open for writing, as OPEN does);
    REMOVE it (mode decides between rmdir and unlink); RENAME
    to node2/name2 (arg: renameat2 flags); TOUCH (arg: Mask of ACCESS, MODIFY, ATTRIB; nodeid2:
    through the file that this OPEN opened; generation2 1: the name is gone, open it separately);
    OPEN (arg 1: for writing); CLOSE the file that order ``arg`` opened; LONE_CLOSE (arg 1: for
    writing; generation2 1: the name is gone): a CLOSE without an OPEN. An empty name means the
    directory itself. The paths lead to node and node2 from the root, as of the event.
    """

    seq: int
    op: int
    mode: int
    nodeid: int
    generation: int
    nodeid2: int
    generation2: int
    arg: int
    name: bytes
    name2: bytes
    path: bytes
    path2: bytes


class Hint(NamedTuple):
    """Process ``pid`` has just looked up directories: its fdinfo is worth reading. ALL_PROCESSES:
    there were more processes than the server keeps.
    """

    hint: int
    pid: int


class Name(NamedTuple):
    """One directory of a List; the last has ``more`` 0 and an empty name."""

    request: int
    more: int
    name: bytes


class Kept(NamedTuple):
    """Answer to Keep: the token that the guest is known by."""

    request: int
    token: bytes


class Stats(NamedTuple):
    """The server's statistics: a part of a JSON text; the last part has ``more`` 0."""

    request: int
    more: int
    json: bytes


Message = Union[
    Hello, Update, ScanEnd, Resolve, List, Ack, StatsRequest, Bye, Keep,
    Welcome, Result, Event, Order, Hint, Name, Stats, Kept, Calls,
]  # fmt: skip

_HEADER = struct.Struct("<IHH")
_LENGTH = struct.Struct("<H")
# type code, message, its fixed fields, how many bytes fields follow
_TABLE: list[tuple[int, type[Message], struct.Struct, int]] = [
    (1, Hello, struct.Struct("<HHQ"), 0),
    (2, Update, struct.Struct("<IQQQ"), 0),
    (3, ScanEnd, struct.Struct("<QB"), 0),
    (4, Resolve, struct.Struct("<I"), 1),
    (5, Ack, struct.Struct("<QI"), 0),
    (6, StatsRequest, struct.Struct("<I"), 0),
    (7, Bye, struct.Struct("<"), 0),
    (8, List, struct.Struct("<IQQ"), 0),
    (9, Keep, struct.Struct("<IQ"), 1),
    (10, Calls, struct.Struct("<QQ"), 0),
    (16, Welcome, struct.Struct("<HQQ"), 0),
    (17, Result, struct.Struct("<IIQQI"), 0),
    (18, Event, struct.Struct("<QQQI"), 1),
    (19, Order, struct.Struct("<QBIQQQQQ"), 4),
    (20, Hint, struct.Struct("<QI"), 0),
    (21, Stats, struct.Struct("<IB"), 1),
    (22, Name, struct.Struct("<IB"), 1),
    (23, Kept, struct.Struct("<I"), 1),
]
_BY_CODE = {code: (cls, fixed, tails) for code, cls, fixed, tails in _TABLE}
_BY_TYPE = {cls: (code, fixed, tails) for code, cls, fixed, tails in _TABLE}


def encode(message: Message) -> bytes:
    """One frame. Raises ProtocolError if a field does not fit."""
    code, fixed, tails = _BY_TYPE[type(message)]
    count = len(message) - tails
    try:
        body = [fixed.pack(*message[:count])]
        for tail in message[count:]:
            assert isinstance(tail, bytes)
            body += (_LENGTH.pack(len(tail)), tail)
    except struct.error as error:
        raise ProtocolError(f"{type(message).__name__}: {error}") from None
    length = _HEADER.size + sum(map(len, body))
    if length > MAX_FRAME:
        raise ProtocolError(f"{type(message).__name__}: frame of {length} bytes, limit {MAX_FRAME}")
    return b"".join((_HEADER.pack(length, code, 0), *body))


def decode(frame: bytes) -> Message:
    """The message of exactly one frame. Raises ProtocolError on anything else."""
    if len(frame) < _HEADER.size:
        raise ProtocolError(f"frame of {len(frame)} bytes, a header needs {_HEADER.size}")
    length, code, zero = _HEADER.unpack_from(frame)
    if length != len(frame) or length > MAX_FRAME or zero:
        raise ProtocolError(f"frame of {len(frame)} bytes claims length {length}, reserved {zero}")
    if code not in _BY_CODE:
        raise ProtocolError(f"unknown frame type {code}")
    cls, fixed, tails = _BY_CODE[code]
    offset = _HEADER.size + fixed.size
    if offset > length:
        raise ProtocolError(f"{cls.__name__}: truncated body of {length - _HEADER.size} bytes")
    fields: list[int | bytes] = list(fixed.unpack_from(frame, _HEADER.size))
    for _ in range(tails):
        if offset + _LENGTH.size > length:
            raise ProtocolError(f"{cls.__name__}: truncated length at {offset}")
        (size,) = _LENGTH.unpack_from(frame, offset)
        offset += _LENGTH.size
        if offset + size > length:
            raise ProtocolError(f"{cls.__name__}: field of {size} bytes, {length - offset} left")
        fields.append(frame[offset : offset + size])
        offset += size
    if offset != length:
        raise ProtocolError(f"{cls.__name__}: {length - offset} bytes too many")
    return cls(*fields)  # type: ignore[arg-type]


class FrameReader:
    """Cuts a byte stream into messages: ``feed`` only stores, iterating parses."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken = False

    def feed(self, data: bytes) -> None:
        """Add received bytes. After a bad frame they are dropped."""
        if not self._broken:
            self._buffer += data

    def __iter__(self) -> Iterator[Message]:
        """Complete messages. Raises ProtocolError; the stream is unusable then."""
        if self._broken:
            raise ProtocolError("the stream is broken by an earlier frame")
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Message | None:
        buffer = self._buffer
        if len(buffer) < _HEADER.size:
            return None
        try:
            (length,) = struct.unpack_from("<I", buffer)
            if not _HEADER.size <= length <= MAX_FRAME:
                raise ProtocolError(f"frame length {length} outside {_HEADER.size}..{MAX_FRAME}")
            if len(buffer) < length:
                return None
            message = decode(bytes(buffer[:length]))
        except ProtocolError:
            self._broken = True
            buffer.clear()
            raise
        del buffer[:length]
        return message

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)
