"""The device behind a real socket, its loop in a thread; sessions that show what reaches them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from fsd.transports.loop import TrioLoop
from fsd.transports.polling import WINDOW
from fsd.transports.unix import listen
from fsd.transports.virtiofs import VirtiofsTransport
from harness.mounts import wait_until


class Echo:
    """A session that answers with what it is sent, reversed; or as the message says."""

    def __init__(self, loop: TrioLoop) -> None:
        self.loop = loop
        self.is_closed = False
        self.waiting: list[Callable[[], None]] = []
        self.sizes: list[tuple[int, int]] = []
        self.again: list[tuple[bytes, bool]] = []

    def serve(
        self,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        done: Callable[[int], None],
    ) -> None:
        assert not self.is_closed
        message = b"".join(readable)
        self.sizes.append((len(message), sum(map(len, writable))))

        def answer() -> None:
            left = message[::-1]
            for view in writable:
                count = min(len(view), len(left))
                view[:count], left = left[:count], left[count:]
            done(len(message) - len(left))

        match message:
            case b"raise":
                raise RuntimeError("a fault in the session")
            case b"die":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"silent":
                done(0)
            case b"twice":
                answer()
                answer()
            case b"later":
                self.loop.later(0.02, answer)
            case b"thread":
                self.loop.in_thread(lambda: None, lambda _: answer())
            case b"again":  # what was asked again
                message = repr(self.again).encode()[::-1]
                answer()
            case b"wait":
                self.waiting.append(answer)
            case b"answer":
                for waiting in self.waiting:
                    waiting()
                answer()
            case _:
                answer()

    def serve_again(
        self,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        done: Callable[[int], None],
        *,
        safe: bool,
    ) -> None:
        message = b"".join(readable)
        self.again.append((message, safe))
        if message == b"die" and not safe:
            writable[0][:3] = b"eid"
            done(3)
        else:
            self.serve(readable, writable, done)

    def suspend(self) -> None:
        self.waiting.clear()

    def close(self) -> None:
        self.is_closed = True


class Server:
    """A listening device; ``sessions`` are those that it has made."""

    def __init__(self, path: Path, tag: str, busy_poll: float) -> None:
        self.path = path
        self.sessions: list[Echo] = []
        self._tag = tag
        self._busy_poll = busy_poll
        self._scope = trio.CancelScope()
        self._listener = listen(os.fspath(path))
        self.thread = threading.Thread(target=trio.run, args=[self._run])
        self.thread.start()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            transport = VirtiofsTransport(
                self._session, name="test", tag=self._tag, busy_poll=self._busy_poll
            )
            await transport.serve(self._listener)

    def _session(self, loop: TrioLoop) -> Echo:
        self.sessions.append(Echo(loop))
        return self.sessions[-1]

    def stop(self) -> None:
        """End it, and check that it gives back what it had."""
        self._token.run_sync_soon(self._scope.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert all(session.is_closed for session in self.sessions)
        self.sessions.clear()  # and with them what they had of the guests' memory


@contextmanager
def served(path: Path, tag: str = "", busy_poll: float = WINDOW) -> Iterator[Server]:
    """A server for the block; every descriptor that VMMs have sent is closed at its end."""
    server = Server(path, tag, busy_poll)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    before = len(os.listdir("/proc/self/fd"))
    with served(tmp_path / "socket") as server:
        yield server
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, 5, "descriptors are left")
