"""The arming gap: what happens on the host between inotify_add_watch(2) in the guest
and the mark's arrival here is delivered; what happened before, or is delivered anyway, is not.
"""

from __future__ import annotations

import os
import time

import pytest

from fsd.checkpoint.take import take
from fsd.fuse.operations import Operations
from fsd.linux.syscalls import RENAME_EXCHANGE, renameat2
from fsd.pacing.chores import finish
from protocol import frames
from protocol.frames import ALIAS, STAGING, Op
from protocol.handles import NodeKey
from protocol.masks import Mask

from .support import AGENT, ALL, DIRECTORY, MARKED, USER, WHOLE, World

CREATE = int(Mask.CREATE)


def look_up(world: World, mount: Operations, path: str) -> NodeKey:
    """What inotify_add_watch(2) by a program of the guest asks for first."""
    nodeid = 1
    for name in path.split("/"):
        nodeid = mount.lookup(USER, nodeid, name.encode()).inode.nodeid
    return world.table.get(nodeid).key


def hint(mount: Operations) -> int:
    """The hint that the agent gets."""
    hints = [m for m in mount.guest.take(1 << 20) if isinstance(m, frames.Hint)]
    assert [h.pid for h in hints] == [USER.pid]
    return hints[0].hint


def scanned(
    world: World, mount: Operations, number: int, *marks: tuple[NodeKey, int], full: bool = False
) -> list[tuple[NodeKey, Exception]]:
    """The agent has read the marks of hinted processes."""
    arming = world.export.arming
    for key, mask in marks:
        arming.scan_update(mount.guest, key, mask)
    world.export.watcher.drain()
    return arming.scan_end(mount.guest, number, full=full)


def replays(world: World, mount: Operations) -> list[tuple[Op, bytes]]:
    return [(Op(order.op), order.name) for order in world.orders(mount)]


@pytest.fixture
def mount(world: World) -> Operations:
    (world.source / "d").mkdir()
    (world.source / "d/file").write_text("x")
    return world.mount()


def test_an_event_before_the_mark_arrives_is_delivered(world: World, mount: Operations) -> None:
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/x").mkdir()
    world.pump()
    (world.source / "d/y").mkdir()
    assert scanned(world, mount, number, (key, CREATE)) == []
    (world.source / "d/z").mkdir()
    assert replays(world, mount) == [(Op.CREATE, b"x"), (Op.CREATE, b"y"), (Op.CREATE, b"z")]


def test_the_servers_own_doings_before_the_mark_arrives_are_not_delivered(
    world: World, mount: Operations
) -> None:
    """Another guest's mark makes the server read the directory, after the look-up."""
    key = look_up(world, mount, "d")
    number = hint(mount)
    world.mark(world.observer(), "d", ALL)
    world.pump()
    assert world.export.watcher.own_events >= 3  # OPEN, ACCESS, CLOSE_NOWRITE
    (world.source / "d/x").mkdir()
    scanned(world, mount, number, (key, ALL))
    assert replays(world, mount) == [(Op.CREATE, b"x")]


def test_the_scans_of_one_guest_say_nothing_about_another(world: World, mount: Operations) -> None:
    other = world.mount("other")
    key = look_up(world, mount, "d")
    look_up(world, other, "d")
    numbers = hint(mount), hint(other)
    (world.source / "d/x").mkdir()
    scanned(world, other, numbers[1], (key, 0))
    scanned(world, mount, numbers[0], (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"x")]
    assert replays(world, other) == []
    scanned(world, other, numbers[1], (key, CREATE))
    assert replays(world, other) == []


def test_a_guest_that_goes_leaves_the_others_history(world: World, mount: Operations) -> None:
    other = world.mount("other")
    key = look_up(world, mount, "d")
    look_up(world, other, "d")
    number = hint(mount)
    (world.source / "d/x").mkdir()
    world.pump()
    world.export.remove_guest(other.guest)
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"x")]


def test_without_a_mark_nothing_is_delivered(world: World, mount: Operations) -> None:
    """The counterpart."""
    look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/x").mkdir()
    scanned(world, mount, number)
    assert replays(world, mount) == []


def test_events_before_the_look_up_are_not_delivered(world: World, mount: Operations) -> None:
    world.mark(world.observer(), "d", ALL)  # so that the host is watched already
    (world.source / "d/before").mkdir()
    world.pump()
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/after").mkdir()
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"after")]


