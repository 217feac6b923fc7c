"""What one frame, event or guest may cost: a turn at a time, and memory that does not grow."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fsd.events.backlog import _OVERFLOW
from fsd.export import arming, channel, export, watches
from fsd.export.channel import Channel
from fsd.files import forgotten
from fsd.files.forgotten import Forgotten, ForgottenObjects
from fsd.files.inode import Identity
from fsd.fuse import hidden
from fsd.guests import guest as guests
from fsd.guests import mount as mount_guest
from fsd.linux import openers
from fsd.pacing import chores, windows
from fsd.pacing.chores import Chores, Job, Pause, begin, finish
from protocol import frames
from protocol.masks import Mask

from .conftest import Worlds
from .support import ALL, STRUCTURE, USER, WHOLE, World, plain

SECONDS = 60.0
"""In which anything here is done, on the slowest machine."""


def observer_session(world: World, via: mount_guest.MountGuest | None = None) -> Channel:
    session = Channel(world.export, "tool", os.getpid(), via=via)
    session.receive(frames.encode(frames.Hello(frames.VERSION, frames.Role.OBSERVER, ALL)))
    read(session)
    return session


def read(session: Channel) -> list[frames.Message]:
    reader = frames.FrameReader()
    while data := session.outgoing(1 << 16):
        reader.feed(data)
    return list(reader)


def turns(world: World, until: Callable[[], bool]) -> int:
    """Give the export its turns; returns how many it took."""
    deadline = time.monotonic() + SECONDS
    count = 0
    while not until():
        assert time.monotonic() < deadline, "it is never done"
        world.export.process(64)
        count += 1
    return count


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step or two, so that small trees are large ones."""
    monkeypatch.setattr(chores, "AT_ONCE", 2)
    monkeypatch.setattr(begin, "__defaults__", (2,))
    monkeypatch.setattr(chores, "TURN", 0.0)
    monkeypatch.setattr(export, "TURN", 0.0)
    monkeypatch.setattr(watches, "CHUNKS_AT_ONCE", 1)
    monkeypatch.setattr(chores, "SLICE", 0.0)
    monkeypatch.setattr(Chores.run, "__defaults__", (0.0,))


# Jobs


def test_owners_have_turns_however_many_jobs_one_has() -> None:
    done: list[str] = []

    def job(name: str) -> Job[None]:
        for _ in range(3):
            done.append(name)
            yield Pause.LATER

    table = Chores()
    for _ in range(50):
        table.add("greedy", job("greedy"))
    table.add("modest", job("modest"))
    for _ in range(3):
        table.run()
    assert done.count("modest") == 3
    assert len(done) < 20
    table.close()
    assert not table


def test_what_a_job_raises_ends_it_alone() -> None:
    def bad() -> Job[None]:
        yield None
        raise ValueError("boom")

    done = []

    def good() -> Job[None]:
        yield None
        done.append(1)

    table = Chores()
    table.add("a", bad())
    table.add("b", good())
    failed = 0
    while table:
        failed += table.run()
    assert (failed, done) == (1, [1])


def test_finish_returns_what_the_job_does() -> None:
    def job() -> Job[int]:
        yield None
        yield Pause.LATER
        return 7

    assert finish(job()) == 7


# Frames


@pytest.mark.usefixtures("short_turns")
def test_a_write_of_many_frames_is_done_in_turns_and_answered_in_order(world: World) -> None:
    for n in range(30):
        (world.source / f"d{n}").mkdir()
    session = observer_session(world)
    wanted = [frames.Resolve(n, b"d%d" % n) for n in range(30)]
    session.receive(b"".join(map(frames.encode, wanted)))
    assert world.export.chores
    answers: list[frames.Message] = []

    def is_answered() -> bool:
        answers.extend(read(session))
        return len(answers) == 30

    assert turns(world, is_answered) > 1
    assert [answer.request for answer in answers if isinstance(answer, frames.Result)] == [
        *range(30)
    ]
    session.close()
    world.pump()
    assert len(world.table) == 1


