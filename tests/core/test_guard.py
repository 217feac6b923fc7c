"""A fault in what runs without a request: a line in the log, a lost step, never the end."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from fsd.checkpoint.file import StateFile
from fsd.checkpoint.saver import Saver
from fsd.linux import openers
from fsd.pacing import windows
from fsd.servers.autosave import Snapshots
from fsd.transports import tasks
from fsd.transports.loop import TrioLoop
from fsd.transports.socket import SocketTransport
from protocol import frames

from .support import ALL, STRUCTURE, USER, World

BOUND = 30.0  # seconds, on a busy machine


class Bug(Exception):
    """No OSError."""


def failing(real: Callable[..., Any], times: int = 1) -> Callable[..., Any]:
    """Raises at its first calls, then does what it should."""
    left = times

    def call(*args: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise Bug("boom")
        return real(*args)

    return call


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(BOUND):
        while not condition():  # noqa: ASYNC110 - any condition
            await trio.sleep(0.005)


def faults(logs: list[Any]) -> list[str]:
    return [log["event"] for log in logs if log["log_level"] == "error"]


STEPS = {
    "_plan": "planning failed",
    "_give_up": "giving up an observer failed",
}


@pytest.mark.parametrize("name", STEPS)
async def test_what_is_due(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    export = world.export
    monkeypatch.setattr(export, name, failing(getattr(export, name)))
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE)
    export._give_up_at = 0.0
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.pumping.run, export)
            await until(lambda: faults(logs))
            (world.source / "new").touch()
            await until(lambda: guest.depth)
            nursery.cancel_scope.cancel()
    assert set(faults(logs)) == {STEPS[name]}
    assert export.counts.pop("faults") == 1


async def test_the_end_of_a_watch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others still end, in time."""
    for name in "abc":
        (world.source / name).mkdir()
    operations = world.mount()
    for name in "abc":
        operations.lookup(USER, 1, name.encode())
    monkeypatch.setattr(world.export.watches, "set_watch", failing(world.export.watches.set_watch))
    for node in world.export.arming._nodes.values():
        node.expires = 0.0
    world.export.arming._expiry = 0.0
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.pumping.run, world.export)
            await until(lambda: not world.export.arming._nodes)
            nursery.cancel_scope.cancel()
    assert faults(logs) == ["ending a watch failed"]
    world.export.counts.clear()


@pytest.mark.parametrize("name", ["drain", "pop"])
async def test_reading_events(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE)
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.pumping.run, world.export)
            await trio.testing.wait_all_tasks_blocked()
            watcher = world.export.watcher
            owner = watcher if name == "drain" else watcher.queue
            monkeypatch.setattr(owner, name, failing(getattr(owner, name), 2))
            (world.source / "first").touch()
            await until(lambda: len(faults(logs)) == 2)
            (world.source / "last").touch()
            await until(lambda: guest.depth)
            nursery.cancel_scope.cancel()
    assert faults(logs)
    world.export.counts.clear()


def test_how_a_file_was_opened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OPEN is delivered, as one for reading, and what follows it too."""
    monkeypatch.setattr(windows, "OPEN_WAIT", 0.0)
    monkeypatch.setattr(windows, "CLOSE_WAIT", 0.0)
    monkeypatch.setattr(openers, "scan", failing(bool, 9))
    (world.source / "f").touch()
    operations = world.mount()
    world.mark(operations.guest, "", ALL)
    with structlog.testing.capture_logs() as logs, (world.source / "f").open():
        deadline = time.monotonic() + BOUND
        while not operations.guest.ledger and not faults(logs) and time.monotonic() < deadline:
            world.pump()
        (order,) = (m for m in world.orders(operations) if m.op == frames.Op.OPEN)
    assert order.arg == 0
    assert set(faults(logs)) <= {"finding out how files are open failed"}
    assert faults(logs)


async def test_images(world: World, tmp_path: Path) -> None:
    saver = Saver(world.export, StateFile(tmp_path / "image"))
    world.observer().token = bytes(16)
    saver.take = failing(saver.take)  # type: ignore[method-assign]
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            world.export.is_changed = True
            nursery.start_soon(Snapshots(every=0.01, patience=0.01).run, saver)
            await until((tmp_path / "image").exists)
            nursery.cancel_scope.cancel()
    assert faults(logs) == ["saving an image failed"]


async def test_timers_and_threads() -> None:
    done: list[str] = []
    boom = failing(lambda *_: None, 3)
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            loop = TrioLoop(nursery)
            loop.soon(boom)
            loop.later(0.0, boom)
            loop.in_thread(lambda: None, boom)
            await until(lambda: len(faults(logs)) == 3)
            loop.soon(lambda: done.append("soon"))
            loop.later(0.0, lambda: done.append("later"))
            loop.in_thread(lambda: None, lambda _: done.append("thread"))
            await until(lambda: len(done) == 3)
    assert set(faults(logs)) == {"a late answer failed"}


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_connection_waits_for_a_descriptor(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "FULL_PAUSE", 0.01)
    transport = SocketTransport(world.export, str(tmp_path / "socket"))
    await transport.bind()
    client = socket.socket(socket.AF_UNIX)
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.run)
            with no_descriptors():
                client.connect(transport.path)
                await until(lambda: logs)
            await until(lambda: transport._channels)
            client.close()
            await until(lambda: not transport._channels)
            nursery.cancel_scope.cancel()
    transport.close()
    assert {log["event"] for log in logs} == {"cannot accept a connection yet"}
