"""Hostile guests for a while: what script/fuzz does for as long as wanted, with a lenient bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 10
BOUND = 5000
"""Milliseconds: the machine may have other things to do. script/fuzz has 250."""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a tmpfs to share"),
    pytest.mark.timeout(400),
]


def test_a_while(tmp_path: Path) -> None:
    """The server lives, serves the other guest, gives back what guests that went had, and has no
    fault of its own in its log.
    """
    command = [sys.executable, "-m", "tests.fuzz.hostile", str(SECONDS)]
    done = subprocess.run(
        [*command, f"--bound={BOUND}", f"--keep={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=350,
        check=False,
    )
    logs = "".join(path.read_text()[-4000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:] + logs
    assert "seed " in done.stdout
    assert "EVENT" in done.stdout
