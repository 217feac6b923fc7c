"""The example of a virtual machine, as a newcomer runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.vm.demo"], cwd=ROOT, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    told = [line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  guest")]
    assert told == [
        "guest: CREATE /mnt/notes.txt", "guest: OPEN /mnt/notes.txt",
        "guest: MODIFY /mnt/notes.txt", "guest: CLOSE_WRITE,CLOSE /mnt/notes.txt",
        "guest: ATTRIB /mnt/notes.txt", "guest: MOVED_FROM /mnt/notes.txt",
        "guest: MOVED_TO /mnt/src/notes.txt", "guest: DELETE /mnt/src/notes.txt",
    ]  # fmt: skip
