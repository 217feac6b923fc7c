"""FrameReader: the same messages however the stream is cut, and bad frames found at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import frames
from protocol.frames import MAX_FRAME, FrameReader, Message, ProtocolError, decode, encode

from . import vectors
from .strategies import FRAMED, MESSAGES

FRAMES = [bytes.fromhex(row["hex"]) for row in vectors.load()["frames"]]
STREAM = b"".join(FRAMES)
SENT = [decode(frame) for frame in FRAMES]
BYE = encode(frames.Bye())


def read(*chunks: bytes) -> list[Message]:
    """All messages, taken after each chunk."""
    reader = FrameReader()
    messages: list[Message] = []
    for chunk in chunks:
        reader.feed(chunk)
        messages += reader
    assert reader.pending == 0
    return messages


def test_nothing() -> None:
    assert read() == []
    assert read(b"", b"") == []


def test_whole_stream_at_once() -> None:
    assert read(STREAM) == SENT


def test_frame_by_frame() -> None:
    assert read(*FRAMES) == SENT


def test_byte_by_byte() -> None:
    assert read(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == SENT


def test_every_split_point() -> None:
    for cut in range(len(STREAM) + 1):
        assert read(STREAM[:cut], STREAM[cut:]) == SENT, cut


def test_every_two_split_points_of_two_frames() -> None:
    stream = FRAMES[0] + FRAMES[1]
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1):
            chunks = stream[:first], stream[first:second], stream[second:]
            assert read(*chunks) == SENT[:2], (first, second)


@pytest.mark.parametrize("index", range(len(FRAMES)))
def test_a_message_comes_with_its_last_byte(index: int) -> None:
    frame = FRAMES[index]
    reader = FrameReader()
    for size in range(len(frame)):
        assert reader.pending == size
        assert list(reader) == []
        reader.feed(frame[size : size + 1])
    assert list(reader) == [SENT[index]]
    assert reader.pending == 0


def test_feeding_only_stores() -> None:
    reader = FrameReader()
    reader.feed(b"\xff" * 8)
    assert reader.pending == 8


def test_messages_can_be_taken_one_at_a_time() -> None:
    reader = FrameReader()
    reader.feed(STREAM)
    assert [next(iter(reader)) for _ in SENT] == SENT


def test_what_comes_while_reading_is_read() -> None:
    reader = FrameReader()
    reader.feed(BYE)
    seen = 0
    for _ in reader:
        seen += 1
        if seen < 5:
            reader.feed(BYE)
    assert seen == 5


@pytest.mark.parametrize("length", [0, 1, 7, MAX_FRAME + 1, 1 << 31, 0xFFFF_FFFF])
def test_a_bad_length_is_found_from_the_header_alone(length: int) -> None:
    reader = FrameReader()
    reader.feed(BYE + length.to_bytes(4, "little") + b"\x07\0\0\0")
    messages = iter(reader)
    assert next(messages) == frames.Bye()  # what came before it is good
    with pytest.raises(ProtocolError):
        next(messages)


@pytest.mark.parametrize("row", vectors.load()["refused"], ids=lambda row: str(row["name"]))
def test_refused_vectors_in_a_stream(row: dict[str, str]) -> None:
    """Each is an error, an incomplete frame, or a good frame and the start of another."""
    data = bytes.fromhex(row["hex"])
    reader = FrameReader()
    reader.feed(BYE + data)
    messages: list[Message] = []
    try:
        messages += reader
    except ProtocolError:
        return
    length = int.from_bytes(data[:4], "little")
    assert reader.pending
    assert len(data) < 8 or length != len(data)


def test_an_unusable_stream_stays_unusable() -> None:
    """And holds nothing: a peer that keeps writing must not fill the server's memory."""
    reader = FrameReader()
    reader.feed(bytes(8))
    for _ in range(3):
        with pytest.raises(ProtocolError):
            list(reader)
        reader.feed(BYE * 10_000)
    assert reader.pending <= MAX_FRAME


@given(st.lists(MESSAGES, max_size=8), st.lists(st.integers(0, 2000), max_size=8))
def test_any_messages_cut_anywhere(messages: list[Message], cuts: list[int]) -> None:
    stream = b"".join(map(encode, messages))
    points = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    assert read(*(stream[a:b] for a, b in pairwise(points))) == messages


@given(st.lists(st.binary(max_size=100) | FRAMED, max_size=8))
def test_any_bytes_give_messages_or_a_protocol_error(chunks: list[bytes]) -> None:
    reader = FrameReader()
    messages: list[Message] = []
    try:
        for chunk in chunks:
            reader.feed(chunk)
            messages += reader
    except ProtocolError:
        pass
    stream = b"".join(chunks)
    assert stream.startswith(b"".join(map(encode, messages)))


@given(st.lists(MESSAGES, max_size=4), st.binary(max_size=40))
def test_messages_before_rubbish_are_read(messages: list[Message], rubbish: bytes) -> None:
    reader = FrameReader()
    reader.feed(b"".join(map(encode, messages)) + b"\0\0\0\0" + rubbish)
    seen: list[Message] = []
    try:
        seen += (message for message in reader)
    except ProtocolError:
        pass
    else:
        assert len(rubbish) < 4
    assert seen in ([], messages)
