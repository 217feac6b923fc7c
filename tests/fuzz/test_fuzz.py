"""Each target over its corpus, then for a while with new inputs: a minute in all, or more on a
machine that is busy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).with_name("corpus")
SECONDS = 20
INPUTS = 500
"""At least so many are tried, however slow the machine is."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: else less is reached")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_while(name: str, tmp_path: Path) -> None:
    """Also: the corpus is one, and it is gone through first."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    known = CORPUS / name
    assert len(list(known.iterdir())) > 20
    tried = 0
    for _ in range(4):
        tried += fuzzed(name, tmp_path, corpus, known)
        if tried > INPUTS:
            return
    raise AssertionError(f"only {tried} inputs in {4 * SECONDS} s")


def fuzzed(name: str, tmp_path: Path, *corpora: Path) -> int:
    """Run the fuzzer; how many inputs it has tried."""
    command = [sys.executable, "-m", "tests.fuzz.run", name, f"-max_total_time={SECONDS}"]
    command += ["-print_final_stats=1", f"-artifact_prefix={tmp_path}/", *map(str, corpora)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (line,) = (x for x in done.stderr.splitlines() if "number_of_executed_units" in x)
    return int(line.rpartition(" ")[2])
