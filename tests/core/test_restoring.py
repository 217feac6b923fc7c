"""A saved inode table: a nodeid comes back for the very object that had it, or for none."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fsd.checkpoint import restore_inodes
from fsd.checkpoint.restore_inodes import RestoredTable
from fsd.files.inode import Identity, Inode
from fsd.files.reach import Reach
from fsd.files.saved import GONE, SavedForgotten, SavedInode, SavedLink, SavedTable, inode_table
from protocol.frames import FSD_DIR
from protocol.handles import NodeKey
from protocol.images import ImageError

from .support import World

Identify = Callable[[int], tuple[Identity, os.stat_result]]
Restart = Callable[[World], tuple[World, dict[int, Inode]]]


@pytest.fixture(params=["handles", "paths"])
def restart(request: pytest.FixtureRequest, make_world: Callable[[], World]) -> Restart:
    """Saves a world's table and gives it to a new one, which guests hold all of."""

    def again(world: World) -> tuple[World, dict[int, Inode]]:
        saved, now = inode_table(world.table), time.time_ns()
        keys = {inode.key for inode in world.table}
        world.close()
        new = make_world()
        new.table.reach.by_handle = request.param == "handles"
        restored = RestoredTable(new.table, saved, now)
        for inode in restored.inodes.values():
            inode.lookups += 1
        restored.release()
        assert {inode.key for inode in new.table} == keys
        return new, restored.inodes

    return again


@pytest.fixture
def old(make_world: Callable[[], World], request: pytest.FixtureRequest) -> World:
    world = make_world()
    source = world.source
    (source / "a/b/c").mkdir(parents=True)
    (source / "a/b/c/f").write_text("f")
    (source / "a/g").write_text("g")
    os.link(source / "a/g", source / "a/b/h")
    os.symlink("nowhere", source / "s")
    os.mkfifo(source / "p")
    for path in ("a/b/c/f", "a/g", "a/b/h", "s", "p"):
        world.node(path)
    return world


def paths(world: World) -> dict[str, NodeKey]:
    found = {}
    for top, dirs, files in os.walk(world.source):
        for name in dirs + files:
            path = os.path.relpath(os.path.join(top, name), world.source)
            found[path] = world.node(path).key
    return found


def test_every_node_comes_back(old: World, restart: Restart) -> None:
    before = paths(old)
    new, inodes = restart(old)
    assert paths(new) == before
    hard = inodes[new.node("a/g").nodeid]
    assert new.node("a/b/h") is hard
    assert hard.nlink == 2
    with new.table.reach.opened(new.node("a/b/c/f")) as fd:
        assert os.fstat(fd).st_ino == (new.source / "a/b/c/f").stat().st_ino


def test_what_moved_keeps_its_node(old: World, restart: Restart) -> None:
    before = paths(old)

    def then(world: World) -> None:
        (world.source / "a/b/c").rename(world.source / "d")
        (world.source / "a/g").rename(world.source / "e")

    world = _between(old, restart, then)
    assert world.node("d").key == before["a/b/c"]
    assert world.node("d/f").key == before["a/b/c/f"]
    assert world.node("e").key == before["a/g"]
    if world.table.reach.by_handle:  # where it is now is known without a look-up
        assert world.node("d").path() == b"d"


def test_another_object_is_another_node(old: World, restart: Restart) -> None:
    before = paths(old)

    def then(world: World) -> None:
        for path, make in (
            ("a/b/c/f", Path.touch), ("s", Path.touch), ("p", Path.mkdir), ("a/g", Path.touch)
        ):  # fmt: skip
            (world.source / path).unlink()
            make(world.source / path)

    world = _between(old, restart, then)
    for path in ("a/b/c/f", "s", "p", "a/g"):
        assert world.node(path).key != before[path], path
        held = world.table.find(before[path])
        if path != "a/g":  # which has another link
            with pytest.raises(OSError, match=r"Stale|No such"):
                world.export.fs.getattr(held)


def _between(old: World, restart: Restart, then: Callable[[World], None]) -> World:
    """Restart, with something done while no server runs."""
    close = old.close

    def close_then() -> None:
        close()
        then(old)

    old.close = close_then  # type: ignore[method-assign]
    world, _ = restart(old)
    old.close = close  # type: ignore[method-assign]
    return world


def test_synthetic_nodeids_are_not_given_twice(
    world: World, make_world: Callable[[], World]
) -> None:
    ghost = world.table.placeholder(stat.S_IFREG, world.root, b"ghost")
    saved = inode_table(world.table)
    new = make_world()
    restored = RestoredTable(new.table, saved, time.time_ns())
    assert restored.get(ghost.nodeid).is_placeholder
    assert new.table.placeholder(stat.S_IFREG, new.root, b"x").nodeid > ghost.nodeid


def test_what_nobody_holds_is_dropped(old: World, make_world: Callable[[], World]) -> None:
    saved = inode_table(old.table)
    new = make_world()
    restored = RestoredTable(new.table, saved, time.time_ns())
    assert len(new.table) == len(old.table)
    restored.get(old.node("a/b/c").nodeid).lookups += 1
    restored.release()
    assert {inode.path() for inode in new.table} == {b"", b"a", b"a/b", b"a/b/c"}


ROW = SavedInode(77, 1, 0, 77, b"", stat.S_IFREG, 1, 1, b"x")
DIRS = [
    ROW._replace(nodeid=number, ino=number, kind=stat.S_IFDIR, parent=parent)
    for number, parent in ((50, 51), (51, 50))
]


