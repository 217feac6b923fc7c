"""Kinds, names, order and renames, as an observer gets them and a native watcher sees them."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pyinotify
import pytest

from fsd.linux.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from protocol import frames, masks
from protocol.inotify import parse_events
from protocol.masks import Mask

from .support import ALL, STRUCTURE, World, merged, plain

MOVED = int(Mask.MOVED_FROM | Mask.MOVED_TO)
NAMES = [
    b"with space", b"new\nline", b"tab\there", "\u00fcml\u00e4ut".encode(), "\u65e5\u672c".encode(),
    b"latin\xe9", b"\xff\xfe\x80", b"back\\slash", b"-dash", b"a" * 255, b"\xf0" * 255,
    b"sixteen bytes ok", b".hidden", b"...",
]  # fmt: skip


def exchange(one: Path, other: Path) -> None:
    renameat2(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE)


@pytest.fixture
def two(world: World) -> World:
    """An export with the directories a and b."""
    (world.source / "a").mkdir()
    (world.source / "b").mkdir()
    return world


def test_events_across_inodes_come_in_queue_order(two: World) -> None:
    guest = two.observer()
    for path in ("", "a", "b"):
        two.mark(guest, path, int(Mask.CREATE | Mask.DELETE))
    expected = []
    order = random.Random(1)
    for i in range(300):
        name = f"{order.choice(['', 'a/', 'b/'])}{i}"
        (two.source / name).touch()
        expected.append((name.encode(), "create"))
        if i % 3 == 0:
            (two.source / name).unlink()
            expected.append((name.encode(), "delete"))
    assert plain(two.take(guest)) == expected


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_names_are_bytes(world: World, name: bytes) -> None:
    """Names of 16 bytes or more did not fit the RFC's own server; UTF-8 is nobody's promise."""
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE)
    path = os.path.join(os.fsencode(world.source), name)
    other = os.path.join(os.fsencode(world.source), b"other")
    os.mkdir(path)
    os.rename(path, other)
    os.rename(other, path)
    os.rmdir(path)
    seen = world.take(guest)
    assert plain(seen) == [
        (name, "create,isdir"),
        (name, "moved_from,isdir"),
        (b"other", "moved_to,isdir"),
        (b"other", "moved_from,isdir"),
        (name, "moved_to,isdir"),
        (name, "delete,isdir"),
    ]


def test_sixteen_long_names_do_not_stop_notifications(world: World) -> None:
    """As they did in the RFC's own server."""
    guest = world.observer()
    world.mark(guest, mask=int(Mask.CREATE))
    names = [b"%03d" % i + b"n" * 252 for i in range(200)]
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(world.source), name), os.O_CREAT))
    assert [event.path for event in world.take(guest)] == names


def test_paths_longer_than_255_bytes(world: World) -> None:
    """They were cut by the RFC's own server. Longer than PATH_MAX, too."""
    fd = os.open(world.source, os.O_RDONLY)
    depth, name = 30, b"d" * 200
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    guest = world.observer()
    path = b"/".join([name] * depth)
    assert len(path) > 4096
    node = world.mark(guest, path, int(Mask.CREATE))
    assert node.path() == path
    os.mkdir(b"leaf", dir_fd=fd)
    os.close(fd)
    assert plain(world.take(guest)) == [(path + b"/leaf", "create,isdir")]


# Renames


def test_a_rename_is_one_unit_with_one_cookie(two: World) -> None:
    guest = two.observer()
    two.mark(guest, "a", MOVED)
    two.mark(guest, "b", MOVED)
    (two.source / "a/x").touch()
    os.rename(two.source / "a/x", two.source / "b/y")
    os.rename(two.source / "b/y", two.source / "b/z")
    seen = two.take(guest)
    assert plain(seen) == [
        (b"a/x", "moved_from"), (b"b/y", "moved_to"), (b"b/y", "moved_from"), (b"b/z", "moved_to"),
    ]  # fmt: skip
    cookies = [event.cookie for event in seen]
    assert cookies[0] == cookies[1] != cookies[2] == cookies[3]
    assert 0 not in cookies


def test_nothing_comes_between_the_halves(two: World) -> None:
    """Even if the host's queue has something between them, as with concurrent writers."""
    guest = two.observer()
    two.mark(guest, "a", ALL & STRUCTURE)
    two.mark(guest, "b", ALL & STRUCTURE)
    for i in range(50):
        (two.source / f"a/{i}").touch()
    for i in range(50):
        os.rename(two.source / f"a/{i}", two.source / f"b/{i}")
        (two.source / f"b/n{i}").touch()
    seen = [event for event in two.take(guest) if "moved" in event.mask]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert (first.mask, second.mask) == ("moved_from", "moved_to")
        assert first.cookie == second.cookie


