"""docs/limits.md beside the code: each limit is there, with the number that the code has.

A constant is cited in the column of limits as `NAME` or `module.NAME`, and its value stands in the
same cell: 1 MiB, 4,096, 20 ms.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ["what", "limit", "why", "what the guest gets"]
UNITS = {
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "Mi": 1 << 20,
    "ms": 1e-3, "s": 1, "%": 0.01, "": 1,
}  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?:\s?(KiB|MiB|GiB|TiB|Mi|ms|s|%)(?!\w))?")
_CONSTANT = re.compile(r"`(?:([a-z_]+)\.)?(_?[A-Z][A-Z_]+)`")
_FILE = re.compile(r"`([a-z_/]+\.py)`")


class Row(NamedTuple):
    """A row of the table."""

    what: str
    limit: str
    why: str
    guest: str


def table() -> list[Row]:
    """The rows of docs/limits.md."""
    lines = (ROOT / "docs/limits.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert cells[0] == COLUMNS
    assert all(set(cell) == {"-"} for cell in cells[1])
    assert {len(row) for row in cells} == {4}, "a row has other columns"
    return [Row(*row) for row in cells[2:]]


@cache
def sources() -> dict[Path, str]:
    return {
        path: path.read_text()
        for package in ("fsd", "guest_tools", "protocol")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.name.endswith("_pb2.py")
    }


def value(module: str, name: str) -> float:
    """What a constant is in the code; where modules share a name, the module is to be cited."""
    places = [
        path
        for path, text in sources().items()
        if re.search(rf"^{name}\b(?:, [A-Z_]+)* = ", text, re.MULTILINE)
        and module in ("", path.stem)
    ]
    assert places, f"no module has {name}"
    found = set()
    for path in places:
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found.add(getattr(importlib.import_module(dotted), name))
    assert len(found) == 1, f"{name} is {found} in {[path.stem for path in places]}"
    (number,) = found
    return float(number)


def numbers(cell: str) -> list[float]:
    """The numbers that people read in a cell."""
    return [float(digits.replace(",", "")) * UNITS[unit] for digits, unit in _NUMBER.findall(cell)]


@pytest.mark.parametrize("row", table(), ids=lambda row: row.what[:40])
def test_a_row_says_what_the_code_does(row: Row) -> None:
    assert all(row)
    for module, name in _CONSTANT.findall(row.limit):
        assert any(stated == pytest.approx(value(module, name)) for stated in numbers(row.limit)), (
            f"{name} is {value(module, name)}, the row says {row.limit}"
        )
    for file in _FILE.findall(row.limit):
        assert any(path.as_posix().endswith(f"/{file}") for path in sources()), file


def test_each_limit_has_a_row() -> None:
    """What ends in LIMIT bounds what somebody outside can make the server do."""
    cited = {name for row in table() for _, name in _CONSTANT.findall(row.limit)}
    there = {
        name
        for path, text in sources().items()
        if path.is_relative_to(ROOT / "fsd")
        for name in re.findall(r"^([A-Z][A-Z_]*_LIMIT)\b.* = ", text, re.MULTILINE)
    }
    assert len(there) > 20
    assert there <= cited, f"no row in docs/limits.md: {sorted(there - cited)}"
