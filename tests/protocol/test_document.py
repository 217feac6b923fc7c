"""docs/protocol.md against the code: its tables, its limits, and the vectors at its end."""

from __future__ import annotations

import importlib
import re

import pytest

from protocol import frames
from protocol.frames import Op, Role

from . import norm, vectors

RERUN = "run: python -m tests.protocol.vectors"
LIMITS = norm.table("Limits")[1:]


def test_vectors_are_up_to_date() -> None:
    assert vectors.VECTORS.read_text() == vectors.text(vectors.generate()), RERUN


def test_document_is_up_to_date() -> None:
    assert vectors.split_document()[1] == vectors.section(vectors.load()), RERUN


def test_hex_in_the_document_is_that_of_the_vectors() -> None:
    """Read without the code that wrote it."""
    published: list[str] = []
    head = True
    for line in vectors.split_document()[1].splitlines():
        if not line.startswith("    "):
            head = True
        elif head:
            published.append(line.strip())
            head = False
        else:
            published[-1] += line.strip()
    loaded = vectors.load()
    rows = [row for key in ("frames", "rfc", "handles", "refused") for row in loaded[key]]
    assert published == [row["hex"] for row in rows]


def test_names_of_vectors_are_unique() -> None:
    for rows in vectors.load().values():
        if isinstance(rows, list):
            names = [row["name"] for row in rows]
            assert len(names) == len(set(names))


def test_version() -> None:
    title = norm.DOCUMENT.read_text().splitlines()[0]
    assert title == f"# The fsd protocol, version {frames.VERSION}"
    assert vectors.load()["version"] == frames.VERSION


def test_header() -> None:
    rows = [(int(o), kind, name) for o, kind, name, _ in norm.table("Frames")[1:]]
    assert rows == [(0, "u32", "length"), (4, "u16", "type"), (6, "u16", "zero")]


def test_guests_send_low_types_and_the_server_high_ones() -> None:
    heading = re.compile(r"^### From the (guest|server)$|^#### (\d+) ", re.MULTILINE)
    sender = ""
    for match in heading.finditer(norm.DOCUMENT.read_text()):
        if match[1]:
            sender = match[1]
        else:
            assert (int(match[2]) >= 16) == (sender == "server")


@pytest.mark.parametrize(
    ("title", "field", "enum"), [("1 Hello", "role", Role), ("19 Order", "op", Op)]
)
def test_named_values(title: str, field: str, enum: type[Role] | type[Op]) -> None:
    (meaning,) = (row[3] for row in norm.table(title) if row[2] == field)
    named = {int(number): word for number, word in re.findall(r"(\d+) (\w+)", meaning)}
    ours = {value: value.name.replace("BY_HAND", "marks") for value in enum}
    assert {number: word.lower() for number, word in named.items()} == {
        int(value): name.lower() for value, name in ours.items()
    }


def test_every_order_is_described() -> None:
    assert [row[0] for row in norm.table("Orders")[1:]] == [op.name for op in Op]


def test_hidden_nodes() -> None:
    rows = norm.table("Inside the mount")[1:]
    nodes = {name.strip("`"): int(nodeid, 16) for name, nodeid, _ in rows}
    assert nodes == {
        ".fsd": frames.FSD_DIR,
        ".fsd/control": frames.CONTROL,
        ".fsd/session": frames.SESSION,
        ".fsd/status": frames.STATUS,
        ".fsd/staging": frames.STAGING,
        ".fsd/alias": frames.ALIAS,
        ".fsd/checkpoint": frames.CHECKPOINT,
    }


@pytest.mark.parametrize("row", LIMITS, ids=lambda row: str(row[2]))
def test_limits(row: list[str]) -> None:
    module, _, name = row[2].strip("`").rpartition(".")
    assert float(row[1]) == getattr(importlib.import_module(module), name)


def test_links_lead_somewhere() -> None:
    text = norm.DOCUMENT.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title, _ in norm.sections()
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
