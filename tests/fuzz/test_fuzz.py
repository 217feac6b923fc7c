"""Each target over its corpus, then for a while with new inputs: a minute in all."""

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

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: else less is reached")


@pytest.mark.parametrize("name", TARGETS)
def test_a_while(name: str, tmp_path: Path) -> None:
    """Also: the corpus is one, and it is gone through first."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    known = CORPUS / name
    assert len(list(known.iterdir())) > 20
    command = [sys.executable, "-m", "tests.fuzz.run", name, f"-max_total_time={SECONDS}"]
    command += ["-print_final_stats=1", f"-artifact_prefix={tmp_path}/", str(corpus), str(known)]
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
    assert int(line.rpartition(" ")[2]) > 500