def test_one_of_many_frames_that_is_none_ends_the_session_in_its_turn(
    world: World, short_turns: None
) -> None:
    session = observer_session(world)
    good = frames.encode(frames.Resolve(1, b"")) * 10
    session.receive(good + b"\x09\0\0\0\xff\xff\0\0x")
    turns(world, lambda: session.said_bye)
    with pytest.raises(frames.ProtocolError):
        session.receive(good)
    assert world.export.guests == []


def test_a_resolve_of_very_many_steps_takes_none_for_those_that_lead_back(world: World) -> None:
    (world.source / "d").mkdir()
    session = observer_session(world)
    session.receive(frames.encode(frames.Resolve(1, b"d/../" * 12_000)))
    world.pump()
    (answer,) = read(session)
    assert isinstance(answer, frames.Result)
    assert (answer.errno, answer.nodeid) == (0, 1)
    session.close()


def test_unread_answers_are_bounded_and_what_is_asked_is_answered_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "ANSWERS_LIMIT", 4096)
    session = observer_session(world)
    session.receive(frames.encode(frames.StatsRequest(1)) * 1000)
    world.pump()
    assert session._answers_size < 3 * 4096
    assert not world.export.chores  # nothing to do until they are read: no processor is taken
    answered = 0

    def is_answered() -> bool:
        nonlocal answered
        answered += sum(isinstance(m, frames.Stats) and not m.more for m in read(session))
        return answered == 1000

    turns(world, is_answered)
    session.close()


def test_a_write_waits_while_too_much_is_to_be_handled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "ANSWERS_LIMIT", 4096)
    monkeypatch.setattr(channel, "PENDING_LIMIT", 2000)
    session = observer_session(world)
    taken: list[int] = []
    session.receive(frames.encode(frames.StatsRequest(1)) * 300)
    world.pump()
    assert session.is_full
    session.when_taken(lambda: taken.append(1))
    world.pump()
    assert not taken

    def is_taken() -> bool:
        read(session)
        return bool(taken)

    turns(world, is_taken)
    turns(world, lambda: not session.is_full)
    session.close()


def test_a_read_by_the_byte_copies_what_it_returns(world: World) -> None:
    for n in range(1500):
        (world.source / f"a-directory-of-some-length-{n:0100}").mkdir()
    session = observer_session(world)
    session.receive(frames.encode(frames.List(1, 1, 0)))
    world.pump()
    assert session.outgoing(1)
    left = len(session._unsent)
    assert left > 100_000
    data = session._unsent.obj
    for _ in range(100):
        session.outgoing(1)
    assert session._unsent.obj is data  # the same bytes, not a copy of what is left
    assert len(session._unsent) == left - 100
    session.close()


def test_a_list_of_a_directory_larger_than_the_answers_that_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "ANSWERS_LIMIT", 1024)
    for n in range(3000):
        (world.source / f"d{n}").mkdir()
    session = observer_session(world)
    session.receive(frames.encode(frames.List(1, 1, 0)))
    names: list[bytes] = []

    def is_complete() -> bool:
        answers = [m for m in read(session) if isinstance(m, frames.Name)]
        names.extend(m.name for m in answers if m.more)
        return any(not m.more for m in answers)

    turns(world, is_complete)
    assert sorted(names) == sorted(b"d%d" % n for n in range(3000))
    session.close()


# The whole tree


@pytest.fixture
def tree(world: World) -> Path:
    for n in range(10):
        for k in range(10):
            (world.source / f"t{n}/d{k}").mkdir(parents=True)
    return world.source


@pytest.mark.usefixtures("short_turns")
def test_the_whole_tree_is_watched_in_turns_and_then_answered(world: World, tree: Path) -> None:
    session = observer_session(world)
    session.receive(frames.encode(frames.Update(5, 0, 0, STRUCTURE)))
    assert len(world.export.watcher) < 20
    assert not read(session)
    answers: list[frames.Message] = []

    def is_answered() -> bool:
        answers.extend(read(session))
        return bool(answers)

    assert turns(world, is_answered) > 5
    assert len(world.export.watcher) == 111
    assert [(m.request, m.errno) for m in answers if isinstance(m, frames.Result)] == [(5, 0)]
    session.close()
    world.pump()
    assert len(world.export.watcher) == 0
    assert len(world.table) == 1


