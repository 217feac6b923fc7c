"""docs/decisions/windows.md has a row for each constant of ``windows``, with its value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fsd.pacing import windows

TABLE = Path(__file__).parents[2] / "docs/decisions/windows.md"
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "events": 1, "times": 1}


def test_every_window_is_explained() -> None:
    rows = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name := re.fullmatch(r"`([A-Z_]+)`", cells[0]):
            number, unit = cells[1].split()
            rows[name[1]] = float(number.replace(",", "")) * UNITS[unit]
            assert all(cells[2:4]), f"{name[1]}: what breaks?"
    values = {name: value for name, value in vars(windows).items() if name.isupper()}
    assert rows == pytest.approx(values)
