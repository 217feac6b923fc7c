"""Says what came out, and judges what the well-behaved guest waited."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .neighbour import Wait


@dataclass
class Result:
    """What came out."""

    seed: int
    failures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def say(self, text: str) -> None:
        self.lines.append(text)


def percentiles(waits: list[Wait]) -> str:
    seconds = sorted(wait.seconds for wait in waits)
    if len(seconds) < 2:
        return f"{len(seconds)} samples"
    points = statistics.quantiles(seconds, n=1000, method="inclusive")
    shown = ", ".join(
        f"{name} {points[at] * 1e3:.2f}"
        for name, at in (("p50", 499), ("p90", 899), ("p99", 989), ("p99.9", 998))
    )
    return f"{shown}, worst {seconds[-1] * 1e3:.1f} ms ({len(seconds)})"


def culprits(wait: Wait, journals: list[Path]) -> str:
    """What was under way during a wait, most often first."""
    begun, ended = wait.begun, wait.begun + wait.seconds
    found: Counter[str] = Counter()
    longest: dict[str, float] = {}
    for journal in journals:
        with journal.open() as file:
            for line in file:
                first, last, what = line.rstrip("\n").split(" ", 2)
                a, b = float(first), float(last)
                if b >= begun and a <= ended:
                    found[what] += 1
                    longest[what] = max(longest.get(what, 0.0), b - a)
    shown = sorted(found, key=lambda what: -longest[what])[:8]
    return ", ".join(f"{what} x{found[what]} (to {longest[what] * 1e3:.0f} ms)" for what in shown)


def without_control(wait: Wait, late: list[tuple[float, float]]) -> float:
    """Seconds of a wait that are the server's: neither side was short of a processor, and the
    control was not late at the time.
    """
    overlap = sum(
        max(0.0, min(at + over, wait.begun + wait.seconds) - max(at, wait.begun))
        for at, over in late
    )
    return max(0.0, wait.seconds - max(wait.machine, overlap))


def judge_waits(
    result: Result, kind: str, waits: list[Wait], late: list[tuple[float, float]],
    bound: float, journals: list[Path],
) -> None:  # fmt: skip
    result.say(f"{kind}: {percentiles(waits)}")
    for what in sorted({wait.what for wait in waits}):
        if len({wait.what for wait in waits}) > 1:
            result.say(f"  {what}: {percentiles([w for w in waits if w.what == what])}")
    for wait in sorted(waits, key=lambda w: -w.seconds)[:3]:
        served = without_control(wait, late) * 1e3
        result.say(
            f"  {wait.what} waited {wait.seconds * 1e3:.1f} ms, {served:.1f} of them the server's; "
            f"under way: {culprits(wait, journals)}"
        )
    over = [wait for wait in waits if wait.seconds * 1e3 > bound]
    ours = [wait for wait in over if without_control(wait, late) * 1e3 > bound]
    if over:
        result.say(
            f"  {len(over)} over {bound:.0f} ms, of which {len(over) - len(ours)} are the "
            "machine's (no processor, or the control was late too)"
        )
    if ours:
        worst = max(ours, key=lambda w: without_control(w, late))
        result.fail(
            f"{kind}: {len(ours)} waits over {bound:.0f} ms, the worst "
            f"{worst.seconds * 1e3:.0f} ms ({worst.what}); under way: {culprits(worst, journals)}"
        )
