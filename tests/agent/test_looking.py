"""What could not be looked at is never gone: real marks on a real mount, and each call by which the
agent reads them failing with each error that says nothing of the marks.
"""

from __future__ import annotations

import ast
import builtins
import errno
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest_tools import marks
from guest_tools.agent import scanner, schedule, watchers
from guest_tools.agent.markcalls import MarkCalls
from guest_tools.agent.scanner import Scanner
from guest_tools.agent.watchers import Watchers
from guest_tools.errors import PASSING
from guest_tools.marks import device_of, pids
from harness.mounts import Mount, mounted, wait_until
from protocol import frames
from protocol.handles import NodeKey

ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO)
WATCH = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
inotify = libc.inotify_init1(0)
children = int(sys.argv[1])
for path in sys.argv[2:]:
    assert libc.inotify_add_watch(inotify, os.fsencode(path), 0x300) > 0  # IN_CREATE, IN_DELETE
parents = []
for _ in range(children):
    if not os.fork():
        sys.stdin.read()
        os._exit(0)
print("watching", flush=True)
sys.stdin.read()
"""


def calls_of(*modules: Any) -> list[str]:
    """The calls to the operating system that the source of these modules makes, by name."""
    found = set()
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "open" or name.startswith("os."):
                    found.add(name)
    return sorted(found - {"os.getpid", "os.major", "os.minor", "os._exit"})


LOOKING = [*calls_of(marks, watchers), "read"]
SCANNING = [*calls_of(marks, watchers, scanner), "read", "send"]


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    top = tmp_path_factory.mktemp("looking")
    source, mountpoint = top / "source", top / "mount"
    for name in ("one", "two", "three"):
        (source / name).mkdir(parents=True)
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--no-agent") as mount:
        yield mount


@contextmanager
def watching(*paths: Path, children: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", WATCH, str(children), *paths],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"watching\n"
        try:
            yield process
        finally:
            process.kill()
            assert process.stdin is not None
            process.stdin.close()


def nodes(share: Mount, *names: str) -> set[int]:
    return {os.stat(share.source / name).st_ino for name in names}


def looked(found: Watchers) -> set[int]:
    return {node.nodeid for node in found.wanted()}


def failing(monkeypatch: pytest.MonkeyPatch, call: str, number: int, thread: str = "") -> None:
    """Let a call fail, in the thread of that name, if one is given."""
    is_read = call == "read"
    owner, name = (os, call[3:]) if call.startswith("os.") else (builtins, "open")
    real: Callable[..., Any] = getattr(owner, name)

    def fail(*arguments: Any, **more: Any) -> Any:
        if thread and threading.current_thread().name != thread:
            return real(*arguments, **more)
        if is_read and str(arguments[0]).startswith("/proc/"):
            file = real(*arguments, **more)

            class Broken:
                def __enter__(self) -> Broken:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def read(self, *_: int) -> Any:
                    raise OSError(number, os.strerror(number))

                def __iter__(self) -> Any:
                    raise OSError(number, os.strerror(number))

            return Broken()
        if is_read:
            return real(*arguments, **more)
        raise OSError(number, os.strerror(number), arguments and arguments[0])

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", LOOKING)
def test_marks_do_not_vanish(
    share: Mount, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    device = device_of(os.stat(share.mountpoint))
    found = Watchers(device)
    with watching(share.mountpoint / "one", share.mountpoint / "two") as process:
        assert found.look(pids(), full=True)
        wanted = found.wanted()
        assert looked(found) == nodes(share, "one", "two")
        everybody = pids()
        for full in (False, True, False):
            with monkeypatch.context() as context:
                failing(context, call, number)
                complete = found.look(everybody if full else [process.pid], full=full)
            assert found.wanted() == wanted
            assert complete is (number not in PASSING)
        assert found.look(pids(), full=True)
        assert found.wanted() == wanted
    assert found.look([process.pid], full=False)
    assert found.wanted() == {}, "what has ended has no marks"


def test_a_number_that_another_process_has_now(
    share: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be looked at, and is not the one that had the marks."""
    found = Watchers(device_of(os.stat(share.mountpoint)))
    with watching(share.mountpoint / "one") as process:
        assert found.look(pids(), full=True)
        monkeypatch.setattr(watchers, "started", lambda pid: marks.started(pid) + 1)

        def fail(pid: int) -> None:
            raise OSError(errno.EACCES, "")

        monkeypatch.setattr(watchers, "notify_texts", fail)
        found.look([process.pid], full=False)
        assert found.wanted() == {}


