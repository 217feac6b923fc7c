"""What a queue's events are about, found out after all of it has happened: as in a burst."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fsd.linux.syscalls import RENAME_EXCHANGE, renameat2
from fsd.pacing import windows
from protocol.frames import ALIAS, STAGING, Op
from protocol.masks import Mask

from .support import STRUCTURE, World


@pytest.fixture
def outside(world: World) -> Path:
    """A directory beside the share, on the same file system."""
    path = world.source.with_name("outside")
    path.mkdir()
    return path


def test_a_name_that_is_moved_over_and_moves_on_is_not_exchanged(
    world: World, outside: Path
) -> None:
    """Though what it replaced lives on, as it does after an exchange with an unwatched name."""
    (world.source / "dir").mkdir()
    (world.source / "name").touch()
    os.link(world.source / "name", world.source / "other")
    (outside / "new").touch()
    world.node("name")
    mount = world.mount()
    world.mark(mount.guest)
    directory = world.mark(mount.guest, "dir")
    os.rename(outside / "new", world.source / "name")
    os.rename(world.source / "name", world.source / "dir/name")
    arrived, left = world.orders(mount)
    assert (arrived.op, arrived.name, arrived.name2, arrived.arg) == (Op.RENAME, b"x", b"name", 0)
    assert (left.op, left.name, left.nodeid2, left.arg) == (Op.RENAME, b"name", directory.nodeid, 0)


def test_an_open_that_just_ended_waits_for_its_close(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc shows no process that has it open, and that it is not for reading."""
    monkeypatch.setattr(windows, "OPEN_WAIT", 0.3)  # a busy machine comes late
    (world.source / "file").touch()
    mount = world.mount()
    world.mark(mount.guest)
    fd = os.open(world.source / "file", os.O_WRONLY)
    world.pump()
    time.sleep(windows.OPEN_WAIT)
    os.close(fd)
    mount.guest.plan()
    opened, closed = world.orders(mount)
    assert (opened.op, opened.arg) == (Op.OPEN, True)
    assert (closed.op, closed.arg) == (Op.CLOSE, opened.seq)


