"""The frame codec: against the document, in both directions, at every limit, on any input."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import frames
from protocol.frames import MAX_FRAME, Message, Op, ProtocolError, Role, decode, encode

from . import norm, vectors
from .strategies import CLASSES, CODES, FRAMED, MESSAGES, limit, make, values_of

VECTORS = [pytest.param(row, id=row["name"]) for row in vectors.load()["frames"]]
REFUSED = [pytest.param(row, id=row["name"]) for row in vectors.load()["refused"]]
FIELDS = [(layout.title, row) for layout in norm.messages().values() for row in layout.fields]
INTEGERS = [pytest.param(*f, id=f"{f[0]}.{f[1].name}") for f in FIELDS if f[1].kind != "bytes"]
BYTES = [pytest.param(*f, id=f"{f[0]}.{f[1].name}") for f in FIELDS if f[1].kind == "bytes"]


def message_of(row: dict[str, Any]) -> Message:
    kinds = {f.name: f.kind for f in norm.messages()[CODES[row["message"]]].fields}
    return make(
        row["message"],
        {
            name: bytes.fromhex(value) if kinds[name] == "bytes" else value
            for name, value in row["fields"].items()
        },
    )


def zero(name: str) -> dict[str, norm.Value]:
    """All fields of a message at 0."""
    layout = norm.messages()[CODES[name]]
    return {row.name: b"" if row.kind == "bytes" else 0 for row in layout.fields}


def with_length(data: bytes) -> bytes:
    """The same bytes under a header that claims exactly as many."""
    return len(data).to_bytes(4, "little") + data[4:]


# The document


def test_every_message_is_documented_with_its_fields_in_order() -> None:
    documented = {m.title: [f.name for f in m.fields] for m in norm.messages().values()}
    assert documented == {cls.__name__: list(cls._fields) for cls in get_args(Message)}


# Sizes of the fixed part with the header, by hand: a slip in document and code alike shows here.
SMALLEST = {
    "Hello": 20, "Update": 36, "ScanEnd": 17, "Calls": 24, "Resolve": 14, "Ack": 20,
    "StatsRequest": 12, "Bye": 8,
    "List": 28, "Welcome": 26, "Result": 36, "Event": 38, "Order": 69, "Hint": 20,
    "Stats": 15, "Name": 15, "Keep": 22, "Kept": 14,
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_size_of_the_smallest_frame(name: str) -> None:
    assert len(encode(make(name, zero(name)))) == SMALLEST[name]


@pytest.mark.parametrize(("name", "row"), INTEGERS)
def test_offset_and_width_of_each_integer(name: str, row: norm.Field) -> None:
    """Filling one field with ones changes its bytes, all of them, and no other."""
    empty = encode(make(name, zero(name)))
    full = encode(make(name, {**zero(name), row.name: limit(row.kind)}))
    changed = [index for index, (a, b) in enumerate(zip(empty, full, strict=True)) if a != b]
    assert row.offset is not None
    assert changed == list(range(row.offset, row.offset + norm.SIZES[row.kind]))
    assert {full[index] for index in changed} == {0xFF}


# Vectors


@pytest.mark.parametrize("row", VECTORS)
def test_vector_encodes(row: dict[str, Any]) -> None:
    assert encode(message_of(row)).hex() == row["hex"]


@pytest.mark.parametrize("row", VECTORS)
def test_vector_decodes(row: dict[str, Any]) -> None:
    message = decode(bytes.fromhex(row["hex"]))
    assert message == message_of(row)
    assert type(message).__name__ == row["message"]


@pytest.mark.parametrize("row", VECTORS)
def test_vector_is_what_the_document_says(row: dict[str, Any]) -> None:
    message = message_of(row)
    assert norm.frame(CODES[row["message"]], values_of(message)).hex() == row["hex"]


@pytest.mark.parametrize("row", REFUSED)
def test_refused_vector(row: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode(bytes.fromhex(row["hex"]))


def test_vectors_show_everything() -> None:
    shown = [message_of(row) for row in vectors.load()["frames"]]
    assert {type(message).__name__ for message in shown} == set(CLASSES)
    assert {m.op for m in shown if isinstance(m, frames.Order)} == set(Op)
    assert {m.role for m in shown if isinstance(m, frames.Hello)} == set(Role)


# Written out by hand from the document, not by the generator.
BY_HAND: list[tuple[Message, str]] = [
    (frames.Bye(), "08000000 0700 0000"),
    (frames.Hello(1, 2, 0xFFF), "14000000 0100 0000  0100 0200 ff0f000000000000"),
    (
        frames.Update(1, 0x0102030405060708, 0x0A0B0C0D, 0x300),
        "24000000 0200 0000  01000000 0807060504030201 0d0c0b0a00000000 0003000000000000",
    ),
    (
        frames.Event(2, 3, 0x40000100, 0, b"d"),
        "27000000 1200 0000  0200000000000000 0300000000000000 0001004000000000 00000000 0100 64",
    ),
]


@pytest.mark.parametrize(("message", "data"), BY_HAND)
def test_by_hand(message: Message, data: str) -> None:
    assert encode(message) == bytes.fromhex(data)
    assert decode(bytes.fromhex(data)) == message


# Limits


@pytest.mark.parametrize(("name", "row"), INTEGERS)
def test_limits_of_each_integer(name: str, row: norm.Field) -> None:
    top = limit(row.kind)
    for value in (0, 1, top):
        message = make(name, {**zero(name), row.name: value})
        assert decode(encode(message)) == message
    for outside in (-1, top + 1, 1 << 200, -(1 << 200)):
        with pytest.raises(ProtocolError):
            encode(make(name, {**zero(name), row.name: outside}))


@pytest.mark.parametrize("wrong", [None, 1.0, "1"])
def test_an_integer_of_another_type_is_refused(wrong: Any) -> None:
    with pytest.raises(ProtocolError):
        encode(frames.StatsRequest(wrong))


@pytest.mark.parametrize(("name", "row"), BYTES)
def test_limits_of_each_bytes_field(name: str, row: norm.Field) -> None:
    room = MAX_FRAME - SMALLEST[name]
    for size in (0, 1, 16, 255, 256, 4096, room):
        message = make(name, {**zero(name), row.name: b"\xff" * size})
        assert decode(encode(message)) == message
    for size in (room + 1, 65535, 65536, 1 << 20):
        with pytest.raises(ProtocolError):
            encode(make(name, {**zero(name), row.name: b"x" * size}))


def test_longest_frame() -> None:
    longest = encode(frames.Resolve(0, b"x" * (MAX_FRAME - SMALLEST["Resolve"])))
    assert len(longest) == MAX_FRAME
    reader = frames.FrameReader()
    reader.feed(longest)
    assert [encode(message) for message in reader] == [longest]


def test_an_order_with_two_paths_of_path_max_fits() -> None:
    path, name = b"p" * 4095, b"n" * 255
    order = frames.Order(1, Op.RENAME, 0o100000, 1, 0, 2, 0, 0, name, name, path, path)
    assert decode(encode(order)) == order


def test_decode_has_the_same_limit_as_encode() -> None:
    body = bytes(4) + (65535).to_bytes(2, "little") + b"x" * 65535
    with pytest.raises(ProtocolError):
        decode(with_length(bytes(4) + CODES["Resolve"].to_bytes(4, "little") + body))


# Damage


@pytest.mark.parametrize("row", VECTORS)
def test_every_truncation_is_refused(row: dict[str, Any]) -> None:
    data = bytes.fromhex(row["hex"])
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(data[:end])
        if end >= 8:  # also where the header is honest about it
            with pytest.raises(ProtocolError):
                decode(with_length(data[:end]))


@pytest.mark.parametrize("row", VECTORS)
def test_a_byte_too_many_is_refused(row: dict[str, Any]) -> None:
    data = bytes.fromhex(row["hex"]) + b"\0"
    with pytest.raises(ProtocolError):
        decode(data)
    with pytest.raises(ProtocolError):
        decode(with_length(data))


@pytest.mark.parametrize("row", VECTORS)
def test_every_flipped_bit_is_refused_or_another_message(row: dict[str, Any]) -> None:
    data = bytes.fromhex(row["hex"])
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            message = decode(bytes(damaged))
        except ProtocolError:
            continue
        assert encode(message) == damaged
        assert message != decode(data)


def test_every_other_type_is_refused() -> None:
    for code in set(range(300)) - set(CODES.values()):
        with pytest.raises(ProtocolError):
            decode(b"\x08\0\0\0" + code.to_bytes(2, "little") + b"\0\0")


# Properties


@given(MESSAGES)
def test_messages_survive(message: Message) -> None:
    data = encode(message)
    again = decode(data)
    assert again == message
    assert type(again) is type(message)


@given(MESSAGES)
def test_code_and_document_agree(message: Message) -> None:
    assert encode(message) == norm.frame(CODES[type(message).__name__], values_of(message))


@given(st.binary(max_size=200) | FRAMED)
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert encode(message) == data


@given(MESSAGES, st.data())
def test_any_truncation_is_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ProtocolError):
        decode(whole[:end])
