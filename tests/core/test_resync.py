"""The difference: applied to the old picture it gives the new one, whatever happened between."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsd.events.compare import Changes
from fsd.events.event import RENAME, Event
from fsd.files.inode import Inode
from fsd.files.listing import Listing
from protocol.masks import Mask

from .support import STRUCTURE, WHOLE, World, plain, settle

CHANGE = int(Mask.MODIFY | Mask.CLOSE_WRITE)
DIRECTORIES = ("", "a", "b")
NAMES = ("x", "y", "z", "\udcff")
Place = tuple[str, str]
Step = tuple[str, list[Place]]
Picture = dict[tuple[str, str], tuple[int, str]]
"""(directory, name) -> (inode number, type and content)."""

_CLOCK_REALTIME_COARSE = 5  # of <linux/time.h>: what files get as their times


def take(source: Path) -> Picture:
    picture: Picture = {}
    for directory in DIRECTORIES:
        for entry in os.scandir(source / directory):
            kind = "l" if entry.is_symlink() else "d" if entry.is_dir() else "f"
            picture[directory, entry.name] = (entry.inode(), kind)
    return picture


def names_of(picture: Picture) -> dict[tuple[str, str], str]:
    return {place: kind for place, (_, kind) in picture.items()}


@contextmanager
def a_world(*, outbox_limit: int | None = None, watch_limit: int | None = None) -> Iterator[World]:
    """One for each example of hypothesis."""
    with tempfile.TemporaryDirectory(prefix="fsd-resync-") as top:
        source = Path(top) / "source"
        source.mkdir()
        world = World(source, outbox_limit=outbox_limit, watch_limit=watch_limit)
        try:
            for directory in DIRECTORIES[1:]:
                (source / directory).mkdir()
            yield world
        finally:
            world.close()


places = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(NAMES))
steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["touch", "write", "mkdir", "symlink", "remove"]),
            st.lists(places, min_size=1, max_size=1),
        ),
        st.tuples(
            st.sampled_from(["rename", "exchange", "link"]),
            st.lists(places, min_size=2, max_size=2),
        ),
    ),
    max_size=12,
)


def do(source: Path, step: Step) -> None:
    """One step of the host; what cannot be done is not."""
    kind = step[0]
    paths = [source / directory / name for directory, name in step[1]]
    path = paths[0]
    try:
        if kind == "touch":
            path.touch()
        elif kind == "write":
            path.write_text("content")
        elif kind == "mkdir":
            path.mkdir()
        elif kind == "symlink":
            path.symlink_to("nowhere")
        elif kind == "remove":
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        elif kind == "rename":
            os.rename(*paths)
        elif kind == "link":
            os.link(*paths, follow_symlinks=False)
        elif kind == "exchange":
            middle = source.parent / "middle"
            os.rename(paths[0], middle)
            os.rename(paths[1], paths[0])
            os.rename(middle, paths[1])
    except OSError:
        middle = source.parent / "middle"
        if middle.is_symlink() or middle.exists():
            os.rename(middle, paths[0])


def apply(picture: dict[tuple[str, str], str], events: list[tuple[bytes, str]]) -> None:
    """What an application concludes from events; a contradiction is a failure."""
    for path, mask in events:
        directory, _, name = os.fsdecode(path).rpartition("/")
        place, kinds = (directory, name), mask.split(",")
        isdir = "isdir" in kinds
        if "create" in kinds:
            assert place not in picture, f"{path!r} is created, and was there"
            picture[place] = "d" if isdir else "?"
        elif "delete" in kinds:
            assert place in picture, f"{path!r} is deleted, and was not there"
            assert (picture.pop(place) == "d") == isdir
        elif "moved_from" in kinds:
            assert place in picture, f"{path!r} is moved, and was not there"
            assert (picture.pop(place) == "d") == isdir
        elif "moved_to" in kinds:
            picture[place] = "d" if isdir else "?"
        elif "modify" in kinds:
            assert place in picture, f"{path!r} is modified, and is not there"


def equal(applied: dict[tuple[str, str], str], now: dict[tuple[str, str], str]) -> None:
    assert {place: kind == "d" for place, kind in applied.items()} == {
        place: kind == "d" for place, kind in now.items()
    }


@given(steps, steps)
@settings(max_examples=120)
def test_after_an_overflow(before: list[Step], during: list[Step]) -> None:
    """All events of ``during`` are lost in the kernel."""
    with a_world() as world:
        for step in before:
            do(world.source, step)
        guest = world.observer()
        for directory in DIRECTORIES:
            world.mark(guest, directory, STRUCTURE | CHANGE)
        world.take(guest)
        old = names_of(take(world.source))
        for step in during:
            do(world.source, step)
        world.export.watcher._read(1 << 20)  # read, and thrown away
        world.export.recovery.resync(world.export.watcher.inodes())
        apply(old, plain(world.take(guest)))
        equal(old, names_of(take(world.source)))
        # And once more: nothing is left to deliver but changes within the clock's lag.
        world.export.recovery.resync(world.export.watcher.inodes())
        assert {mask for _, mask in plain(world.take(guest))} <= {"modify", "close_write"}


@given(steps, st.integers(1, 6))
@settings(max_examples=120)
def test_after_a_full_outbox(during: list[Step], limit: int) -> None:
    with a_world(outbox_limit=limit) as world:
        guest = world.observer()
        for directory in DIRECTORIES:
            world.mark(guest, directory, STRUCTURE | CHANGE)
        old = names_of(take(world.source))
        for step in during:
            do(world.source, step)
        events = plain(world.take(guest))
        for _ in range(100):
            if not guest.missing:
                break
            world.export.recovery.catch_up(guest)
            events += plain(world.taken(guest))
        assert not guest.missing
        apply(old, events)
        equal(old, names_of(take(world.source)))


@given(steps)
@settings(max_examples=60)
def test_without_watches(during: list[Step]) -> None:
    """Directories that the host gives no watch for."""
    with a_world(watch_limit=1) as world:
        guest = world.observer()
        for directory in DIRECTORIES:
            with suppress(OSError):  # ENOSPC; that just these two are without is seen below
                world.mark(guest, directory, STRUCTURE | CHANGE)
        old = names_of(take(world.source))
        for step in during:
            do(world.source, step)
        unwatched = [node for node in world.export.watches.unwatched if node.is_dir]
        assert len(unwatched) == 2
        events = plain(world.take(guest))
        world.export.recovery.resync(unwatched)
        events += plain(world.taken(guest))
        seen = {"": False, "a": True, "b": True}
        inside = [e for e in events if seen.get(os.fsdecode(e[0]).rpartition("/")[0])]
        part = {place: kind for place, kind in old.items() if place[0]}
        apply_half_known(part, inside)
        equal(part, {p: k for p, k in names_of(take(world.source)).items() if p[0]})


def apply_half_known(picture: dict[tuple[str, str], str], events: list[tuple[bytes, str]]) -> None:
    """``apply`` where the other half of a rename is in a directory that is compared separately."""
    for path, mask in events:
        directory, _, name = os.fsdecode(path).rpartition("/")
        kinds = mask.split(",")
        if "create" in kinds or "moved_to" in kinds:
            picture[directory, name] = "d" if "isdir" in kinds else "?"
        elif "delete" in kinds or "moved_from" in kinds:
            assert (directory, name) in picture
            del picture[directory, name]


# The functions alone


@pytest.fixture
def known(world: World) -> Inode:
    """A watched directory with three files, older than the clock's lag."""
    for name in ("x", "y", "z"):
        (world.source / name).write_text("x")
    settle(world.source)
    world.export.update(world.observer(), world.root.key, STRUCTURE)
    return world.root


