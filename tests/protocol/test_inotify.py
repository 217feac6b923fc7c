"""The parser of inotify's queue: tables, damage, and what this machine's kernel writes."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.inotify import HEADER, RawEvent, parse_events
from protocol.masks import EVENTS, Mask

from . import kernel
from .strategies import integers

NAMES = st.binary(max_size=255).filter(lambda name: b"\0" not in name)
EVENT_LISTS = st.lists(
    st.builds(
        RawEvent, st.integers(-(1 << 31), (1 << 31) - 1), integers("u32"), integers("u32"), NAMES
    ),
    max_size=6,
)


def written(event: RawEvent, padding: int | None = None) -> bytes:
    """As the kernel writes it: names end with NUL and fill up to a multiple of 16."""
    size = len(event.name)
    length = (size // 16 + 1) * 16 if size else 0
    if padding is not None:
        length = size + padding
    header = struct.pack("=iIII", event.wd, event.mask, event.cookie, length)
    return header + event.name.ljust(length, b"\0")


def test_header_is_the_kernels() -> None:
    assert HEADER.size == 16
    path = Path("/usr/include/linux/inotify.h")
    fields = ["__s32 wd", "__u32 mask", "__u32 cookie", "__u32 len"]
    if path.exists():
        body = re.search(r"struct inotify_event \{(.*?)\};", path.read_text(), re.DOTALL)
        assert body is not None
        found = re.findall(r"(__[su]32)\s+(\w+);", body[1])
        assert [" ".join(pair) for pair in found] == fields
    assert HEADER.format == "=iIII"


TABLE: list[tuple[list[RawEvent], str]] = [
    ([], ""),
    ([RawEvent(1, 0x400, 0, b"")], "01000000 00040000 00000000 00000000"),
    (
        [RawEvent(1, 0x100, 0, b"a")],
        "01000000 00010000 00000000 10000000 61000000000000000000000000000000",
    ),
    (
        [RawEvent(2, 0x40, 7, b"caf\xe9"), RawEvent(3, 0x80, 7, b"n" * 16)],
        "02000000 40000000 07000000 10000000 636166e9000000000000000000000000"
        "03000000 80000000 07000000 20000000" + "6e" * 16 + "00" * 16,
    ),
    ([RawEvent(-1, 0x4000, 0, b"")], "ffffffff 00400000 00000000 00000000"),
]


@pytest.mark.parametrize(("events", "data"), TABLE)
def test_table(events: list[RawEvent], data: str) -> None:
    buffer = bytes.fromhex(data)
    if HEADER.unpack(struct.pack("<IIII", 1, 2, 3, 4)) == (1, 2, 3, 4):  # little-endian
        assert list(parse_events(buffer)) == events
        assert b"".join(map(written, events)) == buffer
    assert list(parse_events(b"".join(map(written, events)))) == events


def test_every_truncation_is_refused_or_ends_an_event() -> None:
    events = [event for row, _ in TABLE for event in row]
    buffer = b"".join(map(written, events))
    ends = [len(b"".join(map(written, events[:count]))) for count in range(len(events) + 1)]
    for size in range(len(buffer)):
        if size in ends:
            assert list(parse_events(buffer[:size])) == events[: ends.index(size)]
        else:
            with pytest.raises(ValueError, match="inotify: "):
                list(parse_events(buffer[:size]))


@pytest.mark.parametrize("padding", [0, 1, 2, 15, 16, 17, 255])
def test_any_padding(padding: int) -> None:
    event = RawEvent(1, 0x100, 0, b"name")
    assert list(parse_events(written(event, padding))) == [event]


@given(EVENT_LISTS)
def test_events_survive(events: list[RawEvent]) -> None:
    assert list(parse_events(b"".join(map(written, events)))) == events


@given(st.binary(max_size=120))
def test_any_bytes_are_events_or_a_value_error(data: bytes) -> None:
    try:
        events = list(parse_events(data))
    except ValueError:
        return
    assert sum(HEADER.size + len(event.name) for event in events) <= len(data)


# This kernel


def test_names_of_every_length_from_the_kernel() -> None:
    with kernel.directory() as path, kernel.inotify() as fd:
        wd = kernel.add_watch(fd, path, Mask.CREATE)
        names = [b"\xff" * size for size in range(1, 256)]
        for name in names:
            os.close(os.open(os.fsencode(path) + b"/" + name, os.O_CREAT | os.O_WRONLY))
        events = list(parse_events(os.read(fd, 1 << 20)))
    assert events == [RawEvent(wd, Mask.CREATE, 0, name) for name in names]


def test_kinds_from_the_kernel() -> None:
    with kernel.directory() as path, kernel.inotify() as fd:
        wd = kernel.add_watch(fd, path, EVENTS)
        (path / "d").mkdir()
        (path / "d").rename(path / "e")
        (path / "e").rmdir()
        path.rmdir()
        events = list(parse_events(os.read(fd, 1 << 20)))
        path.mkdir()  # for the clean-up
    isdir = Mask.ISDIR
    assert [(event.mask, event.name) for event in events] == [
        (Mask.CREATE | isdir, b"d"),
        (Mask.MOVED_FROM | isdir, b"d"),
        (Mask.MOVED_TO | isdir, b"e"),
        (Mask.DELETE | isdir, b"e"),
        (Mask.DELETE_SELF, b""),
        (Mask.IGNORED, b""),
    ]
    assert {event.wd for event in events} == {wd}
    assert events[1].cookie == events[2].cookie != 0
