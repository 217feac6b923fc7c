"""vhost-user messages, as a back-end receives and answers them: sans-IO.

The specification is QEMU's docs/interop/vhost-user.rst, with its names and numbers. Syntax only:
whether a message is valid in the current state is for the device to decide. Numbers are in the
machine's byte order.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple, Union

VERSION = 1
MAX_FDS = 8
"""Descriptors with one message: VHOST_MEMORY_BASELINE_NREGIONS of SET_MEM_TABLE."""
MAX_REGIONS = 8
MAX_CONFIG = 256
"""VHOST_USER_MAX_CONFIG_SIZE: bytes of configuration space that one message carries."""
MAX_PAYLOAD = 4096
"""No message is longer; a longer one is rejected before anything is stored."""
INDEX_MASK, NO_FD = 0xFF, 0x100  # in the u64 of SET_VRING_KICK, _CALL and _ERR


class VhostUserError(ValueError):
    """The front-end sent bytes that are no vhost-user message. Only the connection ends."""


class Type(IntEnum):
    """VhostUserRequest: the requests of a front-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Flag(IntFlag):
    """Bits of the header's flags, except the version."""

    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class Protocol(IntFlag):
    """VHOST_USER_PROTOCOL_F_*."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


F_PROTOCOL_FEATURES = 1 << 30
"""The virtio feature bit for the Protocol features."""


class Empty(NamedTuple):
    """No payload."""


class U64(NamedTuple):
    """One number."""

    value: int


class VringState(NamedTuple):
    """struct vhost_vring_state; ``queue`` is its index."""

    queue: int
    num: int


class VringAddr(NamedTuple):
    """struct vhost_vring_addr: user addresses of the three parts of a ring."""

    queue: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


class Region(NamedTuple):
    """VhostUserMemoryRegion: memory of the guest in a file; addresses and sizes in bytes."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


class Regions(NamedTuple):
    """VhostUserMemory: all of the guest's memory."""

    regions: tuple[Region, ...]


class Config(NamedTuple):
    """VhostUserConfig: a part of the device's configuration space."""

    offset: int
    size: int
    flags: int
    data: bytes


class Inflight(NamedTuple):
    """VhostUserInflight: where in a file requests under way are recorded; sizes in bytes, but
    ``queue_size`` in entries.
    """

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class Raw(NamedTuple):
    """The payload of a message that this module does not know, or that was not offered."""

    data: bytes


Payload = Union[Empty, U64, VringState, VringAddr, Region, Regions, Config, Inflight, Raw]


class Request(NamedTuple):
    """A message of the front-end. ``fds`` belong to the code that takes the request."""

    type: int
    flags: int
    payload: Payload
    fds: tuple[int, ...]

    @property
    def needs_reply(self) -> bool:
        """Whether the front-end asks for REPLY_ACK."""
        return bool(self.flags & Flag.NEED_REPLY)