def test_an_open_does_not_wait_in_vain_for_what_is_queued(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy server comes to it long after it has read it, and all that followed is unread."""
    (world.source / "file").touch()
    mount = world.mount()
    world.mark(mount.guest)
    fd = os.open(world.source / "file", os.O_WRONLY)
    world.pump()
    monkeypatch.setattr(windows, "OPEN_WAIT", 0.001)
    os.write(fd, b"written")
    os.close(fd)
    time.sleep(windows.CLOSE_WAIT)
    mount.guest.plan()
    opened, modified, closed = world.orders(mount)
    assert (opened.op, opened.arg) == (Op.OPEN, True)
    assert (modified.op, modified.arg) == (Op.TOUCH, Mask.MODIFY)
    assert (closed.op, closed.arg) == (Op.CLOSE, opened.seq)


def test_a_marked_file_with_a_link_that_nobody_saw_outlives_its_name(
    world: World, outside: Path
) -> None:
    """Whatever the mark asks for: its own events say whether a name was its last."""
    (world.source / "file").touch()
    (outside / "new").touch()
    mount = world.mount()
    world.mark(mount.guest, mask=STRUCTURE)
    world.mark(mount.guest, "file", STRUCTURE)
    os.link(world.source / "file", outside / "link")
    os.rename(outside / "new", world.source / "file")
    (order,) = world.orders(mount)
    assert order.op == Op.RENAME
    entry = mount.guest.ledger.lookup(1, b"file")
    assert entry is not None
    assert entry.attr.st_nlink == 2


def test_a_directory_that_moves_itself_is_not_what_just_left_it(world: World) -> None:
    """It is at a place that nobody watches, so that its own event comes alone."""
    for path in ("from/moving/child", "unseen", "to"):
        (world.source / path).mkdir(parents=True)
    mount = world.mount()
    moving = world.mark(mount.guest, "from/moving")
    to = world.mark(mount.guest, "to")
    os.rename(world.source / "from/moving", world.source / "unseen/moving")
    os.rename(world.source / "unseen/moving/child", world.source / "to/child")
    os.rename(world.source / "unseen/moving", world.source / "unseen/moved")
    left, child, itself = world.orders(mount)
    assert (left.name, left.nodeid2) == (b"moving", STAGING)
    assert (child.nodeid, child.name, child.nodeid2) == (moving.nodeid, b"child", to.nodeid)
    entry = mount.guest.ledger._tasks[1].child
    assert entry is not moving
    assert (itself.nodeid, itself.nodeid2) == (STAGING, STAGING)


def test_a_file_unlinked_while_open_dies_when_it_is_closed(world: World) -> None:
    """And not with the unlink, nor with the next one."""
    for name in ("file", "other"):
        (world.source / name).touch()
    mount = world.mount()
    world.mark(mount.guest)
    node = world.mark(mount.guest, "file")
    fd = os.open(world.source / "file", os.O_WRONLY)
    os.unlink(world.source / "file")
    os.chmod(world.source / "other", 0o600)
    os.close(fd)
    os.unlink(world.source / "other")
    orders = world.orders(mount)
    nlinks = [task.nlink for task in mount.guest.ledger._tasks]
    assert [(order.op, order.nodeid, order.name) for order in orders] == [
        (Op.OPEN, 1, b"file"), (Op.REMOVE, 1, b"file"), (Op.TOUCH, 1, b"other"),
        (Op.CLOSE, 1, b"file"), (Op.REMOVE, ALIAS, b"%d" % node.nodeid), (Op.REMOVE, 1, b"other"),
    ]  # fmt: skip
    assert nlinks[1] == 2


def test_a_directory_that_changes_before_another_goes_is_not_what_goes(world: World) -> None:
    for name in ("changed", "gone"):
        (world.source / name).mkdir()
    mount = world.mount()
    world.mark(mount.guest)
    changed = world.mark(mount.guest, "changed")
    os.chmod(world.source / "changed", 0o700)
    os.rmdir(world.source / "gone")
    touched, removed = world.orders(mount)
    assert (touched.op, touched.name, touched.arg) == (Op.TOUCH, b"changed", Mask.ATTRIB)
    assert (removed.op, removed.name) == (Op.REMOVE, b"gone")
    assert mount.guest.ledger._tasks[0].child is changed
    assert mount.guest.ledger._tasks[1].child is not changed


@pytest.mark.parametrize("links", [1, 2])
def test_what_is_overwritten_where_nobody_watches_is_delivered_with_what_left(
    world: World, links: int
) -> None:
    for name in ("in", "unseen"):
        (world.source / name).mkdir()
    for name in ("old", "new"):
        (world.source / "in" / name).touch()
    mount = world.mount()
    world.mark(mount.guest, "in")
    old, new = (world.mark(mount.guest, f"in/{name}") for name in ("old", "new"))
    os.rename(world.source / "in/old", world.source / "unseen/name")
    if links == 2:
        os.link(world.source / "unseen/name", world.source / "unseen/link")
    os.rename(world.source / "in/new", world.source / "unseen/name")
    orders = [order for order in world.orders(mount) if order.op != Op.TOUCH]
    assert [(order.op, order.name, order.nodeid2) for order in orders] == [
        (Op.RENAME, b"old", STAGING), (Op.RENAME, b"new", STAGING),
    ]  # fmt: skip
    last = mount.guest.ledger._tasks[-1]
    assert (last.child, last.target, last.nlink) == (new, old, links)


def test_what_is_open_under_a_lost_name_takes_no_place(world: World) -> None:
    """The kernel still names an unlinked file's events: nothing is there, all the same, when a
    directory is renamed to that name.
    """
    (world.source / "name").touch()
    (world.source / "dir").mkdir()
    mount = world.mount()
    world.mark(mount.guest)
    fd = os.open(world.source / "name", os.O_WRONLY)
    os.unlink(world.source / "name")
    os.write(fd, b"x")
    os.rename(world.source / "dir", world.source / "name")
    os.close(fd)
    orders = world.orders(mount)
    assert [order.op for order in orders] == [Op.OPEN, Op.REMOVE, Op.TOUCH, Op.RENAME, Op.CLOSE]
    opened, _, _, renamed, closed = orders
    assert closed.arg == opened.seq
    mount.guest.ledger.failed(renamed.seq - 1)  # all before it is done
    with pytest.raises(FileNotFoundError):
        mount.guest.ledger.lookup(1, b"name")


def test_an_exchange_with_what_only_a_listing_knows(world: World) -> None:
    """Not two renames: a file that is open is closed at its new name."""
    (world.source / "a").touch()
    (world.source / "b").touch()
    mount = world.mount()
    world.mark(mount.guest)
    names = (os.fsencode(world.source / name) for name in "ab")
    renameat2(-100, next(names), -100, next(names), RENAME_EXCHANGE)
    (order,) = world.orders(mount)
    assert (order.op, order.name, order.name2) == (Op.RENAME, b"a", b"b")
    assert order.arg == RENAME_EXCHANGE


def among(world: World, gap: int, count: int = 1) -> None:
    """Have the last events in the queue where another processor may have queued them."""
    world.export.watcher.drain()
    arrivals = world.export.watcher.queue._arrivals
    for _ in range(count):
        arrivals.insert(gap, arrivals.pop())


def made(path: Path, kind: str) -> None:
    path.touch() if kind == "file" else path.mkdir()


@pytest.mark.parametrize("gap", range(1, 6))
@pytest.mark.parametrize("kinds", [("dir", "dir"), ("file", "file"), ("file", "dir")])
@pytest.mark.parametrize("others", ["create", "rename"])
def test_an_exchange_among_events_of_others(
    world: World, kinds: tuple[str, str], gap: int, others: str
) -> None:
    """Or else guests would see a watched directory overwritten, and lose it."""
    for name in ("in", "to", "busy/old"):
        (world.source / name).mkdir(parents=True)
    places = [world.source / "in/a", world.source / "to/b"]
    for place, kind in zip(places, kinds, strict=True):
        made(place, kind)
    mount = world.mount()
    for name in ("in", "to", "busy"):
        world.mark(mount.guest, name)
    nodes = [world.mark(mount.guest, name) for name in ("in/a", "to/b")]
    other = world.mark(mount.guest, "busy/old")
    names = [os.fsencode(place) for place in places]
    world.pump()
    renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE)
    if others == "create":
        os.mkdir(world.source / "busy/new")
        among(world, gap)
    else:
        os.rename(world.source / "busy/old", world.source / "busy/new")
        among(world, gap, 3)
    orders = world.orders(mount)
    assert len(orders) == 2
    tasks = {task.order.nodeid: task for task in mount.guest.ledger._tasks}
    exchange = tasks[world.node("in").nodeid]
    assert (exchange.order.op, exchange.order.arg) == (Op.RENAME, RENAME_EXCHANGE)
    assert [exchange.child, exchange.target] == nodes
    assert [world.node("to/b"), world.node("in/a")] == nodes
    if others == "rename":
        assert tasks[world.node("busy").nodeid].child is other


def test_an_exchange_of_files_that_are_watched_only_afterwards(world: World) -> None:
    """Their watches do not make an earlier MOVE_SELF expected."""
    for name in "fg":
        (world.source / name).touch()
    mount = world.mount()
    world.mark(mount.guest)
    for inode in (world.node("f"), world.node("g")):
        world.pump()
        names = [os.fsencode(world.source / name) for name in "gf"]
        renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE)
        world.export.watcher.catch_up()
        world.export.watcher.set_mask(inode, Mask.MOVE_SELF)
        (rename,) = world.orders(mount)
        assert rename.arg == RENAME_EXCHANGE


@pytest.mark.parametrize("gap", range(1, 3))
def test_an_exchange_with_an_unseen_name_among_events_of_others(
    world: World, outside: Path, gap: int
) -> None:
    for path in (world.source / "dir", outside / "other", world.source / "busy"):
        path.mkdir()
    mount = world.mount()
    for name in ("", "busy"):
        world.mark(mount.guest, name)
    world.mark(mount.guest, "dir")
    names = [os.fsencode(path) for path in (outside / "other", world.source / "dir")]
    world.pump()
    renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE)
    os.mkdir(world.source / "busy/new")
    among(world, gap)
    orders = world.orders(mount)
    (rename,) = [order for order in orders if order.op == Op.RENAME]
    assert len(orders) == 2
    assert rename.arg == RENAME_EXCHANGE


@pytest.mark.parametrize("gap", range(1, 3))
def test_a_directory_moved_among_events_of_others_is_known_at_its_new_place(
    world: World, gap: int
) -> None:
    for name in ("in/a", "to", "busy"):
        (world.source / name).mkdir(parents=True)
    mount = world.mount()
    for name in ("in", "to", "busy"):
        world.mark(mount.guest, name)
    moved = world.mark(mount.guest, "in/a")
    world.pump()
    os.rename(world.source / "in/a", world.source / "to/b")
    os.mkdir(world.source / "busy/new")
    among(world, gap)
    world.orders(mount)
    (task,) = [task for task in mount.guest.ledger._tasks if task.order.op == Op.RENAME]
    assert task.child is moved
    assert (moved.parent, moved.name) == (world.node("to"), b"b")


def test_a_late_server_looks_at_what_it_has_just_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue was read between an event and its self event, and that was long ago."""
    (world.source / "file").touch()
    mount = world.mount()
    world.mark(mount.guest)
    node = world.mark(mount.guest, "file")
    world.pump()
    os.chmod(world.source / "file", 0o600)
    watcher = world.export.watcher
    watcher.drain()
    named, own = watcher.queue._arrivals
    watcher.queue._keep([named._replace(stamp=named.stamp - 1)])
    monkeypatch.setattr(os, "sched_yield", lambda: watcher.queue._arrivals.append(own))
    world.export.process(1)
    (order,) = world.orders(mount)
    assert (order.op, order.name, order.arg) == (Op.TOUCH, b"file", Mask.ATTRIB)
    assert mount.guest.ledger._tasks[0].child is node


def test_an_exchange_of_what_nobody_has_seen(world: World) -> None:
    """Nothing proves it any more when it is read: to rename over, and back, would be pointless."""
    for name in "ab":
        (world.source / name).touch()
    mount = world.mount()
    world.mark(mount.guest)
    world.export.watcher.drain()
    for name in "ab":  # known by events, but gone when these are read
        (world.source / f"new {name}").touch()
        os.rename(world.source / f"new {name}", world.source / name)
    renameat2(
        -100, os.fsencode(world.source / "a"), -100, os.fsencode(world.source / "b"),
        RENAME_EXCHANGE,
    )  # fmt: skip
    for name in "ab":
        os.unlink(world.source / name)
    orders = world.orders(mount)
    exchanges = [order for order in orders if order.op == Op.RENAME and order.arg]
    assert [(order.name, order.name2) for order in exchanges] == [(b"a", b"b")]


def test_files_renamed_over_and_back_with_something_between_are_not_exchanged(
    world: World,
) -> None:
    for name in "abc":
        (world.source / name).touch()
    os.link(world.source / "b", world.source / "other b")
    mount = world.mount()
    world.mark(mount.guest)
    world.node("b")
    os.rename(world.source / "a", world.source / "b")
    os.chmod(world.source / "c", 0o600)
    os.rename(world.source / "b", world.source / "a")
    orders = world.orders(mount)
    assert [(order.op, order.name, order.arg) for order in orders] == [
        (Op.RENAME, b"a", 0), (Op.TOUCH, b"c", Mask.ATTRIB), (Op.RENAME, b"b", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("gap", range(1, 3))
def test_a_directory_from_out_of_sight_exchanged_among_events_of_others(
    world: World, outside: Path, gap: int
) -> None:
    """It is known by its own MOVE_SELF, which comes before what it was exchanged with leaves."""
    for path in ("in/watched", "busy"):
        (world.source / path).mkdir(parents=True)
    (world.source / "file").touch()
    mount = world.mount()
    for name in ("", "in", "busy"):
        world.mark(mount.guest, name)
    watched = world.mark(mount.guest, "in/watched")
    os.rename(world.source / "in/watched", outside / "watched")
    world.pump()
    world.orders(mount)
    names = [os.fsencode(path) for path in (outside / "watched", world.source / "file")]
    renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE)
    os.mkdir(world.source / "busy/new")
    among(world, gap)
    orders = world.orders(mount)
    assert sorted(order.op for order in orders) == [Op.CREATE, Op.RENAME]
    (exchange,) = [task for task in mount.guest.ledger._tasks if task.order.arg == RENAME_EXCHANGE]
    assert exchange.child is watched


def test_an_unlink_that_begins_within_a_rename(world: World) -> None:
    """Its ATTRIB stands where that of an overwritten file would."""
    for name in ("old", "other"):
        (world.source / name).touch()
    mount = world.mount()
    world.mark(mount.guest)
    moved, gone = (world.mark(mount.guest, name) for name in ("old", "other"))
    os.rename(world.source / "old", world.source / "new")
    (world.source / "other").unlink()
    watcher = world.export.watcher
    watcher.drain()
    arrivals = watcher.queue._arrivals
    assert [arrivals[i].raw.mask for i in (2, 3)] == [Mask.MOVE_SELF, Mask.ATTRIB]
    arrivals[2], arrivals[3] = arrivals[3], arrivals[2]
    renamed, removed = world.orders(mount)
    assert (renamed.op, renamed.name, renamed.name2) == (Op.RENAME, b"old", b"new")
    assert (removed.op, removed.name) == (Op.REMOVE, b"other")
    first, second = mount.guest.ledger.tasks
    assert (first.child, first.target) == (moved, None)
    assert (second.child, second.nlink) == (gone, 1)