@pytest.mark.usefixtures("short_turns")
def test_what_happens_during_the_walk_is_delivered(world: World, tree: Path) -> None:
    guest = world.observer()
    world.export.update(guest, WHOLE, STRUCTURE)
    assert world.export.is_arming(None)
    seen: list[tuple[bytes, str]] = []
    for n in range(20):
        (tree / f"new{n}/below").mkdir(parents=True)
        world.export.watcher.drain()
        world.export.process(64)
        seen += plain(world.taken(guest))
    seen += plain(world.take(guest))
    made = [name for n in range(20) for name in (b"new%d" % n, b"new%d/below" % n)]
    assert sorted(seen) == sorted((name, "create,isdir") for name in made)
    assert len(world.export.watcher) == 111 + 40


@pytest.mark.usefixtures("short_turns")
def test_switching_it_on_and_off_leaves_one_walk(world: World, tree: Path) -> None:
    guest = world.observer()
    for _ in range(50):
        world.export.update(guest, WHOLE, STRUCTURE)
        world.export.process(1)
        world.export.update(guest, WHOLE, 0)
        world.export.process(1)
    world.pump()
    assert len(world.export.watcher) == 0
    assert not world.export.is_busy
    assert len(world.table) == 1


@pytest.mark.usefixtures("short_turns")
def test_a_huge_directory_is_listed_in_turns_and_events_meanwhile_hold(world: World) -> None:
    for n in range(2000):
        (world.source / f"file-number-{n}").touch()
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE)
    listing = world.root.listing
    assert listing is not None
    assert not listing.complete
    for n in range(0, 2000, 100):
        (world.source / f"file-number-{n}").unlink()
        (world.source / f"new-{n}").touch()
        world.export.watcher.drain()
        world.export.process(64)
    turns(world, lambda: world.root.listing is listing and listing.complete)
    world.pump()
    assert set(listing.names) == set(os.listdir(os.fsencode(world.source)))


@pytest.mark.usefixtures("short_turns")
def test_a_comparison_lets_requests_in_between_and_events_wait_for_it(world: World) -> None:
    for n in range(200):
        (world.source / f"f{n}").touch()
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE)
    world.pump()
    world.export.watcher.queue.push(_OVERFLOW, guest, time.monotonic())
    (world.source / "late").touch()
    world.export.watcher.drain()
    world.export.process(64)
    assert world.export.is_behind  # a turn was not enough
    assert not world.taken(guest)
    assert plain(world.take(guest)).count((b"late", "create")) >= 1


# Refused watches


def test_only_refused_directories_are_looked_at_and_seldom(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "COMPARE_EVERY", 0.01)
    world = make_world(watch_limit=20)
    for n in range(25):
        (world.source / f"d{n:02}").mkdir()
    guest = world.observer()
    for n in range(25):
        with suppress(OSError):
            world.mark(guest, f"d{n:02}", STRUCTURE)
    assert world.export.watches.unwatched
    seen: set[bytes] = set()
    real = world.export.reader.names_in

    def names_in(inode: object) -> Iterator[object]:
        seen.add(inode.path())  # type: ignore[attr-defined]
        return real(inode)  # type: ignore[arg-type]

    monkeypatch.setattr(world.export.reader, "names_in", names_in)
    (world.source / "d24/x").mkdir()
    reported: list[tuple[bytes, str]] = []

    def is_delivered() -> bool:
        reported.extend(plain(world.taken(guest)))
        return bool(reported)

    turns(world, is_delivered)
    assert reported == [(b"d24/x", "create,isdir")]
    assert len(seen) == len([node for node in world.export.watches.unwatched if node.is_dir])


# Memory


def test_a_guest_that_never_reads_keeps_no_names_of_what_came_and_went(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "PRUNE_AT", 100)
    world = make_world(outbox_limit=10)
    guest = world.observer()
    guest._prune_at = 100
    world.mark(guest, mask=STRUCTURE)
    for n in range(1000):
        (world.source / f"f{n}").touch()
        (world.source / f"f{n}").unlink()
    (world.source / "stays").touch()
    world.pump()
    assert len(guest.missed) < 100
    world.taken(guest)
    world.export.recovery.catch_up(guest)
    assert (b"stays", "create") in plain(world.take(guest))
    assert guest.account.used == 0