@pytest.mark.parametrize(
    ("at_a", "at_b", "expected"),
    [
        (MOVED, 0, [(b"a/x", "moved_from")]),
        (0, MOVED, [(b"b/y", "moved_to")]),
        (int(Mask.MOVED_TO), int(Mask.MOVED_FROM), []),
        (int(Mask.MOVED_FROM), int(Mask.MOVED_TO), [(b"a/x", "moved_from"), (b"b/y", "moved_to")]),
    ],
)
def test_only_the_halves_asked_for(
    two: World, at_a: int, at_b: int, expected: list[tuple[bytes, str]]
) -> None:
    guest = two.observer()
    two.mark(guest, "a", at_a)
    two.mark(guest, "b", at_b)
    (two.source / "a/x").touch()
    os.rename(two.source / "a/x", two.source / "b/y")
    seen = two.take(guest)
    assert plain(seen) == expected
    assert all(event.cookie for event in seen)


def test_two_guests_with_one_half_each(two: World) -> None:
    from_a, to_b = two.observer(), two.observer()
    two.mark(from_a, "a", MOVED)
    two.mark(to_b, "b", MOVED)
    (two.source / "a/x").touch()
    os.rename(two.source / "a/x", two.source / "b/y")
    (first,), (second,) = two.take(from_a), two.take(to_b)
    assert first.mask == "moved_from"
    assert second.mask == "moved_to"
    assert first.cookie == second.cookie


def test_moved_out_and_moved_in(two: World) -> None:
    outside = two.source.parent / "outside"
    outside.mkdir()
    (two.source / "a/x").touch()
    (outside / "y").mkdir()
    guest = two.observer()
    two.mark(guest, "a", STRUCTURE)
    os.rename(two.source / "a/x", outside / "x")
    os.rename(outside / "y", two.source / "a/y")
    seen = two.take(guest)
    assert plain(seen) == [(b"a/x", "moved_from"), (b"a/y", "moved_to,isdir")]
    assert seen[0].cookie != seen[1].cookie


def test_exchange(two: World) -> None:
    """Both go both ways: two pairs, each with its cookie, as natively."""
    (two.source / "a/x").write_text("x")
    (two.source / "b/y").write_text("y")
    guest = two.observer()
    two.mark(guest, "a", MOVED)
    two.mark(guest, "b", MOVED)
    exchange(two.source / "a/x", two.source / "b/y")
    seen = two.take(guest)
    assert plain(seen) == [
        (b"a/x", "moved_from"), (b"b/y", "moved_to"), (b"b/y", "moved_from"), (b"a/x", "moved_to"),
    ]  # fmt: skip
    assert seen[0].cookie == seen[1].cookie != seen[2].cookie == seen[3].cookie


def test_exchange_of_a_directory_and_a_file_natively(two: World) -> None:
    """The second pair speaks of the other object: it is no directory."""
    (two.source / "a/dir").mkdir()
    (two.source / "b/file").touch()
    paths = [two.source / "a", two.source / "b"]
    seen = native(paths, lambda: exchange(paths[0] / "dir", paths[1] / "file"), MOVED)
    assert seen == [
        (0, "moved_from,isdir", b"dir"), (1, "moved_to,isdir", b"file"),
        (1, "moved_from", b"file"), (0, "moved_to", b"dir"),
    ]  # fmt: skip


def test_exchange_leaves_the_nodes_at_each_others_places(two: World) -> None:
    (two.source / "a/dir").mkdir()
    (two.source / "b/file").touch()
    guest = two.observer()
    two.mark(guest, "a", MOVED)
    two.mark(guest, "b", MOVED)
    directory, file = two.mark(guest, "a/dir", int(Mask.CREATE)), two.node("b/file")
    exchange(two.source / "a/dir", two.source / "b/file")
    assert [event.mask for event in two.take(guest)] == [
        "moved_from,isdir", "moved_to,isdir", "moved_from", "moved_to",
    ]  # fmt: skip
    assert (directory.path(), file.path()) == (b"b/file", b"a/dir")
    (two.source / "b/file/x").touch()
    assert plain(two.take(guest)) == [(b"b/file/x", "create")]


def test_rename_over_an_existing_name(two: World) -> None:
    for name in ("a/x", "b/y"):
        (two.source / name).write_text(name)
    guest = two.observer()
    two.mark(guest, "a", STRUCTURE)
    two.mark(guest, "b", STRUCTURE)
    victim = two.mark(guest, "b/y", int(Mask.DELETE_SELF | Mask.ATTRIB))
    os.rename(two.source / "a/x", two.source / "b/y")
    assert plain(two.take(guest))[:2] == [(b"a/x", "moved_from"), (b"b/y", "moved_to")]
    assert two.node("b/y") is not victim
    with pytest.raises(FileExistsError):
        renameat2(
            -100, os.fsencode(two.source / "a"), -100, os.fsencode(two.source / "b"),
            RENAME_NOREPLACE,
        )  # fmt: skip
    assert two.take(guest) == []


