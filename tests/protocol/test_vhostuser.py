"""vhost-user messages: against the layouts of the norm, at every split, on any input."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.vhostuser import (
    MAX_FDS,
    MAX_PAYLOAD,
    NO_FD,
    U64,
    Config,
    Empty,
    Flag,
    Payload,
    Raw,
    Region,
    Regions,
    Request,
    RequestReader,
    Type,
    VhostUserError,
    VringAddr,
    VringState,
    encode_payload,
    encode_request,
    reply,
)

REGION = Region(1, 2, 3, 4)
# Message, descriptors, payload, its bytes as the norm has them (numbers in the machine's order).
VECTORS: list[tuple[int, int, Payload, bytes]] = [
    (Type.GET_FEATURES, 0, Empty(), b""),
    (Type.SET_FEATURES, 0, U64(1 << 32), struct.pack("=Q", 1 << 32)),
    (Type.SET_VRING_NUM, 0, VringState(1, 128), struct.pack("=2I", 1, 128)),
    (Type.SET_VRING_ADDR, 0, VringAddr(1, 2, 3, 4, 5, 6), struct.pack("=2I4Q", 1, 2, 3, 4, 5, 6)),
    (Type.SET_VRING_KICK, 1, U64(3), struct.pack("=Q", 3)),
    (Type.SET_VRING_CALL, 0, U64(3 | NO_FD), struct.pack("=Q", 0x103)),
    (Type.SET_MEM_TABLE, 1, Regions((REGION,)), struct.pack("=2I4Q", 1, 0, 1, 2, 3, 4)),
    (
        Type.SET_MEM_TABLE,
        2,
        Regions((REGION, REGION)),
        struct.pack("=2I8Q", 2, 0, 1, 2, 3, 4, 1, 2, 3, 4),
    ),
    (Type.ADD_MEM_REG, 1, REGION, struct.pack("=5Q", 0, 1, 2, 3, 4)),
    (Type.REM_MEM_REG, 0, REGION, struct.pack("=5Q", 0, 1, 2, 3, 4)),
    (Type.REM_MEM_REG, 1, REGION, struct.pack("=5Q", 0, 1, 2, 3, 4)),
    (Type.GET_CONFIG, 0, Config(4, 2, 0, b"ab"), struct.pack("=3I", 4, 2, 0) + b"ab"),
    (Type.SET_STATUS, 0, U64(15), struct.pack("=Q", 15)),
    (99, 2, Raw(b"xyz"), b"xyz"),
]


def message(code: int, payload: bytes, flags: int = 1, size: int | None = None) -> bytes:
    return struct.pack("=3I", code, flags, len(payload) if size is None else size) + payload


def read(data: bytes, fds: tuple[int, ...] = (), step: int = 1 << 20) -> Request | None:
    """The request of exactly these bytes, read ``step`` at a time."""
    reader = RequestReader()
    request = None
    while data:
        assert request is None
        assert reader.wanted > 0
        size = min(step, reader.wanted)
        request, data, fds = reader.receive(data[:size], fds), data[size:], ()
    return request


@pytest.mark.parametrize(("code", "fds", "payload", "data"), VECTORS)
def test_the_norms_layouts(code: int, fds: int, payload: Payload, data: bytes) -> None:
    assert encode_payload(payload) == data
    descriptors = tuple(range(100, 100 + fds))
    for step in (1, 5, 1 << 20):
        assert read(message(code, data), descriptors, step) == Request(
            code, 1, payload, descriptors
        )


def test_one_message_behind_the_other() -> None:
    reader = RequestReader()
    for code, fds, payload, data in VECTORS * 2:
        request = reader.receive(message(code, data)[:12], (7,) * fds)
        if data:
            assert request is None
            assert reader.wanted == len(data)
            request = reader.receive(data)
        assert request == Request(code, 1, payload, (7,) * fds)


def test_answers() -> None:
    request = read(message(Type.SET_STATUS, struct.pack("=Q", 1), flags=1 | 8))
    assert request is not None
    assert request.needs_reply
    assert reply(request, U64(5)) == struct.pack("=3IQ", 39, 1 | 4, 8, 5)
    assert encode_request(Type.SET_STATUS, U64(1), needs_reply=True) == message(
        Type.SET_STATUS, struct.pack("=Q", 1), 9
    )


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        pytest.param(message(1, b"", flags=0), 0, id="version"),
        pytest.param(message(1, b"", flags=1 | Flag.REPLY), 0, id="reply"),
        pytest.param(message(2, b"", size=MAX_PAYLOAD + 1), 0, id="too long"),
        pytest.param(message(2, b"\0" * 7), 0, id="short u64"),
        pytest.param(message(2, b"\0" * 9), 0, id="long u64"),
        pytest.param(message(1, b"\0"), 0, id="payload of nothing"),
        pytest.param(message(2, b"\0" * 8), 1, id="descriptor of nothing"),
        pytest.param(message(12, struct.pack("=Q", 1)), 0, id="kick without"),
        pytest.param(message(12, struct.pack("=Q", 0x101)), 1, id="no kick with"),
        pytest.param(message(12, struct.pack("=Q", 1)), 2, id="two kicks"),
        pytest.param(message(5, struct.pack("=2I", 0, 0)), 0, id="no region"),
        pytest.param(message(5, struct.pack("=2I", 9, 0) + bytes(32 * 9)), 8, id="9 regions"),
        pytest.param(message(5, struct.pack("=2I", 2, 0) + bytes(32)), 2, id="cut regions"),
        pytest.param(message(5, struct.pack("=2I", 2, 0) + bytes(64)), 1, id="too few files"),
        pytest.param(message(5, struct.pack("=I", 1)), 1, id="cut count"),
        pytest.param(message(37, bytes(40)), 0, id="region without a file"),
        pytest.param(message(24, struct.pack("=3I", 250, 7, 0) + bytes(7)), 0, id="config's end"),
        pytest.param(message(24, struct.pack("=3I", 0, 8, 0) + bytes(7)), 0, id="config's size"),
        pytest.param(message(24, b"\0" * 11), 0, id="cut config"),
        pytest.param(message(99, b""), MAX_FDS + 1, id="too many descriptors"),
    ],
)
def test_what_is_no_message(data: bytes, fds: int) -> None:
    with pytest.raises(VhostUserError):
        read(data, tuple(range(fds)))


def test_descriptors_of_a_bad_message_can_be_closed() -> None:
    reader = RequestReader()
    with pytest.raises(VhostUserError):
        reader.receive(message(2, b"", flags=0)[:12], (5, 6))
    assert reader.take_fds() == (5, 6)
    assert reader.take_fds() == ()


def test_reading_too_much_is_an_error() -> None:
    with pytest.raises(VhostUserError, match="wanted"):
        RequestReader().receive(message(1, b"") + b"x")


@given(st.binary(max_size=200), st.integers(0, MAX_FDS), st.integers(1, 64))
@example(message(5, struct.pack("=2I", 0xFFFFFFFF, 0) + bytes(32)), 1, 64)
def test_any_bytes(data: bytes, fds: int, step: int) -> None:
    """A request, or one error of one type; never anything else."""
    reader = RequestReader()
    descriptors = tuple(range(fds))
    try:
        while data:
            size = min(step, reader.wanted)
            request, data = reader.receive(data[:size], descriptors), data[size:]
            descriptors = () if request is None else descriptors
    except VhostUserError:
        pass


@given(st.sampled_from(Type), st.integers(0, 15), st.binary(max_size=120), st.integers(0, MAX_FDS))
def test_any_payload(code: Type, flags: int, payload: bytes, fds: int) -> None:
    try:
        request = read(message(code, payload, flags & ~3 | 1), tuple(range(fds)))
    except VhostUserError:
        return
    assert request is not None
    assert request.type == code
    assert len(request.fds) == fds
    assert payload.startswith(encode_payload(request.payload)) or isinstance(
        request.payload, Region
    )
