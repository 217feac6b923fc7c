"""Interest: what guests ask for, and the host watches that follow from it."""

from __future__ import annotations

import errno
import itertools
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsd.export.interest import Interest
from fsd.files.inode import Identity, Inode
from fsd.guests.guest import Observer
from protocol import masks
from protocol.handles import NodeKey
from protocol.masks import Mask

from .support import DIRECTORY, MARKED, WHOLE, World, plain

CREATE, DELETE, MODIFY, ATTRIB, ACCESS = (
    int(mask) for mask in (Mask.CREATE, Mask.DELETE, Mask.MODIFY, Mask.ATTRIB, Mask.ACCESS)
)


class Spy:
    """Counts the changes of host watches that really reach the kernel."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes: list[tuple[Inode, int]] = []
        manager = world.export.watcher._manager
        add, remove = manager.add_watch, manager.rm_watch

        def add_watch(path: str, mask: int, **options: object) -> object:
            result = add(path, mask, **options)
            self.changes.append((self._of(world, path), mask))
            return result

        def rm_watch(wd: int, **options: object) -> object:
            self.changes.append((self.inodes[wd], 0))
            return remove(wd, **options)

        self.inodes: dict[int, Inode] = {}
        monkeypatch.setattr(manager, "add_watch", add_watch)
        monkeypatch.setattr(manager, "rm_watch", rm_watch)

    def _of(self, world: World, path: str) -> Inode:
        identity, _ = world.table.reach.identify(int(path.rpartition("/")[2]))
        inode = world.table._by_identity[identity]
        wd = len(self.inodes) + 1  # the kernel counts from 1; one inode has one for its time
        self.inodes.setdefault(wd, inode)
        return inode

    def taken(self) -> list[int]:
        """Masks set since the last call."""
        masks, self.changes = [mask for _, mask in self.changes], []
        return masks


def test_host_mask_follows_the_aggregate_exactly(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(world, monkeypatch)
    a, b = world.observer("a"), world.observer("b")
    node = world.mark(a, mask=CREATE | ACCESS)
    assert spy.taken() == [CREATE | ACCESS | DIRECTORY | MARKED]
    world.mark(b, mask=ACCESS)
    assert spy.taken() == []  # the OR is what it was
    world.mark(b, mask=MODIFY)
    assert spy.taken() == [ACCESS | MODIFY | DIRECTORY | MARKED]
    world.mark(a, mask=ACCESS)
    assert spy.taken() == []  # names are watched for as long as anybody is interested
    world.mark(a, mask=0)
    assert spy.taken() == [MODIFY | DIRECTORY | MARKED]
    world.mark(b, mask=0)
    assert spy.taken() == [0]
    assert world.host_mask(node) == 0
    assert len(world.export.watcher) == 0


def test_repeating_a_request_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(world, monkeypatch)
    guest = world.observer()
    node = world.mark(guest, mask=MODIFY)
    pins = node.pins
    for _ in range(5):
        world.mark(guest, mask=MODIFY)
    assert spy.taken() == [MODIFY | DIRECTORY | MARKED]
    assert node.pins == pins
    world.mark(guest, mask=0)
    world.mark(guest, mask=0)
    assert spy.taken() == [0]


def test_a_leaving_guest_takes_its_marks_along(world: World) -> None:
    a, b = world.observer("a"), world.observer("b")
    for name in ("one", "two", "three"):
        (world.source / name).mkdir()
        world.mark(a, name, CREATE)
    node = world.mark(b, "two", ATTRIB)
    assert len(world.export.watcher) == 4  # and the root, for the names of the three
    world.export.remove_guest(a)
    assert a not in world.export.guests
    assert set(world.export.watcher.inodes()) == {world.root, node}
    assert world.host_mask(node) == ATTRIB | DIRECTORY | MARKED
    world.export.remove_guest(b)
    assert len(world.export.watcher) == 0
    assert not world.export.interest.inodes()


def test_marks_keep_inodes_and_their_end_releases_them(world: World) -> None:
    """Every request of the RFC's own server leaked an inode reference."""
    (world.source / "file").touch()
    guest = world.observer()
    entry = world.export.fs.lookup(world.root, b"file")
    key = entry.inode.key
    for _ in range(10):
        world.export.update(guest, key, MODIFY)
    world.table.forget(entry.inode.nodeid, 1)
    assert world.table.find(key) is entry.inode  # the mark alone holds it
    world.export.update(guest, key, 0)
    with pytest.raises(OSError, match="unknown nodeid") as error:
        world.table.find(key)
    assert error.value.errno == errno.ESTALE
    assert len(world.table) == 1


