"""Which events one system call has made: a table of queues, and any interleaving of writers.

Nothing is read from a kernel here: tests/fidelity compares with one. The events of a call are in
the order of fs/notify/fsnotify.c and include/linux/fsnotify.h.
"""

from __future__ import annotations

import random
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsd.events.backlog import Arrival
from fsd.events.calls import AHEAD, Calls, Place, Rename
from fsd.events.event import HOST
from fsd.files.inode import Identity, Inode
from fsd.pacing.windows import CALL_WINDOW
from protocol.inotify import RawEvent
from protocol.masks import Mask

ATTRIB, MODIFY, ISDIR = int(Mask.ATTRIB), int(Mask.MODIFY), int(Mask.ISDIR)
FROM, TO, MOVE_SELF = int(Mask.MOVED_FROM), int(Mask.MOVED_TO), int(Mask.MOVE_SELF)
CREATE, DELETE = int(Mask.CREATE), int(Mask.DELETE)
DELETE_SELF, IGNORED = int(Mask.DELETE_SELF), int(Mask.IGNORED)


Raw = tuple[Inode, int, bytes, int]
"""Whose watch, mask, name, cookie."""


class Watched:
    """Inodes, each under a watch of the same number as its node, or under none."""

    def __init__(self) -> None:
        self._by_wd: dict[int, Inode] = {}
        self._next = 1
        self.outside = self.make(stat.S_IFDIR, watched=False)

    def make(self, kind: int = stat.S_IFREG, *, watched: bool = True) -> Inode:
        number, self._next = self._next, self._next + 1
        inode = Inode(number, 1, Identity(1, number, b"", 0), kind)
        if watched:
            self._by_wd[number] = inode
        return inode

    def directory(self) -> Inode:
        return self.make(stat.S_IFDIR)

    def inode_of(self, wd: int) -> Inode | None:
        return self._by_wd.get(wd)

    def wd_of(self, inode: Inode) -> int:
        return inode.nodeid if inode.nodeid in self._by_wd else -1

    def mask_of(self, inode: Inode) -> Mask:
        return Mask(0xFFF) if inode.nodeid in self._by_wd else Mask(0)

    def would_queue(self, inode: Inode, bits: int, number: int) -> bool:
        return inode.nodeid in self._by_wd

    def calls(self) -> Calls:
        return Calls(self, self.outside)


def queue(*events: Raw) -> list[Arrival]:
    return [
        Arrival(RawEvent(node.nodeid, mask, cookie, name), HOST, 0.0, number)
        for number, (node, mask, name, cookie) in enumerate(events)
    ]


def own(inode: Inode, mask: int) -> Raw:
    return inode, mask, b"", 0


def named(directory: Inode, mask: int, name: bytes, cookie: int = 0) -> Raw:
    return directory, mask, name, cookie


# By hand


@pytest.fixture
def watched() -> Watched:
    return Watched()


def removal(
    watched: Watched, inode: Inode, arrivals: list[Arrival], known: Inode | None
) -> tuple[int, bool, list[int]] | None:
    """(number of the DELETE, whether it died, numbers of its own events)."""
    found = watched.calls().removal(inode, arrivals[0], arrivals[1:], lambda *place: known)
    return None if found is None else (found.delete.number, found.died, found.numbers)


def test_an_unlink(watched: Watched) -> None:
    file, place = watched.make(), watched.directory()
    gone = [
        own(file, ATTRIB),
        own(file, DELETE_SELF),
        own(file, IGNORED),
        named(place, DELETE, b"f"),
    ]
    assert removal(watched, file, queue(*gone), file) == (3, True, [1, 2])
    left = [own(file, ATTRIB), named(place, DELETE, b"f")]
    assert removal(watched, file, queue(*left), file) == (1, False, [])


def test_what_is_no_unlink(watched: Watched) -> None:
    file, other, place = watched.make(), watched.make(), watched.directory()
    ends = [own(file, DELETE_SELF), own(file, IGNORED)]
    changed = named(place, ATTRIB, b"f")
    gone = named(place, DELETE, b"f")
    assert removal(watched, file, queue(own(file, ATTRIB)), file) is None  # a chmod
    assert removal(watched, file, queue(own(file, ATTRIB), changed, gone), file) is None
    assert removal(watched, file, queue(own(file, ATTRIB), gone), other) is None  # another's name
    assert removal(watched, file, queue(own(file, ATTRIB), gone), None) is None
    assert removal(watched, file, queue(*ends, gone), file) is None  # it was open until then
    assert removal(watched, place, queue(own(place, ATTRIB), gone), place) is None


