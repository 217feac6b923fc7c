"""Mounts for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.mounts import Mount, mounted

from .sides import Sides


@pytest.fixture(params=["devfuse", "libfuse"])
def share(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mount]:
    """A share on either transport."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, f"--transport={request.param}") as share:
        yield share


@pytest.fixture
def place(sides: Sides, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """An empty directory as the mount of the module's ``sides`` and as the host show it."""
    name = request.node.originalname
    host = sides.mount.source / name
    host.mkdir()
    yield sides.mount.mountpoint / name, host
    sides.check_alive()
    shutil.rmtree(host)
