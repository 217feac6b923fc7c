"""Files that have no handle to be opened by, and more than one name."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from fsd.files.othernames import NAMES_LIMIT
from tests.mount.posix_support import fails

from .support import USER, World


@pytest.fixture
def names_alone(world: World) -> World:
    """As an ordinary user's server has it."""
    world.table.reach.by_handle = False
    return world


def links(world: World, *names: str) -> list[int]:
    """Make names of one file, and look each up: its node."""
    path = world.source / names[0]
    path.write_text("data")
    mount = world.mount()
    for name in names[1:]:
        os.link(path, world.source / name)
    return [mount.lookup(USER, 1, os.fsencode(name)).inode.nodeid for name in names]


def test_a_file_whose_last_seen_name_goes(names_alone: World) -> None:
    node, *others = links(names_alone, "a", "b", "c")
    assert set(others) == {node}
    mount = names_alone.services[-1]
    for gone, left in (("c", 2), ("b", 1)):
        (names_alone.source / gone).unlink()
        status = mount.getattr(USER, node)[1]
        assert (status.st_nlink, status.st_size) == (left, 4)
        fh = mount.files.open(USER, node, os.O_RDONLY)
        assert mount.files.read(fh, 0, 10) == b"data"
        mount.files.release(fh)
        names_alone.pump()  # the events come later
    (names_alone.source / "a").unlink()
    names_alone.pump()
    assert mount.getattr(USER, node)[1].st_nlink == 0


def test_a_guest_removes_the_name_seen_last(names_alone: World) -> None:
    node, *_ = links(names_alone, "a", "b")
    mount = names_alone.services[-1]
    mount.unlink(USER, 1, b"b")
    assert mount.getattr(USER, node)[1].st_nlink == 1


def test_another_file_under_an_old_name_is_not_taken_for_it(names_alone: World) -> None:
    node, *_ = links(names_alone, "a", "b")
    mount = names_alone.services[-1]
    (names_alone.source / "a").unlink()
    (names_alone.source / "a").write_text("another")
    (names_alone.source / "b").rename(names_alone.source.parent / "elsewhere")
    with fails(errno.ESTALE, errno.ENOENT):
        mount.files.open(USER, node, os.O_RDONLY)


def test_a_file_that_has_just_moved(names_alone: World) -> None:
    """Its event is in the queue, as somebody watches."""
    node, *_ = links(names_alone, "a")
    mount = names_alone.services[-1]
    names_alone.mark(mount.guest, "")
    (names_alone.source / "a").rename(names_alone.source / "z")
    assert stat.S_ISREG(mount.getattr(USER, node)[1].st_mode)
    assert mount.getattr(USER, node)[1].st_nlink == 1
    (names_alone.source / "z").rename(names_alone.source / "y")
    mount.files.release(mount.files.open(USER, node, os.O_RDONLY))


def test_what_is_forgotten_has_no_names(names_alone: World) -> None:
    names = [f"n{number}" for number in range(NAMES_LIMIT)]
    nodes = links(names_alone, *names)
    mount = names_alone.services[-1]
    mount.forget(nodes[0], len(nodes))
    assert not any(name.startswith(b"n") for name in names_alone.root.children)
