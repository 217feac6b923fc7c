"""Trees that are thousands of levels deep: nothing recurses along them, or takes the square."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from fsd.checkpoint import take
from fsd.checkpoint.restore import Resumption
from fsd.export.channel import Channel
from fsd.files.inode import PATH_LEVELS, Inode
from protocol import frames

from .support import ALL, USER, WHOLE, World

DEPTH = 1500  # above the interpreter's limit of recursion
SECONDS = 10.0
"""What takes the square of the depth takes longer; what does not, a tenth of it."""


@pytest.fixture
def world(make_world: Callable[[], World]) -> Iterator[World]:
    """Of a directory with one in it, and so on."""
    world = make_world()
    fd = os.open(world.source, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    yield world
    for _ in range(DEPTH):  # shutil's own recurses
        above = os.open("..", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        os.rmdir("d", dir_fd=above)
        fd = above
    os.close(fd)


def look_up(world: World) -> list[Inode]:
    operations, chain = world.mount(agent=False), [world.table.root]
    for _ in range(DEPTH):
        chain.append(operations.lookup(USER, chain[-1].nodeid, b"d").inode)
    return chain[1:]


def test_forgetting_drops_all_of_it(world: World) -> None:
    begun = time.monotonic()
    operations = world.mount(agent=False)
    chain = look_up(world)
    for inode in chain:
        operations.forget(inode.nodeid, 1)
    assert len(world.table) == 1
    assert time.monotonic() < begun + SECONDS


def test_a_mark_at_the_bottom_is_set_and_dropped(world: World) -> None:
    begun = time.monotonic()
    session = Channel(world.export, "tool", os.getpid())
    send(world, session, frames.Hello(frames.VERSION, frames.Role.OBSERVER, ALL))
    result = send(world, session, frames.Resolve(1, b"/".join([b"d"] * DEPTH)))
    assert isinstance(result, frames.Result)
    assert result.errno == 0
    assert len(world.table) == DEPTH + 1
    send(world, session, frames.Update(2, result.nodeid, result.generation, ALL))
    inode = world.table.get(result.nodeid)
    assert world.host_mask(inode)
    assert inode.shown_path() == b".../" + b"/".join([b"d"] * PATH_LEVELS)
    session.close()
    world.pump()
    assert len(world.table) == 1
    assert time.monotonic() < begun + SECONDS


@pytest.mark.slow
def test_a_whole_tree_is_watched_saved_and_restored(
    world: World, make_world: Callable[[], World]
) -> None:
    begun = time.monotonic()
    observer = world.observer()
    observer.token = bytes(16)
    world.export.update(observer, WHOLE, ALL)
    world.pump()
    assert len(world.export.watcher) == DEPTH + 1
    saved = take.take(world.export)
    again = make_world()
    Resumption(again.export, saved).finish()
    assert len(again.export.watcher) == DEPTH + 1
    again.close()
    assert time.monotonic() < begun + 2 * SECONDS


def test_a_forgotten_node_is_found_again(world: World) -> None:
    begun = time.monotonic()
    operations = world.mount(agent=False)
    chain = look_up(world)
    for inode in chain:
        operations.forget(inode.nodeid, 1)
    assert operations.lookup(USER, chain[-1].nodeid, b".").inode.identity == chain[-1].identity
    assert time.monotonic() < begun + SECONDS


def send(world: World, session: Channel, message: frames.Message) -> frames.Message | None:
    session.receive(frames.encode(message))
    world.pump()  # what takes long is done in turns
    reader = frames.FrameReader()
    reader.feed(session.outgoing(1 << 16))
    answers = list(reader)
    return answers[-1] if answers else None