def test_an_rmdir(watched: Watched) -> None:
    directory, place = watched.directory(), watched.directory()
    events = [own(directory, DELETE_SELF), own(directory, IGNORED)]
    gone = named(place, DELETE | ISDIR, b"d")
    assert removal(watched, directory, queue(*events, gone), directory) == (2, True, [1])
    assert removal(watched, directory, queue(*events, gone), None) == (2, True, [1])
    file_gone = named(place, DELETE, b"d")
    assert removal(watched, directory, queue(*events, file_gone), directory) is None


@dataclass
class Outcome:
    moved: int | None = None  # numbers
    lost: int | None = None
    is_all: bool = True


def renamed(watched: Watched, rename: Rename, ahead: Sequence[Arrival]) -> Outcome:
    found = watched.calls().renamed(rename, ahead)
    numbers = [part.number if part is not None else None for part in (found.moved, found.lost)]
    return Outcome(numbers[0], numbers[1], found.is_all)


@pytest.mark.parametrize("others", range(CALL_WINDOW))
def test_a_rename_with_others_between(watched: Watched, others: int) -> None:
    """SelfEvent events of what is known are found, and none that is another's is taken."""
    a, b, elsewhere = watched.directory(), watched.directory(), watched.directory()
    child, replaced, other = watched.make(), watched.make(), watched.make()
    between = [own(other, ATTRIB), own(other, MOVE_SELF), named(elsewhere, CREATE, b"x")]
    noise = [between[i % 3] for i in range(others)]
    events = [named(a, FROM, b"f", 7), *noise, own(replaced, ATTRIB), own(child, MOVE_SELF)]
    arrivals = queue(*events)
    rename = Rename(arrivals[0], a, b, child, replaced)
    found = renamed(watched, rename, arrivals[1:])
    if others < CALL_WINDOW - 1:
        assert found == Outcome(others + 2, others + 1)
    else:  # too far ahead: it is waited for in vain, and nothing else is taken
        assert found == Outcome(None, others + 1, is_all=False)


def test_what_is_not_there_yet(watched: Watched) -> None:
    a, child, unwatched = watched.directory(), watched.make(), watched.make(watched=False)
    arrivals = queue(named(a, FROM, b"f", 7))
    assert not renamed(watched, Rename(arrivals[0], a, a, child, None), []).is_all
    assert renamed(watched, Rename(arrivals[0], a, a, unwatched, None), []).is_all
    assert not renamed(watched, Rename(arrivals[0], a, a, unwatched, child), []).is_all


def test_an_attrib_beside_a_move_is_of_what_was_overwritten(watched: Watched) -> None:
    """Unless it is known to be another's."""
    a, child, other, replaced = watched.directory(), *(watched.make() for _ in range(3))
    arrivals = queue(named(a, FROM, b"f", 7), own(other, ATTRIB), own(child, MOVE_SELF))
    unseen = Rename(arrivals[0], a, None, child, None)
    assert renamed(watched, unseen, arrivals[1:]) == Outcome(2, 1)
    known = Rename(arrivals[0], a, a, child, replaced, is_sure=True)
    assert renamed(watched, known, arrivals[1:]) == Outcome(2, None)


@pytest.mark.parametrize("others", range(CALL_WINDOW + 1))
def test_an_exchange(watched: Watched, others: int) -> None:
    a, b, elsewhere = (watched.directory() for _ in range(3))
    child, other = watched.make(), watched.make()
    noise = [named(elsewhere, CREATE, b"x")] * others
    back = [named(b, FROM, b"g", 8), *noise, named(a, TO, b"f", 8)]
    events = [own(child, MOVE_SELF), *back, own(other, MOVE_SELF), named(a, DELETE, b"f")]
    ahead, calls = queue(*events), watched.calls()
    found = calls.way_back(ahead, 1, (a, b"f"), (b, b"g"))
    if others > CALL_WINDOW - 2:  # too far ahead
        assert found is None
        return
    assert found == (8, others + 2, min(others + 4, CALL_WINDOW + 1), not others)
    moved = calls.first_move(ahead, found.end + 1, len(ahead), child, other)
    assert moved == (other, others + 3)


def test_whether_the_way_back_may_come_yet(watched: Watched) -> None:
    """Nobody makes the server wait by making the old name again."""
    a, b, elsewhere = (watched.directory() for _ in range(3))
    half, other = named(b, FROM, b"g", 8), named(elsewhere, CREATE, b"x")
    for events, may in (
        ([], True),
        ([other], True),
        ([other, half], True),
        ([half, named(a, TO, b"h", 8)], False),
        ([named(a, CREATE, b"f")], False),
        ([named(b, FROM, b"h", 8)], False),
    ):
        ahead = queue(*events)
        assert watched.calls().may_come_back(ahead, 0, (a, b"f"), (b, b"g")) is may, events


