"""Run suites of others on a mount, with the changes made on the host: script/suites NAME..."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.suites.known import NATIVELY, ON_FSD, ON_FSD_AT_TIMES
from tests.suites.place import place
from tests.suites.runners import FAILED, RUNNERS, Results


def run(name: str, kind: str, tests: list[str], options: list[str]) -> Results:
    """The suite's results at a place of its own; ``kind`` is `bind` or `fsd`."""
    with tempfile.TemporaryDirectory(prefix="fsd-suite-") as folder:
        base, work = Path(folder, "place"), Path(folder, "work")
        base.mkdir()
        work.mkdir()
        with place(base, kind, *options) as made:
            return RUNNERS[name](made, work, tests)


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/suites", description=__doc__)
    parser.add_argument("name", nargs="+", choices=[*RUNNERS, "all"])
    parser.add_argument("--kind", choices=["bind", "fsd"], action="append", help="default: both")
    parser.add_argument(
        "--test", action="append", default=[], help="only this one, as it is listed"
    )
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--verbose", action="store_true", help="say how each test failed")
    parser.add_argument("--transport", choices=["devfuse", "libfuse"], help="of fsd mount")
    given = parser.parse_args()
    for name in RUNNERS if "all" in given.name else given.name:
        for kind in given.kind or ["bind", "fsd"]:
            for _ in range(given.repeat):
                start = time.monotonic()
                asked = given.transport if kind == "fsd" else None
                options = [f"--transport={asked}"] if asked else []
                results = run(name, kind, given.test, options)
                report(name, kind, results, time.monotonic() - start, given.verbose)


def report(name: str, kind: str, results: Results, seconds: float, verbose: bool) -> None:
    statuses = [result.status for result in results.values()]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    print(f"{name} on {kind}: {counts}, in {seconds:.0f} s", flush=True)
    for test, result in results.items():
        if result.status == FAILED:
            reason = NATIVELY.get(name, {}).get(test)
            if kind == "fsd" and not reason:
                reason = (ON_FSD.get(name, {}) | ON_FSD_AT_TIMES.get(name, {})).get(test)
            print(f"  {test}" + (f" (known: {reason})" if reason else ""))
            if verbose:
                print("\n".join(f"    | {line}" for line in result.detail.splitlines()))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
