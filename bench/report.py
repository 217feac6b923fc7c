"""Figures and their goals: tables for people, JSON for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fsd.export import stats


@dataclass(frozen=True)
class Figure:
    """One measured value; ``goal`` is an upper bound, or a lower one if ``at_least``."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if there is none."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass
class Report:
    """The results of one command."""

    command: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add a Figure."""
        self.figures.append(Figure(*args, **kwargs))

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table, its numbers as text."""
        self.tables.append((title, list(heads), [list(row) for row in rows]))

    def show(self, console: Console) -> None:
        """Print it."""
        for title, heads, rows in self.tables:
            table = Table(title=title, title_justify="left")
            for index, head in enumerate(heads):
                table.add_column(head, justify="right" if index else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        if self.figures:
            self._show_figures(console)
        for note in self.notes:
            console.print(note, soft_wrap=True, highlight=False)

    def _show_figures(self, console: Console) -> None:
        table = Table(title=f"{self.command}: figures and goals", title_justify="left")
        for head in ("figure", "value", "goal", ""):
            table.add_column(head, justify="left" if head == "figure" else "right")
        for figure in self.figures:
            sign = ">=" if figure.at_least else "<="
            goal = "-" if figure.goal is None else f"{sign} {number(figure.goal)} {figure.unit}"
            verdict = {True: "[green]met", False: "[red]missed", None: ""}[figure.met]
            table.add_row(figure.name, f"{number(figure.value)} {figure.unit}", goal, verdict)
        console.print(table)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "command": self.command,
            "machine": machine(),
            "figures": [
                {"name": f.name, "value": f.value, "unit": f.unit, "goal": f.goal, "met": f.met}
                for f in self.figures
            ],
            "tables": [
                {"title": title, "rows": [dict(zip(heads, row, strict=True)) for row in rows]}
                for title, heads, rows in self.tables
            ],
            "notes": self.notes,
        }


def number(value: float) -> str:
    """Three significant digits, with thousands separators."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of them lie. There must be some."""
    found = stats.percentile(values, share)
    assert found is not None
    return found


median = statistics.median


def machine() -> dict[str, Any]:
    """The machine of the measurement. The load shows how idle it was."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }
