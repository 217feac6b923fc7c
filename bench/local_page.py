"""The page of ``bench local``: tables for the terminal and Markdown, plots, the machine."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable
from pathlib import Path

from .chart import bars
from .report import Report, machine, number
from .results import GOALS, Results, Spread
from .sides import HP, HP_PASSTHROUGH, LL, NATIVE
from .workloads import ROWS

METHOD = """\
- Each side has a source of its own, on the same file system, and is mounted afresh in each round. \
All sides are mounted at the same time, where no other program sees them, and take turns row by \
row, in a random order.
- Ratios are taken within a round. Figures are medians, with the quartiles in brackets.
- The host's page cache and names are warm for all sides. Those of the mount are cold for "stat, \
fresh mount"; "again" comes after a run that is not timed. Reads begin with the file's pages in \
the host's cache, not in the mount's. Writes overwrite a file and include close(2), not fsync(2).
- What can be repeated is, for 0.2 s. Archive and repository lie outside of the mount.
- At rest: processor time in 5 s, after 8 s without requests, of the server and all it has \
started. With `coherent` the agent is woken by marks that any program of the machine sets: 0.3 ms \
for each, nothing without them.
"""

VERSIONS = (
    ("git", "describe", "--always", "--dirty"),
    ("pkg-config", "--print-provides", "fuse3"),
    ("bindfs", "--version"),
    ("git", "--version"),
)
"""What prints them."""


def report_of(results: Results) -> Report:
    """Goals and ratios first."""
    report = Report("local")
    rows = [key for key in results.rows if key in results.rates]
    if table := _goals(results):
        report.table("Goals", *table)
    data = [key for key in rows if ROWS[key].data]
    for base, wanted in ((NATIVE, rows), (LL, rows), (HP, data), (HP_PASSTHROUGH, data)):
        if results.has(base) and wanted:
            names = [side.name for side in results.sides if side.name != base]
            body = [
                [ROWS[key].title, *(str(results.ratio(key, name, base)) for name in names)]
                for key in wanted
            ]
            report.table(f"Relative to {base}; more is faster", ["", *names], body)
    if rows:
        heads = ["", *(side.name for side in results.sides)]
        body = [
            [f"{ROWS[key].title}, {ROWS[key].unit}",
             *(str(Spread.of(results.rates[key][side.name])) for side in results.sides)]
            for key in rows
        ]  # fmt: skip
        report.table("Rates", heads, body)
    if results.rest:
        cells = [_milliseconds(values) for values in results.rest.values()]
        report.table("At rest, ms of a processor in 5 s", ["", *results.rest], [["", *cells]])
    report.notes += results.notes
    return report


def _goals(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """Each goal whose row and sides were measured, for each of fsd's sides."""
    names = [side.name for side in results.sides if side.is_fsd]
    body = [
        [f"{ROWS[goal.row].title}: {goal.ratio} of {goal.base}",
         *(_verdict(results.ratio(goal.row, name, goal.base).median, goal.ratio)
           for name in names)]
        for goal in GOALS
        if goal.row in results.rates and results.has(goal.base)
    ]  # fmt: skip
    if results.rest:
        body.append(
            ["at rest: 0 ms", *(_at_rest(Spread.of(results.rest[name]).median) for name in names)]
        )
    return (["", *names], body) if names and body else None


def _verdict(ratio: float, goal: float) -> str:
    return f"{number(ratio)} {'met' if ratio >= goal else 'missed'}"


def _at_rest(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms {'met' if seconds < 0.00005 else 'missed'}"


def _milliseconds(values: list[float]) -> str:
    spread = Spread.of([value * 1000 for value in values])
    return f"{spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f})"


def charts(results: Results) -> dict[str, str]:
    """File name -> SVG: names and attributes, then data, relative to the directory itself."""
    if not results.has(NATIVE):
        return {}
    kinds: list[tuple[str, str, Callable[[str], bool]]] = [
        ("local-names.svg", "Names and attributes", lambda key: not ROWS[key].data),
        ("local-data.svg", "Data", lambda key: ROWS[key].data),
    ]
    names = [side.name for side in results.sides if side.name != NATIVE]
    found = {}
    for file, title, wanted in kinds:
        rows = [key for key in results.rates if wanted(key)]
        if rows and names:
            values = {
                ROWS[key].title: {name: results.ratio(key, name, NATIVE) for name in names}
                for key in rows
            }
            found[file] = bars(f"{title}, relative to the directory itself", values)
    return found


def page(report: Report, results: Results, plots: list[str]) -> str:
    """The Markdown."""
    on = machine()
    versions = ", ".join(filter(None, map(_output, VERSIONS)))
    loads = ", ".join(f"{load:.2f}" for load in results.loads)
    parts = [
        "# The local mount beside its neighbours\n",
        "Written by `python -m bench local`; do not edit.\n",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {on['cores']} processors "
        f"({on['cpu']}), Linux {on['kernel']}, Python {on['python']}, {results.file_system}; "
        f"{results.rounds} rounds; load of the machine as each began: {loads}. "
        f"Commit and versions: {versions}.\n",
        "\n".join(f"- **{side.name}**: {side.about}" for side in results.sides) + "\n",
    ]
    for index, (title, heads, rows) in enumerate(report.tables):
        parts += [f"## {title}\n", _table(heads, rows)]
        if index == 0:  # after the goals
            parts += [f"![{name}]({name})\n" for name in plots]
    parts += ["## How it is measured\n", METHOD]
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes) + "\n")
    return "\n".join(parts)


def _output(command: tuple[str, ...]) -> str:
    """What a command prints, "" if it is not there."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *("--:" for _ in heads[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
