"""Interest in the whole file system (nodeid 0): recursive, also for directories made later."""

from __future__ import annotations

import os
import shutil

import pytest

from protocol.masks import Mask

from .conftest import Worlds
from .support import ALL, DIRECTORY, MARKED, WHOLE, World, plain

CREATE, DELETE, MODIFY = int(Mask.CREATE), int(Mask.DELETE), int(Mask.MODIFY)


def test_every_directory_that_is_there_is_watched(world: World) -> None:
    (world.source / "a/b/c").mkdir(parents=True)
    (world.source / "d").mkdir()
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE)
    assert len(world.export.watcher) == 5
    (world.source / "a/b/c/x").touch()
    (world.source / "d/y").touch()
    assert plain(world.take(guest)) == [(b"a/b/c/x", "create"), (b"d/y", "create")]


def test_directories_made_later_are_covered(world: World) -> None:
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE | DELETE)
    (world.source / "new").mkdir()
    assert plain(world.take(guest)) == [(b"new", "create,isdir")]
    (world.source / "new/er").mkdir()
    assert plain(world.take(guest)) == [(b"new/er", "create,isdir")]
    (world.source / "new/er/x").touch()
    (world.source / "new/er/x").unlink()
    assert plain(world.take(guest)) == [(b"new/er/x", "create"), (b"new/er/x", "delete")]


def test_a_tree_made_at_once_is_delivered_completely_and_once(world: World) -> None:
    """What is in a directory before the watch on it is announced; nothing twice."""
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE)
    (world.source / "a/b/c").mkdir(parents=True)
    (world.source / "a/b/x").touch()
    (world.source / "a/b/c/y").touch()
    reported = plain(world.take(guest))
    assert sorted(reported) == [
        (b"a", "create,isdir"),
        (b"a/b", "create,isdir"),
        (b"a/b/c", "create,isdir"),
        (b"a/b/c/y", "create"),
        (b"a/b/x", "create"),
    ]
    assert reported.index((b"a", "create,isdir")) < reported.index((b"a/b", "create,isdir"))
    (world.source / "a/b/c/z").touch()
    assert plain(world.take(guest)) == [(b"a/b/c/z", "create")]


def test_a_directory_moved_in_is_covered(world: World) -> None:
    outside = world.source.parent / "outside"
    (outside / "deep").mkdir(parents=True)
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE | int(Mask.MOVED_TO))
    os.rename(outside, world.source / "in")
    assert plain(world.take(guest)) == [(b"in", "moved_to,isdir")]
    (world.source / "in/deep/x").touch()
    assert plain(world.take(guest)) == [(b"in/deep/x", "create")]


def test_a_directory_renamed_inside_is_reported_by_its_new_path(world: World) -> None:
    (world.source / "a/deep").mkdir(parents=True)
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE)
    os.rename(world.source / "a", world.source / "b")
    (world.source / "b/deep/x").touch()
    assert plain(world.take(guest)) == [(b"b/deep/x", "create")]


def test_removed_trees_leave_no_watch(world: World) -> None:
    (world.source / "a/b/c").mkdir(parents=True)
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE | DELETE)
    shutil.rmtree(world.source / "a")
    reported = world.take(guest)
    assert [event.path.rpartition(b"/")[2] for event in reported] == [b"c", b"b", b"a"]
    assert {event.mask for event in reported} == {"delete,isdir"}
    assert world.export.watcher.inodes() == [world.root]
    assert len(world.table) == 1


def test_its_end_leaves_what_single_marks_ask_for(world: World) -> None:
    (world.source / "a/b").mkdir(parents=True)
    whole, single = world.observer("whole"), world.observer("single")
    world.export.update(whole, WHOLE, ALL)
    node = world.mark(single, "a", CREATE)
    world.export.update(whole, WHOLE, 0)
    assert set(world.export.watcher.inodes()) == {world.root, node}
    assert world.host_mask(node) == CREATE | DIRECTORY | MARKED
    (world.source / "a/x").touch()
    assert plain(world.take(single)) == [(b"a/x", "create")]
    assert world.take(whole) == []


def test_a_guest_that_leaves_ends_it(world: World) -> None:
    (world.source / "a/b").mkdir(parents=True)
    guest = world.observer()
    world.export.update(guest, WHOLE, ALL)
    world.export.remove_guest(guest)
    assert len(world.export.watcher) == 0
    assert len(world.table) == 1


def test_only_what_was_asked_for(world: World) -> None:
    (world.source / "a").mkdir()
    first, second = world.observer("first"), world.observer("second")
    world.export.update(first, WHOLE, MODIFY)
    world.export.update(second, WHOLE, DELETE)
    (world.source / "a/x").write_text("x")
    (world.source / "a/x").unlink()
    assert plain(world.take(first)) == [(b"a/x", "modify")]
    assert plain(world.take(second)) == [(b"a/x", "delete")]


def test_symlinks_are_not_followed(world: World) -> None:
    outside = world.source.parent / "outside"
    outside.mkdir()
    (world.source / "link").symlink_to(outside)
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE)
    (outside / "x").touch()
    assert world.take(guest) == []
    assert len(world.export.watcher) == 1


@pytest.mark.parametrize("marks", ["whole", "single"])
def test_a_mark_and_the_whole_deliver_an_event_once(world: World, marks: str) -> None:
    (world.source / "a").mkdir()
    guest = world.observer()
    world.export.update(guest, WHOLE, CREATE)
    if marks == "single":
        world.mark(guest, "a", CREATE | DELETE)
    (world.source / "a/x").touch()
    assert plain(world.take(guest)) == [(b"a/x", "create")]


def test_no_watch_for_a_subtree_is_reported_and_compared(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.export.watches.COMPARE_EVERY", 0.01)
    world = make_world(watch_limit=2)
    (world.source / "a").mkdir()
    (world.source / "b").mkdir()
    guest = world.observer()
    with pytest.raises(OSError, match="limit") as error:
        world.export.update(guest, WHOLE, CREATE)
    assert error.value.errno == 28
    assert [node.path() for node in world.export.watches.unwatched] in ([b"a"], [b"b"])
    (world.source / "a/x").touch()
    (world.source / "b/x").touch()
    reported: set[tuple[bytes, str]] = set()
    while len(reported) < 2:
        reported |= set(plain(world.take(guest)))
    assert reported == {(b"a/x", "create"), (b"b/x", "create")}