@pytest.mark.parametrize(
    "bits",
    [
        int(Mask.ONESHOT), int(Mask.EXCL_UNLINK), int(Mask.EVENT_ON_CHILD), int(Mask.IGNORED),
        int(Mask.UNMOUNT), int(Mask.ISDIR), 0x1000, 1 << 40, (1 << 64) - 1,
    ],
)  # fmt: skip
def test_a_mask_without_an_event_is_einval_and_changes_nothing(world: World, bits: int) -> None:
    """A bad mask crashed the RFC's own server."""
    guest = world.observer()
    node = world.mark(guest, mask=MODIFY)
    with pytest.raises(masks.MaskError) as error:
        world.export.update(guest, node.key, bits)
    assert error.value.errno == errno.EINVAL
    assert world.export.interest.of(guest, node) == MODIFY


def test_the_kernels_own_bits_are_stripped(world: World) -> None:
    guest = world.observer()
    bits = MODIFY | int(Mask.ONESHOT | Mask.EXCL_UNLINK | Mask.EVENT_ON_CHILD | Mask.IGNORED)
    node = world.mark(guest, mask=bits)
    assert world.export.interest.of(guest, node) == MODIFY
    assert world.host_mask(node) == MODIFY | DIRECTORY | MARKED


@pytest.mark.parametrize("key", [NodeKey(12345, 1), NodeKey(1, 7), NodeKey(2**63 + 2, 1)])
def test_an_unknown_node_is_estale(world: World, key: NodeKey) -> None:
    with pytest.raises(OSError, match="nodeid") as error:
        world.export.update(world.observer(), key, MODIFY)
    assert error.value.errno == errno.ESTALE
    assert not world.export.interest.inodes()


def test_nodeids_of_64_bits(world: World) -> None:
    """The RFC's own server cut nodeids to 32 bits."""
    guest = world.observer()
    for name in (b"one", b"two", b"three"):  # their low halves must not be the root or the whole
        inode = world.table.placeholder(0o040000, world.root, name)
    assert inode.nodeid > 1 << 32
    with pytest.raises(OSError, match="unknown nodeid"):
        world.export.update(guest, NodeKey(inode.nodeid & 0xFFFF_FFFF, inode.generation), MODIFY)
    assert world.export.update(guest, inode.key, MODIFY) is inode


def test_a_mark_on_a_file_watches_its_directory_for_names(world: World) -> None:
    (world.source / "dir").mkdir()
    (world.source / "dir/file").touch()
    guest = world.observer()
    node = world.mark(guest, "dir/file", MODIFY)
    directory = world.node("dir")
    assert world.host_mask(node) == MODIFY | MARKED
    assert world.host_mask(directory) == DIRECTORY
    world.mark(guest, "dir/file", 0)
    assert len(world.export.watcher) == 0


def test_a_watched_file_that_moves_takes_its_watch_on_names_along(world: World) -> None:
    for name in ("from", "to"):
        (world.source / name).mkdir()
    (world.source / "from/file").touch()
    guest = world.observer()
    node = world.mark(guest, "from/file", MODIFY)
    world.mark(guest, "to", CREATE)  # or the host would not say where it went
    old, new = world.node("from"), world.node("to")
    os.rename(world.source / "from/file", world.source / "to/file")
    assert world.take(guest) == []  # not asked for
    assert node.path() == b"to/file"
    assert world.host_mask(old) == 0
    world.mark(guest, "to", 0)
    assert world.host_mask(new) == DIRECTORY
    (world.source / "to/file").write_text("x")
    assert plain(world.take(guest)) == [(b"to/file", "modify")]
    world.mark(guest, "to/file", 0)
    assert len(world.export.watcher) == 0


def test_isolation_each_gets_only_what_it_asked_for(world: World) -> None:
    for name in ("a", "b"):
        (world.source / name).mkdir()
    a, b, both, none = (world.observer(name) for name in ("a", "b", "both", "none"))
    world.mark(a, "a", CREATE)
    world.mark(b, "b", CREATE)
    world.mark(both, "a", DELETE)
    world.mark(both, "b", CREATE)
    for name in ("a", "b"):
        (world.source / name / "x").touch()
        (world.source / name / "x").unlink()
    assert plain(world.take(a)) == [(b"a/x", "create")]
    assert plain(world.take(b)) == [(b"b/x", "create")]
    assert plain(world.take(both)) == [(b"a/x", "delete"), (b"b/x", "create")]
    assert world.take(none) == []