def test_processes_that_share_an_instance_are_kept_once(
    share: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [share.mountpoint / name for name in ("one", "two", "three")]
    found = Watchers(device_of(os.stat(share.mountpoint)))
    with watching(*paths, children=20):
        assert found.look(pids(), full=True)
        assert len(found.pids) == 21
        assert found._size == 3
    # What is beyond the bound is kept together, and still wanted.
    monkeypatch.setattr(watchers, "KEPT", 2)
    with watching(paths[0], paths[1]), watching(paths[2]):
        assert found.look(pids(), full=True)
        assert found._size <= 2
        assert looked(found) == nodes(share, "one", "two", "three")
    assert found.look(pids(), full=True)
    assert found.wanted() == {}


# The thread


class Server:
    """Takes what a scanner sends."""

    def __init__(self) -> None:
        self.marks: dict[NodeKey, int] = {}
        self.ends: list[frames.ScanEnd] = []
        self.dropped: list[NodeKey] = []
        self.error = 0

    def send(self, data: bytes) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        reader = frames.FrameReader()
        reader.feed(data)
        for message in reader:
            if isinstance(message, frames.ScanEnd):
                self.ends.append(message)
            elif isinstance(message, frames.Update):
                key = NodeKey(message.nodeid, message.generation)
                if message.mask:
                    self.marks[key] = message.mask
                else:
                    self.dropped.append(key)
                    self.marks.pop(key, None)

    def knows(self) -> set[int]:
        return {node.nodeid for node in self.marks}


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> list[threading.ExceptHookArgs]:
    """Threads that died: the agent ends then, see test_agent."""
    found: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    monkeypatch.setattr(schedule, "RETRY", 0.01)
    return found


@contextmanager
def scanning(share: Mount, server: Server, **more: Any) -> Iterator[Scanner]:
    options: dict[str, Any] = {"exits": 64, **more}
    running = Scanner(device_of(os.stat(share.mountpoint)), server.send, lambda: True, **options)
    running.scan(pids(), full=True)
    running.start()
    try:
        yield running
    finally:
        running.end()


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", SCANNING)
def test_the_thread_lives_or_is_seen_to_die(
    share: Mount, monkeypatch: pytest.MonkeyPatch, deaths: list[threading.ExceptHookArgs],
    call: str, number: int,
) -> None:  # fmt: skip
    server = Server()
    with watching(share.mountpoint / "one"), scanning(share, server) as running:
        assert server.knows() == nodes(share, "one")
        with monkeypatch.context() as context, watching(share.mountpoint / "two") as other:
            if call == "send":
                server.error = number
            else:
                failing(context, call, number, thread="scanner")
            running.hints(1, [other.pid])
            wait_until(lambda: not running._hinted or not running.is_alive(), 10)
            time.sleep(0.02)  # in which it tries again, and fails again
            context.undo()
            server.error = 0
            monkeypatch.setattr(threading, "excepthook", deaths.append)
            running.hints(2, [other.pid])
            wait_until(
                lambda: deaths or server.knows() == nodes(share, "one", "two"), 10, "the new mark"
            )
        assert not {node.nodeid for node in server.dropped} & nodes(share, "one")
        if number in PASSING and call in (*LOOKING, "os.pidfd_open", "send"):
            assert not deaths
        if not deaths:
            assert running.is_alive()
            wait_until(lambda: server.ends and server.ends[-1].hint == 2, 10, "an answer")


def test_a_hint_is_not_answered_unless_looked_at(
    share: Mount, monkeypatch: pytest.MonkeyPatch, deaths: list[threading.ExceptHookArgs]
) -> None:
    """The server takes the answer for: that process has no other marks."""
    server = Server()
    with scanning(share, server) as running, watching(share.mountpoint / "two") as other:
        failures = threading.Event()
        real = os.listdir

        def listdir(path: str = ".") -> list[str]:
            if threading.current_thread().name == "scanner":
                failures.set()
                raise OSError(errno.EMFILE, "")
            return real(path)

        with monkeypatch.context() as context:
            context.setattr(os, "listdir", listdir)
            running.hints(7, [other.pid])
            assert failures.wait(10)
            running.hints(8, [other.pid])
            assert {end.hint for end in server.ends} == {0}
        wait_until(lambda: server.ends[-1].hint == 8, 10, "the answer")
        assert server.knows() == nodes(share, "two")
    assert not deaths


def test_the_first_word_is_not_a_part(
    share: Mount, monkeypatch: pytest.MonkeyPatch, deaths: list[threading.ExceptHookArgs]
) -> None:
    """The server drops what the first scan does not name."""
    server = Server()
    with watching(share.mountpoint / "one"):
        with monkeypatch.context() as context:
            failing(context, "os.readlink", errno.EMFILE)
            running = Scanner(
                device_of(os.stat(share.mountpoint)), server.send, lambda: True, exits=64
            )
            assert not running.scan(pids(), full=True)
            assert not server.ends
        running.start()
        wait_until(lambda: server.ends, 10, "the first scan")
        assert server.ends[0].flags & frames.Scan.FULL
        assert server.knows() == nodes(share, "one")
        running.end()
    assert not deaths


def test_exits_beyond_the_bound_are_seen_by_the_timer(
    share: Mount, monkeypatch: pytest.MonkeyPatch, deaths: list[threading.ExceptHookArgs]
) -> None:
    monkeypatch.setattr(schedule, "FULL_EVERY", 0.2)
    server = Server()
    with scanning(share, server, exits=3) as running:
        with watching(share.mountpoint / "one", children=30) as process:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            running.hints(1, map(int, (str(process.pid), *children.split())))
            wait_until(lambda: len(running._watchers.pids) == 31, 10, "all that share it")
            wait_until(lambda: running._schedule.exits_unseen, 10, "too many")
            assert server.knows() == nodes(share, "one")
            assert len(running._pidfds) == 3
            assert process.stdin is not None
            process.stdin.close()  # upon which all end by themselves
            process.wait(10)
        wait_until(lambda: not server.marks, 20, "the end of the marks")
    assert not deaths


def test_a_hint_of_all_processes(share: Mount, deaths: list[threading.ExceptHookArgs]) -> None:
    """The server had more of them than it keeps."""
    server = Server()
    with scanning(share, server) as running:
        wait_until(lambda: server.ends, 20, "the first scan")
        with watching(share.mountpoint / "two"):
            running.hints(1, [frames.ALL_PROCESSES])
            wait_until(lambda: server.knows() == nodes(share, "two"), 20, "the mark")
            wait_until(lambda: server.ends[-1].hint == 1, 20, "the answer")
    assert not deaths


def test_hints_without_end(share: Mount, deaths: list[threading.ExceptHookArgs]) -> None:
    """A server may name any number of threads: beyond some, all processes are looked at."""
    server = Server()
    with scanning(share, server) as running, watching(share.mountpoint / "two"):
        for number in range(1, 20):
            running.hints(number, range(1 << 31, (1 << 31) + 4000 * number))
        wait_until(lambda: server.knows() == nodes(share, "two"), 20, "the mark")
        wait_until(lambda: server.ends[-1].hint == 19, 20, "the answer")
        assert running._schedule.hot <= schedule.HOT_LIMIT
    assert not deaths


def test_calls_without_end() -> None:
    """A program that sets marks in a loop makes more lines than can be read."""
    calls = MarkCalls.__new__(MarkCalls)
    calls._pipe_fd = os.open("/dev/zero", os.O_RDONLY)  # a read always returns something
    calls._instances_fd = -1
    assert calls.read() == ({}, True)
    calls.close()
