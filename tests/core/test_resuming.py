"""A server that continues where another stopped: nothing is lost of what happened in between."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fsd.checkpoint import restore, take
from fsd.checkpoint.restore import Resumption
from fsd.checkpoint.rows import SavedExport
from fsd.export import ending
from fsd.fuse.hidden import HiddenFiles
from fsd.guests.guest import Observer
from protocol import frames
from protocol.images import ImageError
from protocol.masks import Mask

from .conftest import Worlds
from .support import ALL, STRUCTURE, USER, WHOLE, World, plain, settle

TOKEN = b"token of a guest"
CHANGES = ALL & ~int(Mask.OPEN | Mask.ACCESS | Mask.CLOSE_NOWRITE)
MOVE = "moved_from", "moved_to"


@pytest.fixture(params=["handles", "paths"])
def restart(request: pytest.FixtureRequest, make_world: Worlds) -> Callable[..., World]:
    """Another server in the place of a world, with its state; ``meanwhile`` happens between."""

    def again(world: World, meanwhile: Callable[[Path], None] = lambda _: None) -> World:
        settle(world.source)
        ending.settle(world.export, 10)
        assert ending.is_settled(world.export)
        saved = take.take(world.export)
        world.close()
        meanwhile(world.source)
        new = make_world()
        new.table.reach.by_handle = request.param == "handles"
        Resumption(new.export, saved).finish()
        return new

    return again


def kept(world: World, *paths: str, mask: int = ALL) -> Observer:
    guest = world.observer()
    guest.token = TOKEN
    for path in paths:
        world.mark(guest, path, mask)
    return guest


def back(world: World, received: int = 0) -> Observer:
    guest = world.export.reconnect(TOKEN, received)
    assert guest is not None
    return guest


def test_interest_and_watches_come_back(world: World, restart: Callable[..., World]) -> None:
    (world.source / "d").mkdir()
    (world.source / "d/f").touch()
    guest = kept(world, "d", "d/f", mask=int(Mask.MODIFY | Mask.CREATE))
    before = {
        inode.key: (world.host_mask(inode), world.export.watcher.wd_of(inode))
        for inode in world.export.watcher.inodes()
    }
    marks = {inode and inode.key: m for inode, m in world.export.interest.marks(guest).items()}
    new = restart(world)
    watcher = new.export.watcher
    assert {i.key: (watcher.mask_of(i), watcher.wd_of(i)) for i in watcher.inodes()} == before
    guest = back(new)
    assert new.take(guest) == []
    after = {inode and inode.key: m for inode, m in new.export.interest.marks(guest).items()}
    assert after == marks
    (new.source / "d/f").write_text("x")
    assert set(plain(new.take(guest))) == {(b"d/f", "modify")}


def test_wds_with_gaps_come_back(world: World, restart: Callable[..., World]) -> None:
    guest = kept(world)
    for number in range(20):
        (world.source / str(number)).mkdir()
        world.mark(guest, str(number), STRUCTURE)
    for number in range(0, 20, 3):
        world.export.update(guest, world.node(str(number)).key, 0)
    wds = {str(n): world.export.watcher.wd_of(world.node(str(n))) for n in range(20)}
    new = restart(world)
    watcher = new.export.watcher
    assert {str(n): watcher.wd_of(new.node(str(n))) for n in range(20)} == wds
    new.mark(back(new), "0", STRUCTURE)
    assert watcher.wd_of(new.node("0")) > max(wds.values())


def test_what_happened_meanwhile_is_delivered(world: World, restart: Callable[..., World]) -> None:
    for path in ("a", "b"):
        (world.source / path).mkdir()
    for path in ("a/moved", "a/gone", "a/same", "a/grown", "a/mode", "a/replaced"):
        (world.source / path).write_text("old")
    kept(world, "a", "b", mask=CHANGES)

    def meanwhile(source: Path) -> None:
        (source / "a/moved").rename(source / "b/here")
        (source / "a/gone").unlink()
        (source / "a/new").write_text("new")
        (source / "a/newdir").mkdir()
        (source / "a/grown").write_text("grown")
        (source / "a/mode").chmod(0o600)
        (source / "tmp").write_text("other")
        (source / "tmp").rename(source / "a/replaced")

    new = restart(world, meanwhile)
    seen = new.take(back(new))
    cookies = {event.cookie for event in seen if event.mask in MOVE}
    assert len(cookies) == 1
    assert sorted(plain(seen)) == sorted(
        [
            (b"a/moved", "moved_from"), (b"b/here", "moved_to"), (b"a/gone", "delete"),
            (b"a/new", "create"), (b"a/new", "modify"), (b"a/new", "close_write"),
            (b"a/newdir", "create,isdir"), (b"a/grown", "modify"), (b"a/grown", "close_write"),
            (b"a/mode", "attrib"), (b"a/replaced", "delete"), (b"a/replaced", "create"),
            (b"a/replaced", "modify"), (b"a/replaced", "close_write"),
        ]
    )  # fmt: skip
    (new.source / "b/here").write_text("x")
    (new.source / "a/newdir").rmdir()
    after = plain(new.take(back_again(new)))
    assert (b"b/here", "modify") in after
    assert (b"a/newdir", "delete,isdir") in after


def back_again(world: World) -> Observer:
    (guest,) = (g for g in world.export.guests if isinstance(g, Observer))
    return guest


def test_a_marked_object_that_went(world: World, restart: Callable[..., World]) -> None:
    (world.source / "d").mkdir()
    (world.source / "d/f").touch()
    (world.source / "d/g").touch()
    kept(world, "d/f", "d/g", "d", mask=int(Mask.DELETE_SELF | Mask.MOVE_SELF))
    new = restart(world, lambda source: _remove(source))
    assert sorted(plain(new.take(back(new)))) == [
        (b"d/f", "delete_self"), (b"d/g2", "move_self")
    ]  # fmt: skip


def _remove(source: Path) -> None:
    (source / "d/f").unlink()
    (source / "d/g").rename(source / "d/g2")


def test_undelivered_events_come_first(world: World, restart: Callable[..., World]) -> None:
    kept(world, "", mask=STRUCTURE)
    for name in "abc":
        (world.source / name).touch()
    new = restart(world, lambda source: (source / "d").touch())
    assert plain(new.take(back(new))) == [(name, "create") for name in (b"a", b"b", b"c", b"d")]


@pytest.mark.parametrize("received", range(6))
def test_each_event_once(received: int, world: World, restart: Callable[..., World]) -> None:
    """Handed out is not received: only the guest knows how many have arrived."""
    guest = kept(world, "", mask=STRUCTURE)
    for name in "abcde":
        (world.source / name).touch()
    world.pump()
    guest.take(2)
    guest.take(2)  # the first two have left
    new = restart(world, lambda source: (source / "z").touch())
    rest = "abcde"[max(received, 2) :] + "z"
    assert plain(new.take(back(new, received))) == [(c.encode(), "create") for c in rest]


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_an_absent_server_is_an_overflow_where_that_is_asked(
    make_world: Worlds, asked: bool
) -> None:
    world = make_world()
    kept(world, "", mask=STRUCTURE)
    (world.source / "a").touch()
    world.pump()
    saved = take.take(world.export)
    world.close()
    (world.source / "b").touch()
    new = make_world(overflow_after_loss=asked)
    Resumption(new.export, saved).finish()
    guest = back(new)
    new.pump()
    reported = [message for message in guest.take(100) if isinstance(message, frames.Event)]
    lost = [(Mask.Q_OVERFLOW, b"")] if asked else []  # first: a rescan misses nothing
    created = [(Mask.CREATE, name) for name in (b"a", b"b")]
    assert [(event.mask, event.name) for event in reported] == lost + created


def test_whole_file_system(world: World, restart: Callable[..., World]) -> None:
    (world.source / "a/b").mkdir(parents=True)
    guest = kept(world)
    world.export.update(guest, WHOLE, STRUCTURE)
    world.pump()

    def meanwhile(source: Path) -> None:
        (source / "a/b/f").touch()
        (source / "a/c/d").mkdir(parents=True)
        (source / "a/c/d/e").touch()

    new = restart(world, meanwhile)
    seen = plain(new.take(back(new)))
    assert sorted(seen) == [
        (b"a/b/f", "create"), (b"a/c", "create,isdir"), (b"a/c/d", "create,isdir"),
        (b"a/c/d/e", "create"),
    ]  # fmt: skip
    (new.source / "a/c/d/g").touch()
    assert plain(new.take(back_again(new))) == [(b"a/c/d/g", "create")]


def test_marks_by_hand_come_back(world: World, restart: Callable[..., World]) -> None:
    world.mark(world.export.hand_marks(), "", STRUCTURE)
    new = restart(world, lambda source: (source / "x").touch())
    (new.source / "y").touch()
    new.pump()
    assert new.export.hand_marks().counts["replayed"] == 2


def test_a_machines_marks_by_hand_come_back_with_it(world: World, make_world: Worlds) -> None:
    for name in ("one", "two", "host"):
        (world.source / name).mkdir()
    mounts = {name: world.mount(name, agent=False).guest for name in ("one", "two")}
    for name in ("one", "two", "host"):
        world.mark(world.export.hand_marks(mounts.get(name)), name, STRUCTURE)
    settle(world.source)
    ending.settle(world.export, 10)
    saved = take.take(world.export, {guest: {} for guest in mounts.values()})
    world.close()
    new = make_world()
    resumption = Resumption(new.export, saved)
    again = new.mount("one", agent=False).guest  # the other one has gone meanwhile
    resumption.mount(again)
    resumption.finish()
    marked = {
        name: {inode and inode.name for inode in new.export.interest.marks(guest)}
        for name, guest in (
            ("one", new.export.hand_marks(again)), ("host", new.export.hand_marks())
        )
    }  # fmt: skip
    assert marked == {"one": {b"one"}, "host": {b"host"}}
    assert not new.export.interest.aggregate(new.node("two"))


def test_an_observer_that_did_not_ask_is_dropped(
    world: World, restart: Callable[..., World]
) -> None:
    world.mark(world.observer(), "", STRUCTURE)
    new = restart(world)
    assert new.export.guests == []
    assert not len(new.export.watcher)
    assert len(new.table) == 1


def test_a_guest_cannot_have_the_state_saved(world: World) -> None:
    """Where no edge allows it, as for virtual machines."""
    operations = world.mount(agent=False)
    hidden = operations.hidden
    with pytest.raises(OSError, match=r".") as error:
        hidden.open(frames.CHECKPOINT, USER, os.O_RDONLY)
    assert error.value.errno == errno.EOPNOTSUPP
    hidden = HiddenFiles(world.export, operations.guest, lambda: {"path": "somewhere"})
    handle = hidden.open(frames.CHECKPOINT, USER, os.O_RDONLY)
    assert json.loads(handle.text) == {"path": "somewhere"}


def test_a_token_is_good_once(world: World, restart: Callable[..., World]) -> None:
    kept(world, "")
    new = restart(world)
    assert new.export.reconnect(b"another", 0) is None
    assert new.export.reconnect(TOKEN, 0) is not None
    assert new.export.reconnect(TOKEN, 0) is None


def test_an_observer_that_does_not_reconnect_is_given_up(
    world: World, restart: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "WAIT_FOR", 0.2)
    kept(world, "")
    new = restart(world)
    new.pump()
    assert 0 < new.export.next_deadline - time.monotonic() <= 0.2
    while new.export.waiting:
        time.sleep(0.01)
        new.pump()
    assert new.export.guests == []
    assert not len(new.export.watcher)
    assert new.export.next_deadline == float("inf")


def test_missed_events_come_back(make_world: Worlds, restart: Callable[..., World]) -> None:
    world = make_world(outbox_limit=2)
    kept(world, "", mask=STRUCTURE)
    for name in "abcd":
        (world.source / name).touch()
    new = restart(world, lambda source: (source / "a").unlink())
    guest = back(new)
    seen = plain(new.take(guest))
    assert seen[:2] == [(b"a", "create"), (b"b", "create")]
    new.export.recovery.catch_up(guest)
    rest = plain(new.take(guest))
    assert sorted(rest) == [(b"a", "delete"), (b"c", "create"), (b"d", "create")]


def test_a_storm_at_the_restart(world: World, make_world: Callable[..., World]) -> None:
    """Changes while listings are compared: each comes once, by the difference or by its event."""
    for number in range(30):
        (world.source / f"d{number}").mkdir()
    kept(world, *(f"d{n}" for n in range(30)), mask=int(Mask.CREATE))
    world.pump()
    saved = take.take(world.export)
    world.close()
    new = make_world()
    pid = os.fork()
    if not pid:
        for number in range(3000):
            (world.source / f"d{number % 30}/{number}").touch()
        os._exit(0)
    Resumption(new.export, saved).finish()
    os.waitpid(pid, 0)
    seen = [path for path, _ in plain(new.take(back(new)))]
    assert len(seen) == 3000
    assert len(set(seen)) == 3000


def test_one_object_that_was_known_twice(world: World, restart: Callable[..., World]) -> None:
    """Looked up, forgotten and looked up again it has had two nodes; listings name either."""
    kept(world, "", mask=STRUCTURE)
    (world.source / "x").touch()
    os.link(world.source / "x", world.source / "y")
    world.pump()
    assert world.root.listing is not None
    names = world.root.listing.names
    for name in (b"x", b"y"):
        inode = world.export.fs.peek(world.root, name).inode
        names[name] = names[name]._replace(inode=inode)
        world.table.release(inode)
        inode.nodeid = (1 << 62) + name[0]
    new = restart(world, lambda source: (source / "x").rename(source / "z"))
    (seen,) = {event.path for event in new.take(back(new)) if event.mask == "moved_to"}
    assert seen == b"z"


# What is refused


def _saved(world: World) -> SavedExport:
    kept(world, "")
    return take.take(world.export)


@pytest.mark.parametrize("tokens", [[b""], [b"short"], [TOKEN, TOKEN]])
def test_guests_that_nobody_could_be(tokens: list[bytes], world: World, make_world: Worlds) -> None:
    saved = _saved(world)
    (guest,) = saved.guests
    saved.guests = [dataclasses.replace(guest, token=token) for token in tokens]
    with pytest.raises(ImageError, match="impossible"):
        Resumption(make_world().export, saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"root_ino": 1}, "another directory"),
        ({"root_handle": b"x"}, "another directory"),
        ({"file_system": 1}, "another file system"),
        ({"watches": [(1, 0)]}, "watch descriptors"),
        ({"watches": [(1, 1 << 31)]}, "watch descriptors"),
        ({"watches": [(1, 3), (1, 4)]}, "watch descriptors"),
        ({"watches": [(5, 3)]}, "used but not saved"),
        ({"listed": [5]}, "used but not saved"),
    ],
)
def test_refused(
    change: dict[str, object], words: str, world: World, make_world: Callable[..., World]
) -> None:
    saved = _saved(world)
    for name, value in change.items():
        setattr(saved, name, value)
    new = make_world()
    with pytest.raises(ImageError, match=words):
        Resumption(new.export, saved).finish()


def test_a_mount_continues_by_its_name(world: World, make_world: Callable[..., World]) -> None:
    (world.source / "d").mkdir()
    mount = world.mount("the guest")
    world.mark(mount.guest, "d", STRUCTURE)
    (world.source / "d/a").touch()
    (world.source / "d/a").rename(world.source / "d/b")
    mount.guest.take(1)
    settle(world.source)
    ending.settle(world.export, 10)
    saved = take.take(world.export, {mount.guest: {world.node("d").nodeid: 3}})
    world.close()
    (world.source / "d/c").touch()
    new = make_world()
    resumption = Resumption(new.export, saved)
    operations = new.mount("the guest")
    assert resumption.mount(operations.guest) == {new.node("d").nodeid: 3}
    resumption.finish()
    orders = [(order.op.name, order.name, order.name2) for order in new.orders(operations)]  # type: ignore[attr-defined]
    assert orders == [("CREATE", b"a", b""), ("RENAME", b"a", b"b"), ("CREATE", b"c", b"")]