def test_what_is_no_exchange(watched: Watched) -> None:
    a, b = watched.directory(), watched.directory()
    old, new = (a, b"f"), (b, b"g")
    for events in (
        [named(b, FROM, b"g", 8), named(a, TO, b"other", 8)],
        [named(b, FROM, b"g", 8), named(a, TO, b"f", 9)],
        [named(b, DELETE, b"g"), named(b, FROM, b"g", 8), named(a, TO, b"f", 8)],
        [named(b, FROM, b"g", 8)],
        [],
    ):
        assert watched.calls().way_back(queue(*events), 0, old, new) is None


def test_an_exchange_with_a_name_that_nobody_watches(watched: Watched) -> None:
    a, child = watched.directory(), watched.make()
    calls, place = watched.calls(), (a, b"f")
    events = [named(a, FROM, b"f", 8), own(child, MOVE_SELF), named(a, DELETE, b"x")]
    assert calls.way_out(queue(*events), 0, place) == (8, 0, 2, True)
    assert calls.way_out(queue(*events[1:]), 0, place) is None
    assert calls.way_out(queue(named(a, FROM, b"other", 8)), 0, place) is None


# Any interleaving


@dataclass(eq=False)
class Call:
    """A system call of one writer, and the events that it makes."""

    kind: str
    events: list[Raw]
    locks: tuple[Inode, ...] = ()  # directories: of a rename the old and the new
    child: Inode | None = None
    replaced: Inode | None = None
    places: tuple[Place, ...] = ()
    numbers: list[int] = field(default_factory=list)


class Host:
    """A host's directories, and writers that change them at the same time."""

    def __init__(self, watched: Watched, rng: random.Random) -> None:
        self._watched = watched
        self._rng = rng
        self._cookie = 0
        self.directories = [watched.directory() for _ in range(3)]
        self.names: dict[tuple[Inode, bytes], Inode] = {}
        for place in [(d, b"%d" % i) for d in self.directories for i in range(3)]:
            self.names[place] = watched.make(watched=rng.random() < 0.7)

    def _own(self, inode: Inode, mask: int) -> list[Raw]:
        return [own(inode, mask)] if self._watched.wd_of(inode) > 0 else []

    def call(self, locked: set[Inode]) -> Call | None:
        """Begin one that takes no lock which another holds."""
        places = [place for place in self.names if place[0] not in locked]
        if not places:
            return None
        place = self._rng.choice(places)
        inode = self.names[place]
        kind = self._rng.choice(["touch", "unlink", "rename", "rename", "create", "exchange"])
        if kind == "touch":
            mask = self._rng.choice([ATTRIB, MODIFY])
            return Call(
                kind, [named(*place[:1], mask, place[1]), *self._own(inode, mask)], (), inode
            )
        if kind == "create":
            new = place[0], b"new %d" % self._rng.randrange(1 << 30)
            self.names[new] = self._watched.make(watched=False)
            return Call(kind, [named(new[0], CREATE, new[1])], new[:1])
        if kind == "unlink":
            del self.names[place]
            mine = [e for m in (ATTRIB, DELETE_SELF, IGNORED) for e in self._own(inode, m)]
            return Call(kind, [*mine, named(place[0], DELETE, place[1])], place[:1], inode)
        target = self._rng.choice([d for d in self.directories if d not in locked])
        to = target, self._rng.choice([b"0", b"1", b"2", b"free"])
        if to == place:
            return None
        replaced = self.names.get(to)
        if kind == "exchange":
            return self._exchange(place, to) if replaced is not None else None
        self.names[to] = self.names.pop(place)
        self._cookie += 1
        events = [
            named(place[0], FROM, place[1], self._cookie),
            named(*to[:1], TO, to[1], self._cookie),
        ]
        if replaced is not None:
            events += self._own(replaced, ATTRIB)
        events += self._own(inode, MOVE_SELF)
        if replaced is not None:
            events += [e for m in (DELETE_SELF, IGNORED) for e in self._own(replaced, m)]
        return Call(kind, events, (place[0], target), inode, replaced, (place, to))

    def _exchange(self, old: Place, new: Place) -> Call:
        names = self.names
        child, other = names[old], names[new]
        names[old], names[new] = other, child
        events: list[Raw] = []
        for inode, source, target in ((child, old, new), (other, new, old)):
            self._cookie += 1
            events.append(named(source[0], FROM, source[1], self._cookie))
            events.append(named(target[0], TO, target[1], self._cookie))
            events += self._own(inode, MOVE_SELF)
        return Call("exchange", events, (old[0], new[0]), child, other, (old, new))

    def run(self, writers: int, steps: int) -> Iterator[tuple[Raw, Call]]:
        """The queue: each event with the call that has made it."""
        under_way: list[tuple[Call, list[Raw]]] = []
        while steps or under_way:
            if steps and len(under_way) < writers and self._rng.random() < 0.5:
                steps -= 1
                locked = {lock for call, _ in under_way for lock in call.locks}
                if (call := self.call(locked)) is not None:
                    under_way.append((call, list(call.events)))
            elif under_way:
                at = self._rng.randrange(len(under_way))
                call, left = under_way[at]
                yield left.pop(0), call
                if not left:
                    del under_way[at]