def events(world: World, changes: Changes) -> list[Event]:
    return list(world.export.comparer.events_for(changes))


def delivered(world: World) -> list[tuple[bytes, str]]:
    listing = world.root.listing
    assert isinstance(listing, Listing)
    changes = world.export.comparer.difference(world.root, listing)
    return [(e.name, str(Mask(e.kind).name)) for e in events(world, changes)]


@pytest.mark.usefixtures("known")
def test_no_difference(world: World) -> None:
    assert delivered(world) == []


@pytest.mark.usefixtures("known")
def test_the_order_of_kinds(world: World) -> None:
    """Moves, then removals, then what is new, then changes."""
    (world.source / "w").write_text("new")
    (world.source / "x").unlink()
    (world.source / "y").rename(world.source / "v")
    (world.source / "z").write_text("changed")
    kinds = delivered(world)
    assert kinds[:3] == [(b"y", "MOVED_FROM|MOVED_TO"), (b"x", "DELETE"), (b"w", "CREATE")]
    changed = [(name, kind) for name in (b"w", b"z") for kind in ("MODIFY", "CLOSE_WRITE")]
    assert sorted(kinds[3:]) == sorted(changed)


@pytest.mark.usefixtures("known")
def test_another_object_under_the_same_name(world: World) -> None:
    (world.source / "x").rename(world.source.parent / "elsewhere")
    (world.source / "x").mkdir()
    assert delivered(world) == [(b"x", "DELETE"), (b"x", "CREATE")]


