"""The RFC's layouts, and the faults of the RFC's own server as they would show in a codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import rfc
from protocol.frames import ProtocolError

from . import norm, vectors
from .strategies import integers

DECODE: dict[str, Callable[[bytes], NamedTuple]] = {
    "v1 request": rfc.decode_request_v1,
    "v1 event": rfc.decode_event_v1,
    "v2 request": rfc.decode_request_v2,
    "v2 event": rfc.decode_event_v2,
}
ENCODE = vectors.RFC_ENCODE
TYPES: dict[str, Callable[..., NamedTuple]] = {
    "v1 request": rfc.RequestV1,
    "v1 event": rfc.EventV1,
    "v2 request": rfc.RequestV2,
    "v2 event": rfc.EventV2,
}
SIZES = {"v1 request": 24, "v1 event": 24, "v2 request": 8, "v2 event": 40}
EVENTS = ["v1 event", "v2 event"]
VECTORS = [pytest.param(row, id=row["name"]) for row in vectors.load()["rfc"]]
U32, U64 = integers("u32"), integers("u64")
NAMES = st.binary(max_size=300)
MESSAGES: st.SearchStrategy[tuple[str, NamedTuple]] = st.one_of(
    st.tuples(st.just("v1 request"), st.builds(rfc.RequestV1, U64, U64, st.sampled_from([0, 1]))),
    st.tuples(st.just("v1 event"), st.builds(rfc.EventV1, U64, U64, U32, NAMES)),
    st.tuples(st.just("v2 request"), st.builds(rfc.RequestV2, U64)),
    st.tuples(
        st.just("v2 event"), st.builds(rfc.EventV2, U64, U64, U64, U32, st.booleans(), NAMES)
    ),
)


def message_of(row: dict[str, Any]) -> NamedTuple:
    fields = row["fields"]
    if "name" in fields:
        fields = {**fields, "name": bytes.fromhex(fields["name"])}
    return TYPES[row["layout"]](**fields)


def event(layout: str, *, inode: int = 1, name: bytes = b"") -> NamedTuple:
    if layout == "v1 event":
        return rfc.EventV1(inode, 0x100, 0, name)
    return rfc.EventV2(inode, 1, 0x100, 0, False, name)


def by_document(layout: str, message: NamedTuple) -> bytes:
    return norm.pack(norm.rfc()[layout], dict(message._asdict()))


# Vectors


@pytest.mark.parametrize("row", VECTORS)
def test_vector_encodes(row: dict[str, Any]) -> None:
    assert ENCODE[row["layout"]](message_of(row)).hex() == row["hex"]


@pytest.mark.parametrize("row", VECTORS)
def test_vector_decodes(row: dict[str, Any]) -> None:
    assert DECODE[row["layout"]](bytes.fromhex(row["hex"])) == message_of(row)


@pytest.mark.parametrize("row", VECTORS)
def test_vector_is_what_the_document_says(row: dict[str, Any]) -> None:
    assert by_document(row["layout"], message_of(row)).hex() == row["hex"]


def test_vectors_show_every_layout() -> None:
    assert {row["layout"] for row in vectors.load()["rfc"]} == set(norm.rfc()) == set(DECODE)


# Written out by hand from the RFC's structures.
BY_HAND: list[tuple[str, NamedTuple, str]] = [
    (
        "v1 request",
        rfc.RequestV1(0x300, 7, 1),
        "0003000000000000 0700000000000000 01000000 00000000",
    ),
    (
        "v1 event",
        rfc.EventV1(0x0102030405060708, 0x80, 5, b"ab"),
        "0807060504030201 8000000000000000 02000000 05000000 6162",
    ),
    ("v2 request", rfc.RequestV2(0x300), "0003000000000000"),
    (
        "v2 event",
        rfc.EventV2(2, 1, 0x100, 9, True, b"ab"),
        "0200000000000000 0100000000000000 0001000000000000 02000000 09000000 01 00000000000000"
        " 6162",
    ),
]


@pytest.mark.parametrize(("layout", "message", "data"), BY_HAND)
def test_by_hand(layout: str, message: NamedTuple, data: str) -> None:
    assert ENCODE[layout](message) == bytes.fromhex(data)
    assert DECODE[layout](bytes.fromhex(data)) == message


@pytest.mark.parametrize("layout", SIZES)
def test_fixed_size(layout: str) -> None:
    fields = norm.rfc()[layout].fields
    assert sum(norm.SIZES.get(field.kind, 0) for field in fields) == SIZES[layout]


# Faults of the RFC's own server


@pytest.mark.parametrize("layout", EVENTS)
@pytest.mark.parametrize("size", [*range(33), 63, 64, 127, 128, 254, 255, 256, 4096])
def test_long_names_fit(layout: str, size: int) -> None:
    """Names of 16 bytes and more did not fit the RFC's notify buffer, and were lost."""
    message = event(layout, name=b"n" * size)
    data = ENCODE[layout](message)
    assert len(data) == SIZES[layout] + size
    assert DECODE[layout](data) == message


