"""What a guest on the server's socket gets across a restart, a SIGKILL, and in a storm.

The stream equals the native one up to the moment of the stop and from the next start on; in between
only what has become of the files counts, for no server saw it happen.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest_tools.channel import Client, SocketChannel
from guest_tools.watch import Watch
from harness.mounts import Mount, mounted, mounts_at, wait_until
from protocol.frames import Role
from protocol.masks import Mask
from tests.fidelity.calls import Executor
from tests.fidelity.compare import (
    CONTROL,
    IN_IGNORED,
    IN_Q_OVERFLOW,
    Event,
    Stream,
    normalise,
    since,
)
from tests.fidelity.run import END, START, Arena, Case, Watcher, prepare, run

from .test_fidelity import LIMITS

CHANGES = int(
    Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.MODIFY | Mask.ATTRIB
    | Mask.CLOSE_WRITE
)  # fmt: skip
NAMES = int(Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO)
ARRIVES = int(Mask.CREATE | Mask.MOVED_TO)
pytestmark = pytest.mark.timeout(180)


class SocketWatcher:
    """The client of `fsd-guest watch --socket`, in a thread."""

    def __init__(self, socket: Path, paths: list[bytes]) -> None:
        self.events: Stream = []
        self._socket = socket
        self._watch = Watch(self._connect, os.fsencode, CHANGES, recursive=False)
        self._watch.keep(60)
        for path in [*paths, CONTROL.encode()]:
            self._watch.add(os.fsdecode(path))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _connect(self) -> Client:
        return Client(SocketChannel(str(self._socket)), Role.OBSERVER)

    def _run(self) -> None:
        for where, event in self._watch.events():
            label = os.fsencode(where).decode("latin-1")
            self.events.append(Event(label, event.mask, event.name, event.cookie))
            if (label, event.name, event.mask) == (CONTROL, END, int(Mask.CLOSE_WRITE)):
                break
        self._watch.close()

    def saw(self, name: bytes) -> None:
        """Wait for a marker."""
        wait_until(
            lambda: any((e.watch, e.name) == (CONTROL, name) for e in list(self.events)),
            30,
            f"the marker {name!r}",
        )

    def finish(self) -> None:
        """Wait for the end."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "the end did not come"


class Server:
    """Servers of one mount, one after the other."""

    def __init__(self, tmp_path: Path) -> None:
        self.source, self.mountpoint = tmp_path / "source", tmp_path / "mount"
        self.source.mkdir()
        self.mountpoint.mkdir()
        self.socket = tmp_path / "socket"
        self._running = ExitStack()
        self.mount: Mount | None = None

    def start(self) -> None:
        options = ("--socket", str(self.socket), "--no-agent")
        self.mount = self._running.enter_context(mounted(self.source, self.mountpoint, *options))

    def stop(self) -> None:
        self.mount = None
        self._running.close()

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        assert self.mount is not None
        self.mount.process.kill()
        self.mount.process.wait()
        subprocess.run(["umount", "-l", self.mountpoint], check=True, timeout=20)
        assert not mounts_at(self.mountpoint)
        self.mount = None
        self._running.pop_all()  # it cannot be stopped any more

    def checkpoint(self) -> None:
        (self.mountpoint / ".fsd/checkpoint").read_text()