def test_no_interest_no_events(world: World) -> None:
    """The counterpart of all tests here: without a mark nothing is delivered, nothing watched."""
    guest = world.observer()
    (world.source / "x").touch()
    assert world.take(guest) == []
    assert world.export.watcher.events_in == 0
    assert world.export.next_deadline == float("inf")  # rest costs nothing


def test_two_hundred_guests_aggregate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(world, monkeypatch)
    guests = [world.observer(f"guest {i}") for i in range(200)]
    bits = [CREATE, DELETE, MODIFY, ATTRIB]
    for guest, bit in zip(guests, itertools.cycle(bits), strict=False):
        world.mark(guest, mask=bit)
    assert len(spy.taken()) <= 1 + len(bits)
    assert world.host_mask(world.root) == CREATE | DELETE | MODIFY | ATTRIB | DIRECTORY | MARKED
    (world.source / "x").touch()
    reported = [len(world.take(guest)) for guest in guests]
    assert reported == [1, 0, 0, 0] * 50
    for guest in guests:
        world.export.remove_guest(guest)
    assert len(world.export.watcher) == 0


def test_the_cap_on_marks_is_enospc_and_a_mark_there_is_can_be_changed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.export.export.MARKS_LIMIT", 3)
    guest = world.observer()
    for name in "abcd":
        (world.source / name).mkdir()
    for name in "abc":
        world.mark(guest, name, CREATE)
    with pytest.raises(OSError, match="too many marks") as error:
        world.mark(guest, "d", CREATE)
    assert error.value.errno == errno.ENOSPC
    world.mark(guest, "a", CREATE | DELETE)
    world.mark(guest, "a", 0)
    world.mark(guest, "d", CREATE)
    world.mark(world.observer("another"), "a", CREATE)  # the cap is each guest's own


@pytest.mark.slow
def test_marks_do_not_become_slow_by_their_number(world: World) -> None:
    """Twice as many marks take about twice as long, not four times: no request walks them all."""
    guest = world.observer()

    def mark(prefix: str, count: int) -> float:
        keys = []
        for i in range(count):
            (world.source / f"{prefix}{i}").mkdir()
            keys.append(world.node(f"{prefix}{i}").key)
        begin = time.process_time()
        for key in keys:
            world.export.update(guest, key, CREATE)
        return (time.process_time() - begin) / count

    few, all_of_many = mark("few", 500), [mark(f"many{i}", 500) for i in range(7)]
    many = min(all_of_many[-3:])  # other programs may disturb one
    assert many < 4 * few, f"{few * 1e6:.0f} us a mark at first, {many * 1e6:.0f} us at 4,000 marks"


# The algebra alone

_guests = [Observer(str(i)) for i in range(4)]
_nodes = [Inode(i, 1, Identity(0, i, b"", 0), 0o040000) for i in range(2, 5)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(_guests), st.sampled_from([*_nodes, None]), st.integers(0, 0xFFF)
        ),
        max_size=60,
    )
)
def test_aggregate_is_the_or_of_all(requests: list[tuple[Observer, Inode | None, int]]) -> None:
    interest = Interest()
    model: dict[tuple[Inode | None, Observer], int] = {}

    def expected(node: Inode | None) -> int:
        total = 0
        for (at, _), mask in model.items():
            total |= mask if at is node else 0
        return total

    for guest, node, mask in requests:
        before = expected(node)
        model[node, guest] = mask
        assert interest.update(guest, node, Mask(mask)) == (before, expected(node))
        for other in [*_nodes, None]:
            assert interest.aggregate(other) == expected(other)
        for one in _guests:
            own = {at: m for (at, g), m in model.items() if g is one and m}
            assert interest.marks(one) == own
    assert interest.guests(None) == {g: m for (at, g), m in model.items() if at is None and m}


def test_whole_and_single_marks_are_apart(world: World) -> None:
    guest = world.observer()
    world.export.update(guest, WHOLE, MODIFY)
    world.mark(guest, mask=CREATE)
    world.export.update(guest, WHOLE, 0)
    assert world.host_mask(world.root) == CREATE | DIRECTORY | MARKED
    world.mark(guest, mask=0)
    assert len(world.export.watcher) == 0