def test_more_names_than_can_be_kept_are_found_by_their_times(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the observer hears, as of an inotify queue that was full, that there was more."""
    monkeypatch.setattr(guests, "MISSED_LIMIT", 200)
    monkeypatch.setattr(guests, "PRUNE_AT", 100)
    world = make_world(outbox_limit=10)
    guest = world.observer()
    guest._prune_at = 100
    world.mark(guest, mask=STRUCTURE)
    for n in range(500):
        (world.source / f"f{n}").touch()
        if n % 20 == 0:
            world.pump()
    world.pump()
    assert not guest.missed
    assert guest.lost_since
    taken = guest.take(1000)
    guest.limit = 1000
    world.export.recovery.catch_up(guest)
    world.pump()
    taken += guest.take(1000)
    reported = [m for m in taken if isinstance(m, frames.Event)]
    assert sum(m.mask == Mask.Q_OVERFLOW for m in reported) == 1
    assert {m.name for m in reported if m.mask & Mask.CREATE} == {b"f%d" % n for n in range(500)}
    assert not guest.missing


def test_the_outboxes_of_one_guest_share_a_bound_in_bytes(world: World) -> None:
    mount, other = world.mount(), world.observer("of another guest")
    first, second = world.observer("first"), world.observer("second")
    for guest in (first, second):
        guest.join(mount.guest)
        world.mark(guest, mask=STRUCTURE)
    world.mark(other, mask=STRUCTURE)
    mount.guest.account.limit = 50 * guests.EVENT_COST
    for n in range(100):
        (world.source / f"f{n}").touch()
    world.pump()
    assert mount.guest.account.used <= 52 * (guests.EVENT_COST + 10) + 200 * (
        guests.MISSED_COST + 10
    )
    assert first.depth + second.depth <= 52
    assert other.depth == 100
    world.export.remove_guest(first)
    world.taken(second)
    mount.guest.account.limit = 1 << 20
    world.export.recovery.catch_up(second)
    world.taken(second)
    assert mount.guest.account.used == 0


def test_hints_that_nobody_reads_become_one_to_read_everything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount_guest, "HINTS_LIMIT", 10)
    mount = world.mount()
    for pid in range(100, 200):
        mount.guest.hint(pid)
    hints = [m for m in mount.guest.take(1000) if isinstance(m, frames.Hint)]
    assert [m.pid for m in hints] == [frames.ALL_PROCESSES]


def test_sessions_of_a_mount_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "CHANNELS_LIMIT", 3)
    mount, other = world.mount(), world.mount("other")
    held = [mount.files.open(USER, frames.SESSION, os.O_RDWR) for _ in range(3)]
    with pytest.raises(OSError, match="files") as error:
        mount.files.open(USER, frames.SESSION, os.O_RDWR)
    assert error.value.errno == errno.ENFILE
    other.files.release(other.files.open(USER, frames.SESSION, os.O_RDWR))
    mount.files.release(held.pop())
    held.append(mount.files.open(USER, frames.SESSION, os.O_RDWR))
    for fh in held:
        mount.files.release(fh)


def test_looked_up_directories_are_followed_up_to_a_bound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arming, "DIRECTORIES_LIMIT", 5)
    for n in range(20):
        (world.source / f"d{n}").mkdir()
    mount, other = world.mount(), world.mount("other")
    for n in range(20):
        node = mount.lookup(USER, 1, b"d%d" % n).inode
        mount.files.opendir(USER, node.nodeid)
    assert len(world.export.watcher) <= 6
    node = other.lookup(USER, 1, b"d19").inode
    other.files.opendir(USER, node.nodeid)
    assert world.host_mask(node)  # the bound is each guest's own


def test_histories_of_looked_up_directories_share_a_bound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arming, "HISTORIES_LIMIT", 50)
    mount = world.mount()
    for n in range(10):
        (world.source / f"d{n}").mkdir()
        mount.files.opendir(USER, mount.lookup(USER, 1, b"d%d" % n).inode.nodeid)
    for n in range(10):
        for k in range(20):
            (world.source / f"d{n}/f{k}").touch()
    world.pump()
    assert world.export.arming._kept <= 60
    for n in range(windows.KEEP_RENEWALS + 1):  # no agent answers
        world.export.arming.expire(time.monotonic() + (n + 1) * 2 * windows.KEEP)
    assert world.export.arming._kept == 0


def test_ways_to_directories_are_not_kept_for_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount_guest, "WAYS_LIMIT", 50)
    mount = world.mount()
    world.export.update(mount.guest, WHOLE, STRUCTURE)
    for n in range(100):
        (world.source / f"d{n}/e").mkdir(parents=True)
        world.orders(mount)
    assert len(mount.guest._ways) <= 50


def test_forgetting_takes_the_same_time_however_many_were_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen from the structure: the oldest is taken from the head without a search."""
    objects = ForgottenObjects()
    limit = 131_072
    monkeypatch.setattr(forgotten, "FORGOTTEN_LIMIT", limit)
    for n in range(limit):
        objects.add(n, Forgotten(Identity(1, n, b"x", 1), 1, b"name"))
    for _ in range(2):
        for n in range(limit):
            objects.drop(n)
        begun = time.process_time()
        for n in range(limit + 20_000):
            objects.add(n, Forgotten(Identity(1, n, b"x", 1), 1, b"name"))
        assert time.process_time() - begun < 10  # it took minutes


def test_a_turn_reads_no_more_than_it_is_to(world: World) -> None:
    world.export.update(world.observer(), WHOLE, STRUCTURE)
    for n in range(100):
        (world.source / f"f{n}").touch()
    watcher = world.export.watcher
    watcher.drain(1)  # a buffer of the longest event: some ten of these
    assert 0 < watcher.backlog < 30
    watcher.drain()
    assert watcher.backlog == 100


# Watches of the host


def test_a_guest_does_not_take_the_last_watches_from_another(make_world: Worlds) -> None:
    world = make_world(watch_limit=40)
    greedy, modest = world.mount("greedy"), world.mount("modest")
    for n in range(60):
        (world.source / f"d{n}").mkdir()

    def watched(guest: mount_guest.MountGuest, numbers: range) -> int:
        count = 0
        for n in numbers:
            with suppress(OSError):
                world.mark(guest, f"d{n}", int(Mask.ACCESS))
                count += 1
        return count

    first = watched(greedy.guest, range(40))
    assert 20 <= first <= 30
    assert watched(modest.guest, range(40, 60)) >= 9
    assert len(world.export.watcher) <= 40


def test_a_server_leaves_watches_for_other_programs(world: World) -> None:
    host = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    assert world.export.watch_limit is not None
    assert 0 < world.export.watch_limit <= host * 3 // 4


# How files are open


def test_one_scan_of_all_processes_answers_for_all_files(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[int] = []
    real = openers.scan

    def scan(files: set[openers.File]) -> dict[openers.File, bool]:
        scans.append(len(files))
        return real(files)

    monkeypatch.setattr(openers, "scan", scan)
    # However busy the machine is: what is tried here is not how long a scan may take.
    monkeypatch.setattr(openers, "SCAN_TIME", 60)
    monkeypatch.setattr(windows, "OPENERS_WAIT", 60)
    for n in range(50):
        (world.source / f"f{n}").touch()
    mount = world.mount()
    world.mark(mount.guest)
    held = [os.open(world.source / f"f{n}", os.O_RDWR if n % 2 else os.O_RDONLY) for n in range(50)]
    try:
        orders = world.orders(mount)
    finally:
        for fd in held:
            os.close(fd)
    opens = [(order.name, order.arg) for order in orders if order.op == frames.Op.OPEN]
    assert opens == [(b"f%d" % n, n % 2) for n in range(50)]
    assert len(scans) < 25
    assert max(scans) > 1


def test_how_one_file_is_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    file = (path.stat().st_dev, path.stat().st_ino)
    assert openers.is_open_for_writing(*file) is None
    with path.open("rb"):
        assert openers.is_open_for_writing(*file) is False
        with path.open("r+b"):
            assert openers.is_open_for_writing(*file) is True
