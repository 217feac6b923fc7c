"""Fixtures of the commands' tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.mounts import mounts_at


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A source with a file, and an empty mountpoint; at the end nothing is mounted there."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    (source / "file").write_text("content")
    yield source, mountpoint
    left = mounts_at(mountpoint)
    for _ in left:
        subprocess.run(["umount", "-l", mountpoint], check=True)
    assert not left
