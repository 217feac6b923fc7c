"""docs/decisions/README.md lists each decision once, by its title, in the order of their dates."""

from __future__ import annotations

import re
from pathlib import Path

DECISIONS = Path(__file__).parents[1] / "docs/decisions"
_ROW = re.compile(r"\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\(([a-z-]+\.md)\) \| (.+) \|")
_STATUS = re.compile(r"in force|replaced by \[.+\]\(([a-z-]+\.md)\)")


def rows() -> list[tuple[str, str, str, str]]:
    """Date, title, file and status."""
    found: list[tuple[str, str, str, str]] = _ROW.findall((DECISIONS / "README.md").read_text())
    return found


def test_each_is_listed_once() -> None:
    there = {path.name for path in DECISIONS.glob("*.md")} - {"README.md"}
    assert sorted(name for _, _, name, _ in rows()) == sorted(there)


def test_titles_are_those_of_the_pages() -> None:
    for _, title, name, _ in rows():
        assert (DECISIONS / name).read_text().splitlines()[0] == f"# {title}"


def test_dates_are_in_order() -> None:
    dates = [date for date, *_ in rows()]
    assert dates == sorted(dates)


def test_a_status_is_one_of_two() -> None:
    for _, title, _, status in rows():
        match = _STATUS.fullmatch(status)
        assert match, f"{title}: {status}"
        assert match[1] is None or (DECISIONS / match[1]).exists()
