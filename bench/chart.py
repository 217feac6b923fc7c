"""Bar charts as SVG, by hand: groups of horizontal bars on a logarithmic axis, with quartiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from .results import Spread

OURS = ("#08519c", "#3182bd", "#6baed6", "#bdd7e7")  # blues
OTHERS = ("#737373", "#d94801", "#fdae6b", "#54278f", "#bcbddc", "#238b45")
LEFT, WIDTH, BAR, GAP = 170, 620, 9, 12  # pixels
TOP, LEGEND, LINE = 36, 150, 18  # LEGEND: the width of an entry
DECADE = 10.0


def bars(title: str, values: Mapping[str, Mapping[str, Spread]]) -> str:
    """A group of bars for each key, a bar in it for each name; 1 is a line of its own."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    colours = _colours(names)
    spreads = [spread for group in values.values() for spread in group.values()]
    low = DECADE ** math.floor(math.log10(min(min(s.low for s in spreads), 0.5)))
    high = max(max(s.high for s in spreads), 1.0) * 1.1

    def x(value: float) -> float:
        return LEFT + WIDTH * math.log(max(value, low) / low) / math.log(high / low)

    per_line = (LEFT + WIDTH) // LEGEND
    top = TOP + LINE * math.ceil(len(names) / per_line)
    heights = [len(group) * BAR + GAP for group in values.values()]
    bottom = top + sum(heights)
    shapes = [_text(10, 20, title, size=14, anchor="start")]
    for index, name in enumerate(names):
        left, y = 10 + index % per_line * LEGEND, TOP + index // per_line * LINE
        shapes.append(_bar(left, y - 2, 12, colours[name]))
        shapes.append(_text(left + 18, y + 7, name, anchor="start"))
    for value in _ticks(low, high):
        strong = value == 1.0
        shapes.append(_line(x(value), top, x(value), bottom, "#000" if strong else "#ddd"))
        shapes.append(_text(x(value), bottom + 15, f"{value:g}", anchor="middle"))
    edge = float(top)
    for (label, group), height in zip(values.items(), heights, strict=True):
        shapes.append(_text(LEFT - 8, edge + height / 2 + 4, label))
        for index, (name, spread) in enumerate(group.items()):
            line = edge + GAP / 2 + index * BAR
            shapes.append(_bar(LEFT, line, x(spread.median) - LEFT, colours[name]))
            middle = line + BAR / 2 - 0.5
            shapes.append(_line(x(spread.low), middle, x(spread.high), middle, "#000"))
        edge += height
    size = LEFT + WIDTH + 40, bottom + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="{size[0]}" height="{size[1]}" fill="#fff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _colours(names: list[str]) -> dict[str, str]:
    """fsd's in shades of one colour."""
    ours = [name for name in names if name.startswith("fsd")]
    others = [name for name in names if name not in ours]
    return {
        name: palette[index % len(palette)]
        for group, palette in ((ours, OURS), (others, OTHERS))
        for index, name in enumerate(group)
    }


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade."""
    exponents = range(round(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [round(digit * DECADE**e, 6) for e in exponents for digit in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "end") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


def _bar(x: float, y: float, width: float, colour: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{BAR - 1}"'
    return f'<rect {place} fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}"/>'
