"""File-system workloads in a real guest: fsd compared with Debian's virtiofsd in C, which does not
deliver events.

One guest mounts a share of each server and cache mode; the sides take turns in a random order,
workload by workload.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

from harness import debian
from harness.share_server import shared
from harness.vm import Guest, GuestProcess, c_virtiofsd, guest

from . import guest_workloads
from .guest_workloads import WORKLOADS, tree
from .report import Report, median, number
from .tree import fill

ROUNDS = 9
C_NAME = {"auto": "auto", "never": "none"}
"""A cache mode in the words of virtiofsd in C."""
GOAL, DATA_GOAL = 0.8, 1.0
DATA = ("sequential", "random")
TIMEOUT = 120.0


def measure() -> Report:
    """Run it: some 5 minutes."""
    report = Report("virtiofs")
    rates: dict[tuple[str, str], list[float]] = {}
    dice = Random(1)  # a server leaves the VMM's threads on other processors for the next
    with _machine() as (vm, sides):
        program = vm.start(["python3", "-c", Path(guest_workloads.__file__).read_text()])
        for index in range(ROUNDS + 1):
            for title in WORKLOADS:
                for side in dice.sample(sides, len(sides)):
                    rate = _rate(program, title, side)
                    if index:  # the first one fills the caches of the host
                        rates.setdefault((title, side), []).append(rate)
        program.write(None)
        vm.power_off()
    for mode in C_NAME:
        rows = []
        for title, (_, unit, _) in WORKLOADS.items():
            ours, theirs = rates[title, f"fsd-{mode}"], rates[title, f"c-{mode}"]
            ratio = median([a / b for a, b in zip(ours, theirs, strict=True)])
            rows.append([f"{title}, {unit}", number(median(theirs)), number(median(ours)),
                         f"{ratio:.2f}"])  # fmt: skip
            goal = DATA_GOAL if title.startswith(DATA) else GOAL
            report.add(f"{title}, --cache={mode}", ratio, "of C", goal=goal, at_least=True)
        heads = [f"--cache={mode}", "virtiofsd (C)", "fsd", "ratio"]
        report.table(f"medians of {ROUNDS} rounds, the sides in turn", heads, rows)
    return report


def _rate(program: GuestProcess, title: str, side: str) -> float:
    program.write(f"{title} /{side}\n".encode())
    return float(program.line(TIMEOUT))


@contextmanager
def _machine() -> Iterator[tuple[Guest, list[str]]]:
    """A guest with all shares mounted, and their names."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = scratch / "first"
        _fill(first)
        shares = {}
        for mode, c_name in C_NAME.items():
            for side in (f"c-{mode}", f"fsd-{mode}"):
                shutil.copytree(first, scratch / side, symlinks=True)
                if side.startswith("c"):
                    server = c_virtiofsd(scratch / side, "-o", f"cache={c_name}")
                    shares[side] = stack.enter_context(server)
                else:
                    served = shared(scratch / side, cache=mode)
                    shares[side] = stack.enter_context(served).paths[0]
        vm = stack.enter_context(guest(shares))
        for side in shares:
            vm.mount(side, f"/{side}")
        vm.run(f"cp -r /{next(iter(shares))}/git /tmp/")
        yield vm, list(shares)


def _fill(source: Path) -> None:
    """The tree, and git for the guest."""
    fill(source, map(Path, tree(str(source))))
    with tempfile.TemporaryDirectory() as scratch:
        debian.extract(["git", "libpcre2-8-0"], Path(scratch))
        (source / "git").mkdir()
        found = [Path(scratch, "usr/bin/git"), *Path(scratch).rglob("libpcre2-8.so.0")]
        for path in found:
            shutil.copy(path, source / "git")
