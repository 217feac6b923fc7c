"""Fixtures of the core tests: an export on an empty directory; no mount, no agent process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .fuse_guest import GuestKernel
from .support import World

Worlds = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Worlds]:
    """Makes exports of one directory, with other limits than the usual ones."""
    source = tmp_path / "source"
    source.mkdir()
    worlds: list[World] = []

    def make(
        *,
        outbox_limit: int | None = None,
        watch_limit: int | None = None,
        overflow_after_loss: bool = False,
    ) -> World:
        world = World(
            source,
            outbox_limit=outbox_limit,
            watch_limit=watch_limit,
            overflow_after_loss=overflow_after_loss,
        )
        worlds.append(world)
        return world

    before = set(os.listdir("/proc/self/fd"))
    yield make
    for world in worlds:
        world.close()
    assert set(os.listdir("/proc/self/fd")) <= before, "descriptors were left open"


@pytest.fixture
def world(make_world: Worlds) -> World:
    """An export of an empty directory, with the usual limits."""
    return make_world()


@pytest.fixture
def guest(world: World) -> Iterator[GuestKernel]:
    """The kernel of a guest that mounts it."""
    kernel = GuestKernel(world.mount(agent=False))
    yield kernel
    kernel.session.close()


@pytest.fixture
def other(world: World) -> Iterator[GuestKernel]:
    """Another guest of the same export."""
    kernel = GuestKernel(world.mount("other", agent=False))
    yield kernel
    kernel.session.close()