@pytest.mark.parametrize("layout", EVENTS)
@pytest.mark.parametrize("inode", [1 << 32, (1 << 32) + 5, 1 << 63, (1 << 64) - 1])
def test_nodeids_are_not_cut(layout: str, inode: int) -> None:
    """The RFC's server kept 32 bits of a nodeid, and reported to the wrong inode's watchers."""
    decoded = DECODE[layout](ENCODE[layout](event(layout, inode=inode)))
    assert decoded == event(layout, inode=inode)


@pytest.mark.parametrize("layout", EVENTS)
def test_a_name_may_be_any_bytes(layout: str) -> None:
    message = event(layout, name=bytes(range(256)))
    assert DECODE[layout](ENCODE[layout](message)) == message


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("v1 request", rfc.RequestV1(-1, 0, 1)),
        ("v1 request", rfc.RequestV1(1 << 64, 0, 1)),
        ("v1 request", rfc.RequestV1(1, 0, 1 << 32)),
        ("v1 event", rfc.EventV1(1, 1 << 64, 0, b"")),
        ("v1 event", rfc.EventV1(1, 1, 1 << 32, b"")),
        ("v2 request", rfc.RequestV2(-1)),
        ("v2 request", rfc.RequestV2(1 << 64)),
        ("v2 event", rfc.EventV2(1 << 64, 1, 1, 0, False, b"")),
        ("v2 event", rfc.EventV2(1, 1, 1, 1 << 32, False, b"")),
    ],
)
def test_what_does_not_fit_is_one_typed_error(layout: str, message: NamedTuple) -> None:
    with pytest.raises(ProtocolError):
        ENCODE[layout](message)


# Bad input


@pytest.mark.parametrize("row", VECTORS)
def test_every_truncation_is_refused(row: dict[str, Any]) -> None:
    data = bytes.fromhex(row["hex"])
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            DECODE[row["layout"]](data[:end])


@pytest.mark.parametrize("row", VECTORS)
def test_a_byte_too_many_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        DECODE[row["layout"]](bytes.fromhex(row["hex"]) + b"\0")


@pytest.mark.parametrize("action", [2, 255, (1 << 32) - 1])
def test_unknown_action(action: int) -> None:
    data = bytes(16) + action.to_bytes(4, "little") + bytes(4)
    with pytest.raises(ProtocolError):
        rfc.decode_request_v1(data)


@pytest.mark.parametrize("notify", [2, 255])
def test_notify_parent_is_a_bool(notify: int) -> None:
    with pytest.raises(ProtocolError):
        rfc.decode_event_v2(bytes(32) + bytes([notify]) + bytes(7))


@pytest.mark.parametrize("layout", EVENTS)
@pytest.mark.parametrize("namelen", [0, 1, 3, (1 << 32) - 1])
def test_namelen_must_be_true(layout: str, namelen: int) -> None:
    data = bytearray(ENCODE[layout](event(layout, name=b"ab")))
    offset = next(f.offset for f in norm.rfc()[layout].fields if f.name == "namelen")
    assert offset is not None
    data[offset : offset + 4] = namelen.to_bytes(4, "little")
    with pytest.raises(ProtocolError):
        DECODE[layout](bytes(data))


# Properties


@given(MESSAGES)
def test_messages_survive(sent: tuple[str, NamedTuple]) -> None:
    layout, message = sent
    data = ENCODE[layout](message)
    assert DECODE[layout](data) == message
    assert by_document(layout, message) == data


@given(st.sampled_from(sorted(DECODE)), st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_protocol_error(layout: str, data: bytes) -> None:
    try:
        message = DECODE[layout](data)
    except ProtocolError:
        return
    assert len(ENCODE[layout](message)) == len(data)
