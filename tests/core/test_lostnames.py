"""Which file an event is about, if several have had its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fsd.events import lostnames
from fsd.events.lostnames import LostNames
from fsd.files.inode import Inode
from protocol.frames import Op
from protocol.masks import Mask

from .support import ALL, World

OPEN, CLOSE = int(Mask.OPEN), int(Mask.CLOSE_WRITE)


@pytest.fixture
def nodes(world: World) -> list[Inode]:
    for name in ("a", "b", "c"):
        (world.source / name).touch()
    return [world.node(name) for name in ("", "a", "b", "c")]


def test_an_open_file_is_found_behind_later_ones(nodes: list[Inode]) -> None:
    top, a, b, c = nodes
    names = LostNames()
    assert names.file(top, b"x") is None
    names.count(a, OPEN)
    for file in (a, b):
        names.lose(top, b"x", file)
    assert names.file(top, b"x") is a
    names.count(c, OPEN)
    names.lose(top, b"x", c)
    assert names.file(top, b"x") is c
    names.count(c, CLOSE)
    assert names.file(top, b"x") is a
    names.count(a, CLOSE)
    assert names.file(top, b"x") is c


def test_merged_opens_count_once(nodes: list[Inode]) -> None:
    _, a, *_ = nodes
    names = LostNames()
    names.count(a, OPEN)
    for _ in range(2):
        names.count(a, CLOSE)
        assert not names.is_open(a)


def test_bounds(nodes: list[Inode], monkeypatch: pytest.MonkeyPatch) -> None:
    top, a, b, c = nodes
    for limit in ("UNLINKED_LIMIT", "LOST_LIMIT", "OPEN_LIMIT"):
        monkeypatch.setattr(lostnames, limit, 2)
    names = LostNames()
    for file in (a, b, c):
        names.count(file, OPEN)
        names.lose(top, b"x", file)
        names.lose(top, file.name, file)
    assert [names.is_open(file) for file in (a, b, c)] == [False, True, True]
    assert names.file(top, b"a") is None
    assert names.file(top, b"c") is c
    assert len(names._files) == 2
    assert max(map(len, names._files.values())) <= 2


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
def test_the_close_of_a_file_whose_name_another_has(world: World, how: str) -> None:
    """The other one is opened and closed once: not open for ever."""
    mount = world.mount()
    world.mark(mount.guest, mask=ALL)
    path = world.source / "f"
    path.write_text("x")
    world.pump()
    world.orders(mount)
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 1)
    if how == "unlinked":
        path.unlink()
    elif how == "replaced":
        other(world.source / "g").rename(path)
    path.write_text("y")
    os.close(fd)
    orders = []
    for _ in range(3):
        world.pump()
        orders += world.orders(mount)
    opened = {o.seq for o in orders if o.op == Op.OPEN}
    assert opened == {o.arg for o in orders if o.op == Op.CLOSE}
    assert len(opened) == (3 if how == "replaced" else 2)


def other(path: Path) -> Path:
    path.write_text("z")
    return path
