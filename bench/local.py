"""``bench local``: the local mount beside its neighbours, in one run; writes docs/benchmarks/local.

In each round all sides are mounted afresh, each on a source of its own. They take turns row by row,
in a random order, so that what the machine does meanwhile meets all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from random import Random

import click

from fsd.linux.libc import check, libc

from .local_page import charts, page, report_of
from .results import REST, Results
from .sides import Processes, Side, sides
from .usage import Usage
from .workloads import QUICK, ROWS, Place, Scale, clean, fill_origin, fill_source, rate

ROUNDS = 5
_CLONE_NEWNS = 0x20000  # sched.h
PAGES = Path(__file__).parents[1] / "docs" / "benchmarks"


@click.command()
@click.option("--quick", is_flag=True, help="One small round, for a test of this command.")
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(1))
@click.option("--sides", "wanted_sides", default="*", help="Names or patterns: native,fsd-*.")
@click.option("--rows", "wanted_rows", default="*", help="Names or patterns: stat-*,rest.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write local.md and its plots there (default: docs/benchmarks, if all of it is measured).",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write rates there.")
def local(
    quick: bool,
    rounds: int,
    wanted_sides: str,
    wanted_rows: str,
    output: Path | None,
    json_path: Path | None,
) -> None:
    """The local mount beside bindfs, libfuse's examples and a plain directory: some 15 minutes."""
    everything, notes = sides()
    names = _chosen(wanted_sides, [side.name for side in everything])
    rows = _chosen(wanted_rows, [*ROWS, REST])
    chosen = [side for side in everything if side.name in names]
    whole = not quick and len(chosen) == len(everything) and len(rows) == len(ROWS) + 1
    if os.geteuid() == 0:
        _mount_apart()
    results = measure(chosen, rows, 1 if quick else rounds, QUICK if quick else Scale())
    results.notes[:0] = notes
    report = report_of(results)
    plots = charts(results)
    text = page(report, results, [*plots])
    click.echo(text)
    if json_path is not None:
        raw = {"rates": results.rates, "rest": results.rest}
        json_path.write_text(json.dumps(report.as_json() | raw, indent=1) + "\n")
    folder = output or (PAGES if whole else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**plots, "local.md": text}.items():
            (folder / name).write_text(content)


def _mount_apart() -> None:
    """Mount where nobody else sees it, and see nobody else's mounts: agents look at each."""
    check(libc.unshare(_CLONE_NEWNS))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def _chosen(patterns: str, names: Sequence[str]) -> list[str]:
    """The names that one of the comma-separated patterns matches."""
    for pattern in patterns.split(","):
        if not any(fnmatch(name, pattern) for name in names):
            raise click.UsageError(f"{pattern!r} is none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, p) for p in patterns.split(","))]


def measure(chosen: Sequence[Side], rows: Sequence[str], rounds: int, scale: Scale) -> Results:
    """The rates of each row and side, one value a round."""
    results = Results([], list(rows), rounds)
    dice = Random(1)
    with tempfile.TemporaryDirectory(prefix="fsd-bench-") as name:
        scratch = Path(name)
        fill_origin(scratch / "origin", scale)
        for side in chosen:
            fill_source(scratch / side.name, scratch / "origin", scale)
            (scratch / f"{side.name}-mount").mkdir()
            if reason := _refusal(side, scratch, scale):
                results.notes.append(f"{side.name}: left out, it does not start: {reason}")
            else:
                results.sides.append(side)
        results.file_system = _file_system(scratch)
        for _ in range(rounds):
            results.loads.append(os.getloadavg()[0])
            with ExitStack() as stack:
                served = {
                    side.name: stack.enter_context(_served(side, scratch, scale))
                    for side in results.sides
                }
                for key in rows:
                    if key == REST:
                        _rest(results, served, scale)
                    else:
                        _row(results, key, served, dice)
            for side in results.sides:
                clean(scratch / side.name)
    return results


def _refusal(side: Side, scratch: Path, scale: Scale) -> str:
    """Why a side cannot be mounted here: what it takes is not to be had, or its options do not go
    together. "" if it can.
    """
    try:
        with _served(side, scratch, scale):
            return ""
    except (AssertionError, subprocess.CalledProcessError) as error:
        said = "\n".join([str(error), *getattr(error, "__notes__", [])])  # the server's words last
        return said.strip().splitlines()[-1]


def _file_system(path: Path) -> str:
    """Its type: with a directory's speed in it, every ratio to the directory is."""
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def _served(side: Side, scratch: Path, scale: Scale) -> Iterator[tuple[Place, Processes]]:
    source, mountpoint = scratch / side.name, scratch / f"{side.name}-mount"
    if side.serve is None:
        yield Place(source, source, scratch / "origin", scale), list
    else:
        with side.serve(source, mountpoint) as processes:
            yield Place(mountpoint, source, scratch / "origin", scale), processes


def _row(
    results: Results, key: str, served: dict[str, tuple[Place, Processes]], dice: Random
) -> None:
    for name in dice.sample([*served], len(served)):
        results.rates.setdefault(key, {}).setdefault(name, []).append(
            rate(ROWS[key], served[name][0])
        )


def _rest(results: Results, served: dict[str, tuple[Place, Processes]], scale: Scale) -> None:
    """All at once: a server at rest does not disturb the others, and one that does is seen."""
    time.sleep(scale.settle)

    def used() -> dict[str, float]:
        return {
            name: sum(Usage(pid).seconds for pid in processes())
            for name, (_, processes) in served.items()
        }

    before = used()
    time.sleep(scale.rest)
    for name, seconds in used().items():
        results.rest.setdefault(name, []).append(seconds - before[name])