def test_what_waits_in_the_queue_at_the_look_up_is_not_delivered(
    world: World, mount: Operations
) -> None:
    key = look_up(world, mount, "d")
    scanned(world, mount, hint(mount))
    (world.source / "d/before").mkdir()
    look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/after").mkdir()
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"after")]


def test_a_scan_that_found_no_mark_disproves_what_was_before_it(
    world: World, mount: Operations
) -> None:
    """The mark was set later: what happened before that scan is not its to see."""
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/before").mkdir()
    scanned(world, mount, number)
    look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/after").mkdir()
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"after")]


def test_a_mark_that_a_scan_has_missed_gets_what_comes_after_its_look_up(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though an earlier look-up has just been disproved, and the scan is reported twice."""
    mount.guest.device = 1  # as of a mount of this machine, where marks can be looked for
    marks: list[tuple[NodeKey, int]] = []
    monkeypatch.setattr("fsd.export.newmarks.NewMarks.may_be", lambda *_: bool(marks))
    monkeypatch.setattr("fsd.export.newmarks.NewMarks.of", lambda *_: marks)
    key = look_up(world, mount, "d")
    first = hint(mount)
    (world.source / "d/before").mkdir()
    world.pump()
    look_up(world, mount, "d")
    marks.append((key, CREATE))
    (world.source / "d/after").mkdir()
    world.pump()
    scanned(world, mount, first)
    second = hint(mount)
    scanned(world, mount, first)
    scanned(world, mount, second, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"after")]


def test_what_another_mark_has_delivered_comes_once(world: World, mount: Operations) -> None:
    key = look_up(world, mount, "d")
    world.export.update(mount.guest, key, CREATE)
    number = hint(mount)
    (world.source / "d/x").mkdir()
    scanned(world, mount, number, (key, CREATE | int(Mask.DELETE)))
    assert replays(world, mount) == [(Op.CREATE, b"x")]


def test_own_operations_are_not_delivered(world: World, mount: Operations) -> None:
    key = look_up(world, mount, "d")
    number = hint(mount)
    mount.mkdir(USER, key.nodeid, b"own", 0o755)
    (world.source / "d/host").mkdir()
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"host")]


def test_a_mark_on_a_file(world: World, mount: Operations) -> None:
    key = look_up(world, mount, "d/file")
    number = hint(mount)
    with open(world.source / "d/file", "a") as file:
        file.write("y")
    scanned(world, mount, number, (key, int(Mask.MODIFY)))
    assert [op for op, _ in replays(world, mount)] == [Op.TOUCH]


def test_a_file_exchanged_with_one_that_nobody_looked_up(world: World, mount: Operations) -> None:
    (world.source / "d/other").write_text("other")
    key = look_up(world, mount, "d/file")
    number = hint(mount)
    one, other = (os.fsencode(world.source / "d" / name) for name in ("file", "other"))
    renameat2(-1, one, -1, other, RENAME_EXCHANGE)
    scanned(world, mount, number, (key, int(Mask.MOVE_SELF)))
    (order,) = world.orders(mount)
    assert (order.op, order.name, order.name2) == (Op.RENAME, b"file", b"other")
    assert order.arg == RENAME_EXCHANGE
    entry = mount.guest.ledger.lookup(order.nodeid2, b"other")
    assert entry is not None
    assert entry.inode.identity.ino == (world.source / "d/file").stat().st_ino


@pytest.mark.parametrize("closed", ["before the mark arrives", "after it"])
def test_a_file_replaced_while_it_is_open_ends_when_it_is_closed(
    world: World, mount: Operations, closed: str
) -> None:
    (world.source / "d/new").write_text("new")
    key = look_up(world, mount, "d/file")
    number = hint(mount)
    with open(world.source / "d/file"):
        (world.source / "d/new").rename(world.source / "d/file")
        world.pump()
        if closed == "after it":
            scanned(world, mount, number, (key, int(Mask.ATTRIB)))
    if closed != "after it":
        scanned(world, mount, number, (key, int(Mask.ATTRIB)))
    renamed, ended = world.orders(mount)
    assert (renamed.op, renamed.name2) == (Op.RENAME, b"file")
    task = mount.guest.ledger.tasks[0]
    assert task.target is world.table.find(key)
    assert task.nlink == 2  # of its replay follows an ATTRIB, and no end
    assert (ended.op, ended.nodeid, ended.name) == (Op.REMOVE, ALIAS, b"%d" % key.nodeid)


def test_what_is_remembered_of_files_is_bounded(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.export.arming.SEEN_LIMIT", 10)
    arming = world.export.arming
    for i in range(20):
        (world.source / f"d/{i}").touch()
        look_up(world, mount, f"d/{i}")
    (node,) = [n for i, n in arming._nodes.items() if i.path() == b"d"]
    assert len(node.by[mount.guest].seen) == 10
    scanned(world, mount, hint(mount))
    look_up(world, mount, "d/15")
    assert len(node.by[mount.guest].seen) == 1


def test_the_provisional_watch_ends(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody came for it: after its time nothing is watched, and rest costs nothing."""
    monkeypatch.setattr("fsd.pacing.windows.KEEP", 0.05)
    look_up(world, mount, "d")
    assert len(world.export.watcher) >= 1
    deadline = time.monotonic() + 5
    while len(world.export.watcher):
        assert time.monotonic() < deadline
        world.export.process(1)
    assert world.export.next_deadline == float("inf")
    assert not world.export.arming._nodes


def test_the_provisional_watch_lasts_until_the_agent_answers(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is very busy its answer comes after KEEP."""
    monkeypatch.setattr("fsd.pacing.windows.KEEP", 0.2)
    mount.guest.pid = AGENT.pid
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/early").mkdir()
    late = time.monotonic() + 0.5
    while time.monotonic() < late:
        world.pump()
        time.sleep(0.01)
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"early")]


def test_what_comes_while_marks_are_applied_is_delivered_after_what_was_before(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark applies and what was kept is delivered in one step."""
    monkeypatch.setattr("fsd.pacing.windows.HOLD", 0.0)
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/first").mkdir()
    world.pump()
    world.export.arming.scan_update(mount.guest, key, CREATE)
    ending = world.export.arming.scan_ending(mount.guest, number, full=False)
    for step in ending:
        assert step is None
        (world.source / "d/second").mkdir(exist_ok=True)
        world.pump()
    assert replays(world, mount)[0] == (Op.CREATE, b"first")


def test_a_long_history_does_not_keep_the_hosts_queue_from_being_read(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It overflows in a storm after a fraction of a second."""
    monkeypatch.setattr("fsd.export.arming.DRAIN_EVERY", 10)
    key = look_up(world, mount, "d")
    number = hint(mount)
    for index in range(30):
        (world.source / f"d/{index}").mkdir()
    world.pump()
    drained = 0

    def drain() -> None:
        nonlocal drained
        drained += 1
        read()

    read = world.export.watcher.drain
    monkeypatch.setattr(world.export.watcher, "drain", drain)
    scanned(world, mount, number)
    before, drained = drained, 0
    for index in range(30):
        (world.source / f"d/more{index}").mkdir()
    look_up(world, mount, "d")
    scanned(world, mount, number + 1, (key, CREATE))
    assert drained >= before + 6


def test_what_waits_in_the_queue_when_the_mark_arrives_needs_no_place_in_the_history(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storm is far ahead of what is routed, and the history would soon be full."""
    monkeypatch.setattr("fsd.export.arming.HISTORY_LIMIT", 10)
    key = look_up(world, mount, "d")
    number = hint(mount)
    for index in range(30):
        (world.source / f"d/{index}").mkdir()
        (world.source / f"d/{index}").rmdir()
    world.export.watcher.drain()
    world.export.arming.scan_update(mount.guest, key, int(Mask.DELETE))
    finish(world.export.arming.scan_ending(mount.guest, number, full=False))
    (node,) = [n for i, n in world.export.arming._nodes.items() if i.path() == b"d"]
    assert replays(world, mount) == [(Op.REMOVE, b"%d" % index) for index in range(30)]
    assert not any(kept.event.kind == int(Mask.DELETE) for kept in node.history), (
        "delivered already"
    )


def test_a_guests_own_changes_are_no_reason_to_look_for_its_marks(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs more than the look-up itself."""
    mount.guest.device = 1  # as of a mount of this machine, where marks can be looked for
    looks = 0

    def may_be(*_: object) -> bool:
        nonlocal looks
        looks += 1
        return False

    monkeypatch.setattr("fsd.export.newmarks.NewMarks.may_be", may_be)
    key = look_up(world, mount, "d")
    hint(mount)
    for index in range(5):
        mount.mkdir(USER, key.nodeid, b"own%d" % index, 0o755)
        look_up(world, mount, "d")
    assert looks == 0
    (world.source / "d/others").mkdir()
    look_up(world, mount, "d")
    assert looks == 1


def test_the_provisional_watch_becomes_the_marks(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.pacing.windows.KEEP", 0.05)
    key = look_up(world, mount, "d")
    number = hint(mount)
    node = world.table.find(key)
    assert int(world.host_mask(node)) == ALL
    scanned(world, mount, number, (key, CREATE))
    deadline = time.monotonic() + 5
    while world.export.arming._nodes:
        assert time.monotonic() < deadline
        world.export.process(1)
    assert int(world.host_mask(node)) == DIRECTORY | MARKED
    (world.source / "d/x").mkdir()
    assert replays(world, mount) == [(Op.CREATE, b"x")]


def test_history_is_bounded(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storm in a directory that somebody looked up costs bounded memory."""
    monkeypatch.setattr("fsd.export.arming.HISTORY_LIMIT", 10)
    look_up(world, mount, "d")
    for i in range(50):
        (world.source / f"d/{i}").mkdir()
    world.pump()
    (node,) = [n for i, n in world.export.arming._nodes.items() if i.path() == b"d"]
    assert len(node.history) <= 10


def test_a_full_scan_removes_what_it_does_not_name(world: World, mount: Operations) -> None:
    (world.source / "e").mkdir()
    d, e = look_up(world, mount, "d"), look_up(world, mount, "e")
    for key in (d, e):
        world.export.update(mount.guest, key, CREATE)
    world.export.update(mount.guest, WHOLE, CREATE)
    scanned(world, mount, hint(mount), (d, CREATE), full=True)
    left = {inode and inode.path() for inode in world.export.interest.marks(mount.guest)}
    assert left == {b"d"}


def test_marks_that_fail_are_said_and_the_others_hold(world: World, mount: Operations) -> None:
    key = look_up(world, mount, "d")
    bad = NodeKey(424242, 1)
    failed = scanned(world, mount, hint(mount), (bad, CREATE), (key, CREATE), (key, 1 << 30))
    assert [(k, getattr(e, "errno", None)) for k, e in failed] == [(bad, 116), (key, 22)]
    (world.source / "d/x").mkdir()
    assert replays(world, mount) == [(Op.CREATE, b"x")]


def test_an_agent_that_dies_in_a_scan_leaves_nothing_of_it(world: World, mount: Operations) -> None:
    key = look_up(world, mount, "d")
    world.export.arming.scan_update(mount.guest, key, CREATE)
    world.export.arming.scan_abort(mount.guest)
    scanned(world, mount, hint(mount))
    assert not world.export.interest.marks(mount.guest)


def test_hints_are_self_clocked(world: World, mount: Operations) -> None:
    """One hint is out at a time, however often is looked up; none is lost."""
    look_up(world, mount, "d")
    number = hint(mount)
    for _ in range(100):
        look_up(world, mount, "d")
    assert not mount.guest.has_outgoing
    scanned(world, mount, number)
    assert hint(mount) == number + 1


def test_the_replayers_own_look_ups_hint_nothing(world: World, mount: Operations) -> None:
    mount.lookup(AGENT, 1, b"d")
    mount.getattr(AGENT, 1)
    assert not mount.guest.has_outgoing


def test_another_look_up_does_not_keep_the_first_alive(world: World, mount: Operations) -> None:
    """Of a process that keeps looking, there is always one that no scan has answered."""
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/before").mkdir()
    world.pump()
    look_up(world, mount, "d")  # the next hint is for this one
    scanned(world, mount, number)
    (world.source / "d/after").mkdir()
    scanned(world, mount, hint(mount), (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"after")]


def watch_e(world: World, mount: Operations) -> None:
    """The guest has a mark on directory e, so what happens there is delivered."""
    (world.source / "e").mkdir()
    world.export.update(mount.guest, look_up(world, mount, "e"), CREATE)
    scanned(world, mount, hint(mount))


def test_what_comes_later_elsewhere_waits_for_the_scan(world: World, mount: Operations) -> None:
    watch_e(world, mount)
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "e/first").mkdir()
    world.pump()
    (world.source / "d/second").mkdir()
    (world.source / "e/third").mkdir()
    assert replays(world, mount) == [(Op.CREATE, b"first")]
    scanned(world, mount, number, (key, CREATE))
    assert replays(world, mount) == [(Op.CREATE, b"second"), (Op.CREATE, b"third")]


def test_what_waits_for_a_scan_is_saved(world: World, mount: Operations) -> None:
    watch_e(world, mount)
    look_up(world, mount, "d")
    (world.source / "d/other").mkdir()
    (world.source / "e/waits").mkdir()
    assert replays(world, mount) == []
    (guest,) = take(world.export, {mount.guest: {}}).guests
    assert [event.name for event in guest.held] == [b"waits"]


def test_a_scan_that_finds_no_mark_lets_it_go(world: World, mount: Operations) -> None:
    watch_e(world, mount)
    look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/other").mkdir()
    (world.source / "e/own").mkdir()
    assert replays(world, mount) == []
    scanned(world, mount, number)
    assert replays(world, mount) == [(Op.CREATE, b"own")]


def test_no_event_waits_for_long(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent does not answer."""
    monkeypatch.setattr("fsd.pacing.windows.HOLD", 0.05)
    watch_e(world, mount)
    look_up(world, mount, "d")
    hint(mount)
    (world.source / "d/other").mkdir()
    (world.source / "e/own").mkdir()
    assert replays(world, mount) == []
    assert world.export.next_deadline <= time.monotonic() + 0.05
    time.sleep(0.05)
    world.export.process(1)
    assert replays(world, mount) == [(Op.CREATE, b"own")]
    (world.source / "e/next").mkdir()
    assert replays(world, mount) == [(Op.CREATE, b"next")], "nor again, for the same doubt"


def test_no_more_than_a_bound_waits(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.export.arming.HOLD_LIMIT", 5)
    watch_e(world, mount)
    look_up(world, mount, "d")
    (world.source / "d/other").mkdir()
    for number in range(8):
        (world.source / f"e/{number}").mkdir()
    assert [name for _, name in replays(world, mount)] == [b"%d" % n for n in range(8)]


def test_what_is_too_much_to_keep_is_delivered_as_a_difference(
    world: World, mount: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.export.arming.HISTORY_LIMIT", 10)
    key = look_up(world, mount, "d")
    number = hint(mount)
    for name in range(30):
        (world.source / f"d/{name}").mkdir()
    (world.source / "d/29").rmdir()
    (world.source / "d/file").unlink()
    scanned(world, mount, number, (key, CREATE | int(Mask.DELETE)))
    reported = replays(world, mount)
    assert reported[:10] == [(Op.CREATE, b"%d" % name) for name in range(10)]
    mount.guest.asked()
    assert not mount.guest.depth
    # As the session does, once all that was queued is done.
    world.export.recovery.catch_up(mount.guest)
    reported += replays(world, mount)
    assert sorted(reported) == sorted(
        [*((Op.CREATE, b"%d" % name) for name in range(29)), (Op.REMOVE, b"file")]
    )


def test_a_directory_that_was_emptied_and_removed_before_its_mark_arrives(
    world: World, mount: Operations
) -> None:
    """Its orders name the way that led to it, and never the root."""
    key = look_up(world, mount, "d")
    number = hint(mount)
    (world.source / "d/file").unlink()
    (world.source / "d").rmdir()
    world.pump()
    scanned(world, mount, number, (key, int(Mask.DELETE | Mask.DELETE_SELF)))
    emptied, ended = world.orders(mount)
    assert (emptied.op, emptied.name, emptied.path) == (Op.REMOVE, b"file", b"d")
    assert (ended.op, ended.nodeid) == (Op.REMOVE, STAGING)


def test_it_is_known_which_hints_are_not_answered(world: World, mount: Operations) -> None:
    """Before another process takes over, which does not know what this one has asked."""
    arming = world.export.arming
    assert not arming.awaits(arming.asked())
    look_up(world, mount, "d")
    number = hint(mount)
    asked = arming.asked()
    assert asked == {mount.guest: number}
    assert arming.awaits(asked)
    look_up(world, mount, "d")
    later = arming.asked()
    assert later[mount.guest] > number
    scanned(world, mount, number)
    assert not arming.awaits(asked), "later look-ups are no reason to wait"
    assert arming.awaits(later)
    mount.guest.disconnect()
    assert not arming.awaits(later), "there is no agent"