@settings(max_examples=300)
@given(st.integers(0, 1 << 32), st.integers(1, 4))
def test_any_interleaving(seed: int, writers: int) -> None:
    """Whatever stands between: what is found is the call's own, and it is found within the window.

    As the resolver does, what was found to be part of one call is not looked at for another.
    """
    watched = Watched()
    calls = watched.calls()
    made = list(Host(watched, random.Random(seed)).run(writers, 30))
    arrivals = queue(*(event for event, _ in made))
    for arrival, (_, call) in zip(arrivals, made, strict=True):
        call.numbers.append(arrival.number)
    taken: set[int] = set()
    for index, arrival in enumerate(arrivals):
        if arrival.number in taken:
            continue
        call = made[index][1]
        mask, child = arrival.raw.mask, call.child
        ahead = [a for a in arrivals[index + 1 :] if a.number not in taken][:AHEAD]
        mine = [i for i, a in enumerate(ahead) if a.number in call.numbers]
        if call.kind == "touch" and arrival.raw.name and child is not None:
            part = calls.touched(child, mask, ahead)
            assert part is not None or not mine or mine[0] >= CALL_WINDOW
            if part is not None:  # of two equal calls, either's: they are equal
                assert arrivals[part.number].raw == RawEvent(child.nodeid, mask, 0, b"")
                taken.add(part.number)
        elif call.kind == "unlink" and mask == ATTRIB and child is not None:
            removed = calls.removal(child, arrival, ahead, stood_for(ahead, made))
            assert removed is not None or mine != list(range(len(mine)))
            if removed is not None:
                assert {*removed.numbers, removed.delete.number} <= set(call.numbers)
                taken |= {*removed.numbers}
        elif call.locks[1:] and arrival.number == call.numbers[0]:
            other = next(
                a for a in arrivals if a.raw.mask == TO and a.raw.cookie == arrival.raw.cookie
            )
            ahead = [a for a in ahead if a is not other]
            old, new = call.locks
            rename = Rename(arrival, old, new, child, call.replaced, is_sure=True)
            own_events = calls.renamed(rename, ahead)
            parts = [part.number for part in (own_events.moved, own_events.lost) if part]
            parts += own_events.ended
            found = {arrivals[number].raw for number in parts}  # of two equal ones, either
            if call.kind == "exchange" and own_events.lost is not None:
                # A chmod at that very moment: by these events, the other was overwritten.
                assert own_events.lost.inode is call.replaced
                taken |= {other.number, *parts}
                continue
            assert found <= {arrivals[number].raw for number in call.numbers}
            back = calls.way_back(ahead, own_events.end, *call.places)
            if call.kind == "exchange":
                mine = [a.number for a in ahead if a.number in call.numbers and a.raw.name]
                near = [a.number for a in ahead[own_events.end : own_events.end + CALL_WINDOW]]
                assert back is not None or not set(mine) <= set(near)
                assert back is None or back.cookie == arrivals[mine[0]].raw.cookie
                taken |= set(mine)
            else:  # a rename back by another call looks the same by its names
                for a in ahead[:CALL_WINDOW]:
                    if a.number in call.numbers and a.raw.mask & (ATTRIB | MOVE_SELF):
                        assert a.raw in found
            taken |= {other.number, *parts}


def stood_for(
    ahead: Sequence[Arrival], made: list[tuple[Raw, Call]]
) -> Callable[[Inode, bytes], Inode | None]:
    """What a name stood for when the next DELETE of it was queued."""
    places: dict[tuple[int, bytes], Inode | None] = {}
    for arrival in ahead:
        if arrival.raw.mask & DELETE:
            places.setdefault((arrival.raw.wd, arrival.raw.name), made[arrival.number][1].child)
    return lambda directory, name: places[directory.nodeid, name]
