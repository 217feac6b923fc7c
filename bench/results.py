"""What ``bench local`` has measured: rates by row and side, their spread, ratios, goals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from .report import number
from .sides import HP, HP_PASSTHROUGH, LL, NATIVE, Side

REST = "rest"


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


@dataclass
class Results:
    """One value a round; ``rates`` in the row's unit a second, ``rest`` in seconds of a CPU."""

    sides: list[Side]
    rows: list[str]
    rounds: int
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rest: dict[str, list[float]] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)  # as each round began
    file_system: str = ""
    notes: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Whether the side was measured."""
        return any(side.name == name for side in self.sides)

    def ratio(self, row: str, side: str, base: str) -> Spread:
        """One side's rate relative to another's of the same round."""
        pairs = zip(self.rates[row][side], self.rates[row][base], strict=True)
        return Spread.of([ours / theirs for ours, theirs in pairs])


@dataclass(frozen=True)
class Goal:
    """A ratio to reach, in one run."""

    row: str
    base: str
    ratio: float


GOALS = [
    *(Goal(row, NATIVE, 0.9) for row in ("stat-warm", "find", "git-status")),
    *(Goal(row, LL, 1.0) for row in ("stat-cold", "create", "open-read", "untar", "clone", "rm")),
    *(
        Goal(row, base, ratio)
        for base, ratio in ((NATIVE, 0.9), (HP, 1.0), (HP_PASSTHROUGH, 1.0))
        for row in ("read-128k", "read-1m", "write-128k", "write-1m")
    ),
    Goal("read-random", NATIVE, 0.8),
]
"""Beside them: no processor time at rest."""
