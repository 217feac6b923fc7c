"""docs/protocol.md as data, and a codec made of nothing but its tables.

The document is the norm: tests compare the code with what is read here, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "pad7": 7}
Value = int | bytes


class Field(NamedTuple):
    """A row of a field table. ``offset`` is None right after a field of variable length."""

    offset: int | None
    kind: str
    name: str


class Layout(NamedTuple):
    """One table: a frame's body, or an RFC structure."""

    title: str
    fields: list[Field]


def sections() -> Iterator[tuple[str, list[list[str]]]]:
    """Each heading with the rows of the tables below it, without their heads."""
    for part in re.split(r"^#+ ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        rows = [
            [cell.strip() for cell in line[1:-1].split("|")]
            for line in body.splitlines()
            if line.startswith("|") and not set(line) <= set("|- ")
        ]
        yield title, rows


def table(title: str) -> list[list[str]]:
    """The rows below one heading, heads included."""
    return next(rows for found, rows in sections() if found == title)


def _layout(title: str, rows: list[list[str]]) -> Layout:
    return Layout(
        title,
        [
            Field(int(offset) if offset.isdigit() else None, kind, name)
            for offset, kind, name, _meaning in rows
            if offset.isdigit() or offset == "then"
        ],
    )


@cache
def messages() -> dict[int, Layout]:
    """Type code -> the message's name and fields."""
    found = {}
    for title, rows in sections():
        if numbered := re.fullmatch(r"(\d+) (\w+)", title):
            found[int(numbered[1])] = _layout(numbered[2], rows)
    return found


@cache
def rfc() -> dict[str, Layout]:
    """The RFC's structures by their headings."""
    return {t: _layout(t, rows) for t, rows in sections() if re.fullmatch(r"v\d \w+", t)}


def pack(layout: Layout, values: dict[str, Value], start: int = 0) -> bytes:
    """The bytes that the table asks for; a check of each offset on the way."""
    data = bytearray(start)
    for field in layout.fields:
        assert field.offset in (None, len(data)), f"{layout.title}: {field} is at {len(data)}"
        value = values.get(field.name, 0)
        if field.name == "namelen":
            value = len(_bytes(values["name"]))
        if field.kind in SIZES:
            assert isinstance(value, int)
            data += value.to_bytes(SIZES[field.kind], "little")
        else:
            value = _bytes(value)
            if field.kind == "bytes":
                data += len(value).to_bytes(2, "little")
            data += value
    return bytes(data[start:])


def frame(code: int, values: dict[str, Value]) -> bytes:
    """A whole frame by the tables."""
    body = pack(messages()[code], values, start=8)
    return (8 + len(body)).to_bytes(4, "little") + code.to_bytes(2, "little") + bytes(2) + body


def _bytes(value: Value) -> bytes:
    assert isinstance(value, bytes)
    return value