_HEADER = struct.Struct("=III")
HEADER_SIZE = _HEADER.size
_COUNT = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_CONFIG = struct.Struct("=III")
_SINGLE = struct.Struct("=8xQQQQ")
_FIXED: dict[type[Payload], struct.Struct] = {
    Empty: struct.Struct("="),
    U64: struct.Struct("=Q"),
    VringState: struct.Struct("=II"),
    VringAddr: struct.Struct("=IIQQQQ"),
    Region: _SINGLE,
    Inflight: struct.Struct("=QQHH"),
}
# The content of each message, and its smallest and largest number of descriptors.
_TABLE: dict[int, tuple[type[Payload], int, int]] = {
    Type.GET_FEATURES: (Empty, 0, 0),
    Type.SET_FEATURES: (U64, 0, 0),
    Type.SET_OWNER: (Empty, 0, 0),
    Type.RESET_OWNER: (Empty, 0, 0),
    Type.SET_MEM_TABLE: (Regions, 1, MAX_FDS),
    Type.SET_VRING_NUM: (VringState, 0, 0),
    Type.SET_VRING_ADDR: (VringAddr, 0, 0),
    Type.SET_VRING_BASE: (VringState, 0, 0),
    Type.GET_VRING_BASE: (VringState, 0, 0),
    Type.SET_VRING_KICK: (U64, 0, 1),
    Type.SET_VRING_CALL: (U64, 0, 1),
    Type.SET_VRING_ERR: (U64, 0, 1),
    Type.GET_PROTOCOL_FEATURES: (Empty, 0, 0),
    Type.SET_PROTOCOL_FEATURES: (U64, 0, 0),
    Type.GET_QUEUE_NUM: (Empty, 0, 0),
    Type.SET_VRING_ENABLE: (VringState, 0, 0),
    Type.GET_CONFIG: (Config, 0, 0),
    Type.SET_CONFIG: (Config, 0, 0),
    Type.GET_INFLIGHT_FD: (Inflight, 0, 0),
    Type.SET_INFLIGHT_FD: (Inflight, 1, 1),
    Type.RESET_DEVICE: (Empty, 0, 0),
    Type.GET_MAX_MEM_SLOTS: (Empty, 0, 0),
    Type.ADD_MEM_REG: (Region, 1, 1),
    Type.REM_MEM_REG: (Region, 0, 1),  # the norm: some front-ends send one, which is closed
    Type.SET_STATUS: (U64, 0, 0),
    Type.GET_STATUS: (Empty, 0, 0),
}
_FD_OF_VRING = (Type.SET_VRING_KICK, Type.SET_VRING_CALL, Type.SET_VRING_ERR)


def name_of(code: int) -> str:
    """A message's name, or its number."""
    try:
        return Type(code).name
    except ValueError:
        return f"message {code}"


def size_of(header: bytes) -> int:
    """Bytes of the message with this header, 0 if not all of the header is there. Raises
    VhostUserError.
    """
    return HEADER_SIZE + _decode_header(header)[2] if len(header) == HEADER_SIZE else 0


def descriptors_of(message: bytes) -> int | None:
    """How many descriptors must come with a whole message; None if it says so nowhere. Raises
    VhostUserError.
    """
    code = _decode_header(message[:HEADER_SIZE])[0]
    if code not in _TABLE:
        return None
    least, most = _descriptors(code, _payload(_TABLE[code][0], code, message[HEADER_SIZE:]))
    return least if least == most else None


def _decode_header(header: bytes) -> tuple[int, int, int]:
    """Type, flags and the payload's length. Raises VhostUserError."""
    code, flags, size = _HEADER.unpack(header)
    if flags & 3 != VERSION:
        raise VhostUserError(f"{name_of(code)}: version {flags & 3}, not {VERSION}")
    if flags & Flag.REPLY:
        raise VhostUserError(f"{name_of(code)}: a reply where nothing was asked")
    if size > MAX_PAYLOAD:
        raise VhostUserError(f"{name_of(code)}: {size} bytes, limit {MAX_PAYLOAD}")
    return code, flags, size


def _decode_payload(code: int, data: bytes, fds: int) -> Payload:
    """The payload of a message that came with so many descriptors. Raises VhostUserError."""
    if code not in _TABLE:
        return Raw(data)
    payload = _payload(_TABLE[code][0], code, data)
    least, most = _descriptors(code, payload)
    if not least <= fds <= most:
        raise VhostUserError(f"{name_of(code)}: {fds} descriptors, not {least} to {most}")
    return payload


def _descriptors(code: int, payload: Payload) -> tuple[int, int]:
    """The smallest and the largest number of descriptors that come with it."""
    if isinstance(payload, Regions):
        return len(payload.regions), len(payload.regions)
    if code in _FD_OF_VRING and isinstance(payload, U64):
        count = 0 if payload.value & NO_FD else 1
        return count, count
    return _TABLE[code][1:]