def test_a_watched_directory_keeps_its_mark_wherever_it_goes(two: World) -> None:
    guest = two.observer()
    node = two.mark(guest, "a", int(Mask.CREATE | Mask.MOVE_SELF))
    os.rename(two.source / "a", two.source / "b/deep")
    (two.source / "b/deep/x").touch()
    two.mark(guest, "b", 0)
    assert [e.mask for e in two.take(guest)] == ["move_self", "create"]
    assert two.node("b/deep") is node
    assert node.path() == b"b/deep"


# Against a native watcher


def native(paths: list[Path], act: Callable[[], None], mask: int) -> list[tuple[int, str, bytes]]:
    """What plain inotify reports, as (index of the path, mask, name)."""
    manager = pyinotify.WatchManager()
    fd = manager.get_fd()
    wds = [manager.add_watch(str(path), mask)[str(path)] for path in paths]
    act()
    os.set_blocking(fd, False)
    buffer = b""
    try:
        while True:
            buffer += os.read(fd, 1 << 20)
    except BlockingIOError:
        pass
    manager.close()
    return [
        (wds.index(e.wd), ",".join(masks.names(e.mask)), e.name)
        for e in parse_events(buffer)
        if e.wd in wds and not e.mask & Mask.IGNORED
    ]


def every_kind(top: Path) -> None:
    """One of each thing that a host does."""
    (top / "a/file").write_text("x")
    with open(top / "a/file", "a") as file:
        file.write("y")
        file.flush()
        file.write("z")
    (top / "a/file").read_text()
    os.truncate(top / "a/file", 1)
    os.chmod(top / "a/file", 0o600)
    os.utime(top / "a/file", (1, 1))
    os.link(top / "a/file", top / "b/link")
    os.symlink("nowhere", top / "a/symlink")
    os.mkfifo(top / "a/fifo")
    os.mkdir(top / "a/dir")
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(top / "a", os.O_PATH)
        listener.bind(f"/proc/self/fd/{directory}/socket")
        os.close(directory)
    os.listdir(top / "a")
    os.rename(top / "a/file", top / "a/renamed")
    os.rename(top / "a/renamed", top / "b/moved")
    os.rename(top / "b/moved", top / "b/link")  # two names of one file: nothing happens
    os.rename(top / "a/dir", top / "b/dir")
    os.rmdir(top / "b/dir")
    (top / "a/save.tmp").write_text("new")
    os.rename(top / "a/save.tmp", top / "b/link")
    for path in sorted((top / "a").iterdir()):
        path.unlink()
    with open(top / "b/open", "w") as file:
        os.unlink(top / "b/open")
        file.write("to nobody")
    exchange(top / "b/link", top / "b/moved")
    shutil.rmtree(top / "b")
    os.rename(top / "a", top / "c")


@pytest.mark.parametrize("mask", [ALL, STRUCTURE, int(Mask.MODIFY | Mask.ATTRIB | Mask.OPEN)])
def test_an_observer_sees_what_a_native_watcher_sees(two: World, mask: int) -> None:
    top = two.source.parent / "plain"
    for name in ("a", "b"):
        (top / name).mkdir(parents=True)
    expected = native([top, top / "a", top / "b"], lambda: every_kind(top), mask)
    guest = two.observer()
    nodes = [two.mark(guest, path, mask).nodeid for path in ("", "a", "b")]
    every_kind(two.source)
    two.pump()
    seen = [
        (nodes.index(event.nodeid), ",".join(masks.names(event.mask)), event.name)
        for event in guest.take(1 << 20)
        if isinstance(event, frames.Event)
    ]
    assert collapse(seen) == collapse(expected)


def collapse(events: list[tuple[int, str, bytes]]) -> list[tuple[int, str, bytes]]:
    return [event for i, event in enumerate(events) if not i or event != events[i - 1]]


def test_marks_on_a_file_and_its_directory(two: World) -> None:
    (two.source / "a/x").touch()
    guest = two.observer()
    two.mark(guest, "a", int(Mask.MODIFY))
    two.mark(guest, "a/x", int(Mask.MODIFY))
    with open(two.source / "a/x", "a") as file:
        file.write("1")
    assert merged(two.take(guest)) == [(b"a/x", "modify")]
    assert guest.counts["forwarded"] == 2  # by name, and on itself, as two native watches


def test_what_one_guest_makes_of_an_event_is_not_seen_by_another(two: World) -> None:
    """All guests share it, and a replaying one revives what is forgotten, for itself."""
    file = two.source / "a/file"
    file.touch()
    mounts = [two.mount("one"), two.mount("two")]
    for mount in mounts:
        two.mark(mount.guest, "a")
        two.mark(mount.guest, "a/file")
    file.chmod(0o600)
    file.unlink()
    two.pump()
    events = [mount.guest.undelivered() for mount in mounts]
    assert len(events[0]) == len(events[1]) >= 2
    for event in events[0]:
        assert event in events[1] or not event.name
        with pytest.raises(AttributeError, match="routed"):
            event.child = None
    orders = [[(o.op, o.name) for o in two.orders(mount)] for mount in mounts]
    assert orders[0] == orders[1]
