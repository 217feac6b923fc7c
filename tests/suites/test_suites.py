"""Other people's tests of watchers pass on fsd what they pass on a bind mount (pytest -m suites).

Those that do not pass yet, and those whose assertions hang on fractions of a second, are for
``script/suites``: docs/figures.md has what they fail.
"""

from __future__ import annotations

import os

import pytest

from tests.suites import sources
from tests.suites.known import NATIVELY, ON_FSD, ON_FSD_AT_TIMES
from tests.suites.run import run
from tests.suites.runners import FAILED, RUNNERS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes bind mounts, which only root can")

TRIES = 3
"""Its tests wait for 20 to 500 ms, on a machine that may be busy: each has so many chances."""
SUITES = {"watchfiles": sources.WATCHFILES}


def test_what_may_fail_belongs_to_a_suite() -> None:
    assert NATIVELY.keys() | ON_FSD.keys() | ON_FSD_AT_TIMES.keys() <= RUNNERS.keys()
    for name in NATIVELY.keys() & ON_FSD.keys():
        assert not NATIVELY[name].keys() & ON_FSD[name].keys()


@pytest.mark.suites
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SUITES)
def test_suite(name: str) -> None:
    source = SUITES[name]
    if not (source.path.exists() and sources.PYTHON.exists()):
        pytest.skip(f"script/bootstrap could not fetch {source.name} {source.version}")
    known = NATIVELY.get(name, {}).keys() | ON_FSD.get(name, {}).keys()
    at_times = ON_FSD_AT_TIMES.get(name, {}).keys()
    results = run(name, "fsd", [], [])
    for _ in range(TRIES - 1):
        again = [test for test, result in results.items() if result.status == FAILED]
        if again := [test for test in again if test not in known | at_times]:
            print(f"once more: {again}")
            results |= run(name, "fsd", again, [])
    if late := [test for test in at_times if results[test].status == FAILED]:
        results |= run(name, "fsd", late, ["--cache=never"])  # for which nothing is an excuse
    failed = {test: result.detail for test, result in results.items() if result.status == FAILED}
    for test, detail in failed.items():
        print(f"--- {test}\n{detail}")
    assert len(results) > 20
    assert failed.keys() == known
