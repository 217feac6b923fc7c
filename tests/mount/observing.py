"""What tests of real mounts watch with: stock inotifywait, and simulated guests on the socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from harness.mounts import Mount, wait_until
from protocol import frames
from protocol.masks import EVENTS

_TIMEOUT = 20.0
WATCH = "create,delete,move,modify,attrib,close_write,delete_self,move_self"


def status(mountpoint: Path) -> dict[str, Any]:
    """The server's own figures."""
    state: dict[str, Any] = json.loads((mountpoint / ".fsd/status").read_text())
    return state


def the_mount(mountpoint: Path) -> dict[str, Any]:
    """The figures of the mount as a guest."""
    guests: list[dict[str, Any]] = status(mountpoint)["guests"]
    return next(guest for guest in guests if guest["kind"] == "mount")


def idle(mountpoint: Path) -> bool:
    """Whether everything that has happened is delivered."""
    state = status(mountpoint)
    return not state["backlog"] and not any(guest["depth"] for guest in state["guests"])


class Line(NamedTuple):
    """One event of inotifywait."""

    path: bytes
    kinds: str


class Watcher:
    """A running inotifywait."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.pid = process.pid
        self._output = output

    def lines(self) -> list[Line]:
        """All that it has printed."""
        lines = []
        for line in self._output.read_bytes().splitlines():
            kinds, _, path = line.partition(b" ")
            lines.append(Line(path, kinds.decode()))
        return lines

    def wait(self, *wanted: tuple[bytes, str], timeout: float = 20) -> list[Line]:
        """Until these have been printed; returns all lines up to then."""
        lines: list[Line] = []

        def there() -> bool:
            lines[:] = self.lines()
            return set(wanted) <= set(map(tuple, lines))

        try:
            wait_until(there, timeout, "events of inotifywait")
        except AssertionError as error:
            missing = [event for event in wanted if event not in set(map(tuple, lines))]
            error.add_note(f"{len(missing)} of {len(wanted)} missing: {missing[:5]}")
            error.add_note(f"the last of {len(lines)} lines: {lines[-10:]}")
            raise
        return lines


@contextmanager
def watching(
    share: Mount, *paths: Path, recursive: bool = False, events: str = WATCH, arm: bool = True
) -> Iterator[Watcher]:
    """An inotifywait on paths of the mount (its root), armed by the server."""
    where = paths or (share.mountpoint,)
    with tempfile.TemporaryDirectory(prefix="fsd-watch-") as directory:
        output = Path(directory) / "events"
        command = ["inotifywait", "-m", "-q", "-e", events, "--format", "%e %w%f"]
        process = subprocess.Popen(
            [*command, *(["-r"] if recursive else []), "-o", str(output), *map(str, where)],
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_until(output.exists, 10, "inotifywait")
            if arm:
                share.wait_armed(*where, pid=process.pid)
            yield Watcher(process, output)
        finally:
            process.kill()
            process.wait()


class SimulatedGuest:
    """A guest without a mount, over the server's Unix socket. Never blocks on events."""

    def __init__(self, path: Path, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(os.fspath(path))
        self.socket.settimeout(_TIMEOUT)
        self._reader = frames.FrameReader()
        self._requests = 0
        self.events: list[frames.Event] = []
        self._waiting: list[frames.Message] = []

    def hello(self) -> frames.Welcome:
        """Say hello; the answer."""
        hello = frames.Hello(frames.VERSION, frames.Role.OBSERVER, int(EVENTS))
        self.socket.sendall(frames.encode(hello))
        answer = self._answer()
        assert isinstance(answer, frames.Welcome)
        return answer

    def close(self) -> None:
        """Leave."""
        self.socket.close()

    def _answer(self) -> frames.Message:
        while True:
            self._sort()
            if self._waiting:
                return self._waiting.pop(0)
            data = self.socket.recv(1 << 16)
            assert data, "the server closed the session"
            self._reader.feed(data)

    def _sort(self) -> None:
        for message in self._reader:
            if isinstance(message, frames.Event):
                self.events.append(message)
            else:
                self._waiting.append(message)

    def mark(self, path: bytes, mask: int) -> int:
        """Publish interest in a path; returns its nodeid."""
        self._requests += 1
        self.socket.sendall(frames.encode(frames.Resolve(self._requests, path)))
        node = self._answer()
        assert isinstance(node, frames.Result)
        assert node.errno == 0, os.strerror(node.errno)
        update = frames.Update(self._requests, node.nodeid, node.generation, mask)
        self.socket.sendall(frames.encode(update))
        done = self._answer()
        assert isinstance(done, frames.Result)
        assert done.errno == 0, os.strerror(done.errno)
        return node.nodeid

    def take(self) -> list[frames.Event]:
        """All events that have come up to now."""
        self.socket.setblocking(False)
        with suppress(BlockingIOError):
            while data := self.socket.recv(1 << 20):
                self._reader.feed(data)
        self.socket.settimeout(_TIMEOUT)
        self._sort()
        return self.events


@contextmanager
def guests(path: Path, count: int) -> Iterator[list[SimulatedGuest]]:
    """That many guests, welcomed."""
    made: list[SimulatedGuest] = []
    try:
        for _ in range(count):
            made.append(SimulatedGuest(path))
            made[-1].hello()
        yield made
    finally:
        for guest in made:
            guest.close()
