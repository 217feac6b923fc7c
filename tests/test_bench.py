"""`python -m bench local` runs, and its page has a figure of each row on each side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.chart import bars
from bench.results import Spread
from bench.sides import choices
from bench.workloads import ROWS

ROOT = Path(__file__).parents[1]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "local", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def tables(page: str) -> dict[str, dict[str, list[str]]]:
    """Heading -> the first cell of a line -> the others."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| "):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(heading, {})[first] = cells
    return found


@pytest.mark.slow
def test_the_page_has_all_rows_and_sides(tmp_path: Path) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse: nothing can be mounted")
    done = bench("--quick", "--output", tmp_path, "--json", tmp_path / "rates.json")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == [
        "local-data.svg", "local-names.svg", "local.md", "rates.json",
    ]  # fmt: skip
    found = tables((tmp_path / "local.md").read_text())
    rates = json.loads((tmp_path / "rates.json").read_text())["rates"]
    assert list(rates) == list(ROWS)
    sides = found["Rates"][""]
    assert {"native", "bindfs", "ll", "ll-never", "hp", "hp-never", "hp-passthrough"} < set(sides)
    assert any(side.startswith("fsd-devfuse") for side in sides)
    assert any(side.startswith("fsd-libfuse") for side in sides)
    for row in ROWS.values():
        assert all(found["Rates"][f"{row.title}, {row.unit}"])
        assert all(found["Relative to native; more is faster"][row.title])
        assert all(found["Relative to ll; more is faster"][row.title])
    verdicts = {cell.split()[-1] for cells in list(found["Goals"].values())[2:] for cell in cells}
    assert verdicts <= {"met", "missed"}
    assert len(list(found["At rest, ms of a processor in 5 s"].values())[-1]) == len(sides)
    for plot in tmp_path.glob("*.svg"):
        text = " ".join(ElementTree.parse(plot).getroot().itertext())
        assert all(side in text for side in sides if side != "native")


def test_a_side_and_a_row_are_measured_alone(tmp_path: Path) -> None:
    done = bench("--quick", "--sides", "native", "--rows", "stat-*", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r.json").read_text())
    assert {key: [*sides] for key, sides in measured["rates"].items()} == {
        "stat-cold": ["native"], "stat-warm": ["native"],
    }  # fmt: skip


def test_an_unknown_side_is_an_error() -> None:
    done = bench("--quick", "--sides", "native,nfs")
    assert done.returncode == 2
    assert "'nfs' is none of native, fsd-" in done.stderr


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("  --cache [coherent|never]  What the kernel keeps.\n", ["coherent", "never"]),
        ("  --cache [coherent|\n        never]\n", ["coherent", "never"]),
        ("  --cache-size INTEGER\n  --transport [devfuse|libfuse]\n", []),
    ],
)
def test_what_an_option_takes(shown: str, expected: list[str]) -> None:
    assert choices(shown, "--cache") == expected


def test_quartiles() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert str(Spread.of([0.5])) == "0.5"


def test_a_longer_bar_is_a_larger_ratio() -> None:
    text = bars("A & B", {"row": {"fsd-a": Spread(1, 1, 1), "b": Spread(0.1, 0.05, 0.2)}})
    root = ElementTree.fromstring(text)
    shapes = [(shape.get("x"), float(shape.get("width", 0))) for shape in root if shape.get("fill")]
    ours, theirs = [width for x, width in shapes if x == "170.0"]
    assert ours > theirs > 0
