"""The examples of virtual machines, as a newcomer runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lines(name: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.vm.{name}"], cwd=ROOT, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout.splitlines()


def test_demo() -> None:
    reported = [line.split("  ")[1] for line in lines("demo") if line.startswith("  guest")]
    assert reported == [
        "guest: CREATE /mnt/notes.txt", "guest: OPEN /mnt/notes.txt",
        "guest: MODIFY /mnt/notes.txt", "guest: CLOSE_WRITE,CLOSE /mnt/notes.txt",
        "guest: ATTRIB /mnt/notes.txt", "guest: MOVED_FROM /mnt/notes.txt",
        "guest: MOVED_TO /mnt/src/notes.txt", "guest: DELETE /mnt/src/notes.txt",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_vite() -> None:
    """Vite hears nothing of the host without an agent, and of the next edit with one."""
    reported = [line.strip() for line in lines("vite") if line.startswith("  page")]
    assert reported == [
        "page: -",
        "page: js-update main.js: export const greeting = 'good morning';",
    ]