@pytest.mark.parametrize(
    ("inodes", "links"),
    [
        ([ROW, ROW], []),
        ([ROW, ROW._replace(nodeid=78)], []),  # one object, two nodes
        ([ROW._replace(nodeid=1)], []),
        ([ROW._replace(nodeid=0)], []),
        ([ROW._replace(nodeid=FSD_DIR)], []),
        ([ROW._replace(generation=1 << 32)], []),
        ([ROW._replace(kind=0)], []),
        ([ROW._replace(handle=b"x")], []),
        ([ROW._replace(handle=bytes(200))], []),
        ([ROW._replace(name=b"a/b")], []),
        ([ROW._replace(name=b"..")], []),
        ([ROW._replace(name=b"")], []),
        ([ROW._replace(name=bytes(3))], []),
        ([ROW], [SavedLink(1, b"/", 77)]),
        ([ROW], [SavedLink(1, b"x", 78)]),
        ([ROW], [SavedLink(78, b"x", 77)]),
    ],
)
def test_what_makes_no_sense_is_refused(
    inodes: list[SavedInode], links: list[SavedLink], world: World
) -> None:
    with pytest.raises(ImageError):
        RestoredTable(world.table, SavedTable(inodes, links, []), time.time_ns())


@pytest.mark.parametrize("change", [{"handle": b".."}, {"handle": bytes(200)}, {"name": b"a/b"}])
def test_forgotten_objects_that_make_no_sense(change: dict[str, bytes], world: World) -> None:
    row = SavedForgotten(77, 0, 77, b"", 1, b"x")._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        RestoredTable(world.table, SavedTable([], [], [row]), time.time_ns())


def test_rings_and_foreign_objects_are_harmless(world: World) -> None:
    rows = [
        *DIRS,
        ROW._replace(device=12345, handle=bytes(8)),
        ROW._replace(nodeid=78, parent=77, ino=78),
    ]
    restored = RestoredTable(world.table, SavedTable(rows, [], []), time.time_ns())
    assert restored.gone == {restored.get(row.nodeid) for row in rows}
    assert restored.get(77).identity == (GONE, 77, b"", 0)
    for row in rows:
        restored.get(row.nodeid).path()
    restored.release()
    assert len(world.table) == 1


def test_without_handles_the_age_tells(world: World, make_world: Callable[[], World]) -> None:
    """Objects without a handle: the same path and number, but born after the image was saved."""
    (world.source / "x").touch()
    ino = (world.source / "x").stat().st_ino
    row = ROW._replace(nodeid=ino, ino=ino)
    for saved_ns, found in ((time.time_ns() + 10**9, True), (time.time_ns() - 10**9, False)):
        new = make_world()
        new.table.reach.by_handle = False
        identify = new.table.reach.identify

        def bare(fd: int, identify: Identify = identify) -> tuple[Identity, os.stat_result]:
            identity, status = identify(fd)
            return identity._replace(handle=b""), status

        new.table.reach.identify = bare  # type: ignore[method-assign]
        restored = RestoredTable(new.table, SavedTable([row], [], []), saved_ns)
        assert (restored.get(ino) not in restored.gone) == found


def test_a_handle_of_another_object(old: World, make_world: Callable[[], World]) -> None:
    saved = inode_table(old.table)
    handles = {row.nodeid: row.handle for row in saved.inodes}
    f, g = old.node("a/b/c/f").nodeid, old.node("a/g").nodeid
    rows = [row._replace(handle=handles[g]) if row.nodeid == f else row for row in saved.inodes]
    new = make_world()
    restored = RestoredTable(new.table, SavedTable(rows, [], []), time.time_ns())
    with pytest.raises(OSError, match=r"Stale|No such"), new.table.reach.opened(restored.get(f)):
        pass
    assert new.node("a/g") is restored.get(g)


def test_what_nobody_can_look_at_is_not_gone(
    old: World, restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor is missing for a while: it is looked for again, and all is found."""
    before = paths(old)
    failing(monkeypatch, errno.EMFILE, times=2)
    new, _ = restart(old)
    assert paths(new) == before


def test_a_restore_that_cannot_look_fails(
    old: World, restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_inodes, "_PAUSES", (0.0,))
    failing(monkeypatch, errno.ENFILE, times=1 << 20)
    with pytest.raises(OSError, match=os.strerror(errno.ENFILE)):
        restart(old)


def test_what_cannot_be_looked_at_for_a_reason_of_its_own_stops_no_restore(
    old: World, restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system below the share has died."""
    real = Reach.identify

    def identify(reach: Reach, fd: int) -> Any:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/a/g"):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return real(reach, fd)

    before = paths(old)
    monkeypatch.setattr(Reach, "identify", identify)
    new, _ = restart(old)
    monkeypatch.undo()
    assert paths(new)["a/b/c/f"] == before["a/b/c/f"]


def failing(monkeypatch: pytest.MonkeyPatch, error: int, times: int) -> None:
    """The first looks at objects in a restore fail."""
    real = restore_inodes._patiently
    left = [times]

    def patiently(find: Callable[[], bool]) -> bool:
        def failing_find() -> bool:
            if left[0]:
                left[0] -= 1
                raise OSError(error, os.strerror(error))
            return find()

        return real(failing_find)

    monkeypatch.setattr(restore_inodes, "_patiently", patiently)
