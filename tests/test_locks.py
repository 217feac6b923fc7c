"""The lock files agree: what runs is what was tested."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def locked(name: str) -> set[str]:
    """Each requirement with its version and, in the lines below it, its hashes."""
    lines = (ROOT / name).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return {entry.partition(" ;")[0] for entry in text.replace(" \\\n   ", "").splitlines()}


def test_what_runs_is_a_part_of_what_is_tested() -> None:
    run = {entry.split()[0] for entry in locked("requirements-run.lock")}
    tested = {entry.split()[0] for entry in locked("requirements.lock")}
    assert "trio" in {entry.partition("==")[0] for entry in run}
    assert run <= tested