@contextmanager
def serving(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    try:
        yield server
    finally:
        if server.mount is not None:
            server.stop()


def pictured(stream: Stream, names: set[tuple[str, bytes]]) -> set[tuple[str, bytes]]:
    """The names that are there after some events. (An exchange looks like two moves.)"""
    names = set(names)
    for event in stream:
        place = (event.watch, event.name)
        if event.name and event.mask & NAMES:
            (names.add if event.mask & ARRIVES else names.discard)(place)
    return names


def assert_same_but_between(native: Stream, ours: Stream, gap: tuple[bytes, bytes]) -> None:
    """Equal before and after what lies between two markers; there, equal in effect."""
    # The end of a watch is between a kernel and its program, and no event of the server's.
    native = normalise(event for event in native if not event.mask & IN_IGNORED)
    ours = normalise(ours)
    first, last = ((CONTROL, marker) for marker in gap)
    before = list(itertools.takewhile(lambda e: (e.watch, e.name) != first, native))
    assert ours[: len(before)] == before
    rest, our_rest = native[len(before) :], ours[len(before) :]

    def after(stream: Stream) -> tuple[Stream, Stream]:
        at = next(i for i, event in enumerate(stream) if (event.watch, event.name) == last)
        return stream[:at], stream[at:]

    middle, end = after(rest)
    our_middle, our_end = after(our_rest)
    assert normalise(our_end) == normalise(end)
    there = pictured(before, set())
    picture = pictured(middle, there)
    # What came and went between was never there for us; all else must have been delivered.
    wrong = dict.fromkeys(pictured(our_middle, there) ^ picture, "is it there?")
    if any(event.mask & IN_Q_OVERFLOW for event in our_middle):
        # The killed server had delivered what it could not save: a loss is reported.
        wrong = {place: what for place, what in wrong.items() if place in picture}
    reported = {(e.watch, e.name) for e in our_middle if not e.mask & IN_Q_OVERFLOW}
    # A directory's own times change with each name in it, so they prove nothing.
    content = (e for e in middle if e.mask & int(Mask.MODIFY) and not e.mask & int(Mask.ISDIR))
    changed = {(event.watch, event.name) for event in content if event.name}
    wrong |= dict.fromkeys(changed & picture - reported, "changed, and not delivered")
    done = {(event.watch, event.name) for event in middle}
    wrong |= dict.fromkeys(reported - done, "delivered, and nothing was done")
    for place, what in wrong.items():
        story = [
            "\n".join(str(event) for event in stream if place == (event.watch, event.name))
            for stream in (before, middle, our_middle)
        ]
        raise AssertionError("\n-- ".join([f"{place}: {what} before, between, delivered:", *story]))


def interrupted(tmp_path: Path, seed: int, how: str, *, storm: bool) -> None:
    """Random work; a third into it the server goes, two thirds into it the next one comes."""
    case = Case(seed, 900, burst=True, without=LIMITS | {"exchange"}, mask=CHANGES)
    with serving(tmp_path) as server:
        source = server.source
        arena = Arena(source, server.mountpoint, source.with_name("outside"), lambda *_: None)
        plans = prepare(case, arena)
        paths = plans[0].directories
        ours = SocketWatcher(server.socket, paths)
        with Watcher("native", source, paths, CHANGES) as native:
            native.start()
            control = source / CONTROL
            (control / START.decode()).mkdir()
            ours.saw(START)
            executor = Executor(source, arena.outside)
            steps = iter(plans[0].steps)

            def work(count: int, marker: str) -> None:
                for step in itertools.islice(steps, count):
                    executor.run(step.calls)
                (control / marker).mkdir()

            work(300, "before")
            if how == "kill":
                ours.saw(b"before")
                time.sleep(0.1)
                server.checkpoint()  # as it does without being asked every few seconds
            (control / "gap").mkdir()
            going = threading.Thread(target=work, args=(300, "between"))
            if storm:
                going.start()
            server.kill() if how == "kill" else server.stop()
            if not storm:
                going.start()
                going.join()
            server.start()
            going.join()
            ours.saw(b"between")
            (control / "up").mkdir()
            work(300, "after")
            executor.close()
            (control / END.decode()).touch()
            ours.finish()
            assert native.finish(60)
            assert_same_but_between(
                since(native.stream(), START), since(ours.events, START), (b"gap", b"up")
            )


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("storm", [False, True], ids=["quiet", "storm"])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_guest_continues_with_the_next_server(
    how: str, storm: bool, seed: int, tmp_path: Path
) -> None:
    interrupted(tmp_path, seed, how, storm=storm)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_agent_is_killed_in_a_burst(seed: int, tmp_path: Path) -> None:
    """Its orders wait for the next agent; what a kernel has done already is not done again."""
    names_and_content = CHANGES & ~int(Mask.CLOSE_WRITE)
    case = Case(seed, 3000, burst=True, without=LIMITS, mask=names_and_content)
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    killed: list[int] = []

    def kill() -> None:
        """Whenever the burst has gone on by some hundred events."""
        for goal in (300, 1000, 2000):
            guest = wait_until(functools.partial(_at_work, mountpoint, goal, killed), 60)
            assert guest is not None
            killed.append(guest["agent_pid"])
            os.kill(guest["agent_pid"], signal.SIGKILL)

    with mounted(source, mountpoint) as mount:
        killer = threading.Thread(target=kill)
        killer.start()
        outcome = run(case, Arena.of(mount))
        killer.join()
    assert len(set(killed)) == 3
    report = outcome.report()
    assert not report, report


def _at_work(mountpoint: Path, events: int, killed: list[int]) -> dict[str, Any] | None:
    """The mount's guest, once so many events are replayed by an agent that was not killed."""
    state = json.loads((mountpoint / ".fsd/status").read_text())
    guest: dict[str, Any] = next(g for g in state["guests"] if g["kind"] == "mount")
    is_new = guest["agent_pid"] and guest["agent_pid"] not in killed
    return guest if is_new and guest["replayed"] >= events else None