@pytest.mark.usefixtures("known")
def test_a_hard_link_is_new_and_no_rename(world: World) -> None:
    os.link(world.source / "x", world.source / "w")
    kinds = delivered(world)
    assert (b"w", "CREATE") in kinds
    assert not any("MOVED" in kind for _, kind in kinds)


@pytest.mark.usefixtures("known")
def test_a_changed_directory_is_not_an_attrib(world: World) -> None:
    (world.source / "d").mkdir()
    delivered(world)
    settle(world.source)
    delivered(world)
    (world.source / "d/in it").touch()
    assert delivered(world) == []


def test_a_directory_that_is_gone(world: World) -> None:
    (world.source / "d/e").mkdir(parents=True)
    (world.source / "d/f").touch()
    guest = world.observer()
    node = world.mark(guest, "d", STRUCTURE)
    shutil.rmtree(world.source / "d")
    assert node.listing is not None
    changes = world.export.comparer.difference(node, node.listing)
    assert {(e.name, e.kind) for e in events(world, changes)} == {
        (b"e", int(Mask.DELETE)), (b"f", int(Mask.DELETE)),
    }  # fmt: skip
    assert node.listing.names == {}


def test_renames_between_directories_are_one_event(world: World) -> None:
    for name in ("a", "b"):
        (world.source / name).mkdir()
    (world.source / "a/x").write_text("x")
    guest = world.observer()
    nodes = [world.mark(guest, name, STRUCTURE) for name in ("a", "b")]
    os.rename(world.source / "a/x", world.source / "b/y")
    changes: Changes = {}
    for node in nodes:
        assert node.listing is not None
        changes.update(world.export.comparer.difference(node, node.listing))
    (event,) = events(world, changes)
    assert event.kind == RENAME
    assert (event.node, event.name, event.node2, event.name2) == (nodes[0], b"x", nodes[1], b"y")
    assert event.cookie >= 1 << 31


def test_a_large_directory(world: World) -> None:
    """5,000 names; and the difference of three of them is three events."""
    for i in range(5000):
        (world.source / f"n{i}").touch()
    settle(world.source)
    guest = world.observer()
    world.export.update(guest, WHOLE, STRUCTURE)
    world.pump()  # the names of a large directory are read by and by
    # A number that is used again is distinguished by the birth of its file: it has to be later.
    read = time.time_ns()
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= read:
        time.sleep(0.001)
    (world.source / "n7").unlink()
    (world.source / "n8").rename(world.source / "m8")
    (world.source / "new").touch()
    world.export.watcher._read(1 << 20)
    world.export.recovery.resync(world.export.watcher.inodes())
    assert sorted(plain(world.take(guest))) == [
        (b"m8", "moved_to"), (b"n7", "delete"), (b"n8", "moved_from"), (b"new", "create"),
    ]  # fmt: skip