def _payload(kind: type[Payload], code: int, data: bytes) -> Payload:
    what = f"{name_of(code)}: payload of {len(data)} bytes"
    if kind is Regions:
        if len(data) < _COUNT.size:
            raise VhostUserError(what)
        count, _ = _COUNT.unpack_from(data)
        # Some front-ends always send room for all regions.
        if not 0 < count <= MAX_REGIONS or len(data) - _COUNT.size < count * _REGION.size:
            raise VhostUserError(f"{what} for {count} regions")
        end = _COUNT.size + count * _REGION.size
        regions = _REGION.iter_unpack(data[_COUNT.size : end])
        return Regions(tuple(Region(*fields) for fields in regions))
    if kind is Config:
        if len(data) < _CONFIG.size:
            raise VhostUserError(what)
        offset, size, flags = _CONFIG.unpack_from(data)
        content = data[_CONFIG.size :]
        if size != len(content) or offset + size > MAX_CONFIG:
            raise VhostUserError(f"{what}, {size} at {offset} of the configuration")
        return Config(offset, size, flags, content)
    fixed = _FIXED[kind]
    if len(data) != fixed.size:
        raise VhostUserError(f"{what}, not {fixed.size}")
    return kind(*fixed.unpack(data))


class RequestReader:
    """Assembles requests from the bytes read. Read ``wanted`` bytes at most each time: descriptors
    come with the bytes of their message, so no read may cross a message boundary.
    """

    def __init__(self) -> None:
        self._data = b""
        self._fds: tuple[int, ...] = ()
        self._header: tuple[int, int, int] | None = None

    @property
    def wanted(self) -> int:
        """How many bytes are missing of the header, or else of the payload."""
        whole = _HEADER.size if self._header is None else self._header[2]
        return whole - len(self._data)

    def receive(self, data: bytes, fds: tuple[int, ...] = ()) -> Request | None:
        """Add bytes and descriptors that were read; returns the request once it is complete.

        Raises VhostUserError; the stream is unusable then, and ``take_fds`` returns the descriptors
        to close.
        """
        self._fds += fds
        if len(data) > self.wanted:
            raise VhostUserError(f"{len(data)} bytes were read, {self.wanted} wanted")
        if len(self._fds) > MAX_FDS:
            raise VhostUserError(f"{len(self._fds)} descriptors, limit {MAX_FDS}")
        self._data += data
        if self._header is None and not self.wanted:
            self._header, self._data = _decode_header(self._data), b""
        if self._header is None or self.wanted:
            return None
        code, flags, _ = self._header
        payload = _decode_payload(code, self._data, len(self._fds))
        self._header, self._data = None, b""
        return Request(code, flags, payload, self.take_fds())

    def take_fds(self) -> tuple[int, ...]:
        """Descriptors of an incomplete message; the caller owns them from now on."""
        fds, self._fds = self._fds, ()
        return fds


def encode_payload(payload: Payload) -> bytes:
    """The bytes of a payload."""
    if isinstance(payload, Regions):
        regions = b"".join(_REGION.pack(*region) for region in payload.regions)
        return _COUNT.pack(len(payload.regions), 0) + regions
    if isinstance(payload, Config):
        return _CONFIG.pack(*payload[:3]) + payload.data
    if isinstance(payload, Raw):
        return payload.data
    return _FIXED[type(payload)].pack(*payload)


def reply(request: Request, payload: Payload) -> bytes:
    """The answer to a request."""
    data = encode_payload(payload)
    return _HEADER.pack(request.type, VERSION | Flag.REPLY, len(data)) + data


def encode_request(code: int, payload: Payload, *, needs_reply: bool = False) -> bytes:
    """A message as a front-end sends it: for tests."""
    data = encode_payload(payload)
    flags = VERSION | (Flag.NEED_REPLY if needs_reply else 0)
    return _HEADER.pack(code, flags, len(data)) + data


def decode_reply(data: bytes, kind: type[Payload]) -> tuple[int, Payload]:
    """The type and payload of an answer: for tests. Raises VhostUserError."""
    code, flags, size = _HEADER.unpack_from(data)
    if flags != VERSION | Flag.REPLY or size != len(data) - _HEADER.size:
        raise VhostUserError(f"{name_of(code)}: no reply: flags {flags:#x}, {size} bytes")
    return code, _payload(kind, code, data[_HEADER.size :])
