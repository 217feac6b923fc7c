"""Real mounts through what loses events elsewhere: dead, stopped and missing agents, overflow of
the host's queue, no more watches, a full outbox; and bugs in the server. Nothing may be lost.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from guest_tools.watcher import notify
from harness.mounts import Mount, command, mounted, wait_until
from harness.overflow import fill, queue_of
from protocol.inotify import parse_events
from protocol.masks import Mask

from .observing import Line, idle, status, the_mount, watching


@pytest.fixture
def make_share(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Makes one mount with options."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(mounted(source, mountpoint, *options))


def agent_of(share: Mount) -> int:
    """The agent's pid, once it is connected."""
    pid: int = wait_until(lambda: the_mount(share.mountpoint)["agent_pid"], 20, "an agent")
    return pid


def another_agent(share: Mount, old: int) -> int:
    """The agent that came after ``old``."""

    def another() -> int:
        pid: int = the_mount(share.mountpoint)["agent_pid"]
        return pid if pid != old else 0

    return wait_until(another, 20, "another agent")


def once(lines: list[Line], kind: str) -> list[bytes]:
    """Names with that event, in order; each exactly once."""
    names = [line.path for line in lines if kind in line.kinds.split(",")]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    assert not repeated, f"delivered more than once: {repeated[:5]}"
    return names


def below(share: Mount, name: str) -> bytes:
    return os.fsencode(share.mountpoint / name)


# The agent dies


def test_killed_agent_is_replaced_and_missed_events_are_delivered(share: Mount) -> None:
    (share.source / "old").write_text("x")
    with watching(share) as watcher:
        agent = agent_of(share)
        os.kill(agent, signal.SIGKILL)
        for i in range(50):
            (share.source / f"n{i}").mkdir()
        (share.source / "old").rename(share.source / "new")
        (share.source / "n7").rmdir()
        assert another_agent(share, agent) != agent
        (share.source / "last").mkdir()
        lines = watcher.wait((below(share, "last"), "CREATE,ISDIR"))
        made = [below(share, f"n{i}") for i in range(50)]
        assert once(lines, "CREATE") == [*made, below(share, "last")]
        assert once(lines, "MOVED_FROM") == [below(share, "old")]
        assert once(lines, "MOVED_TO") == [below(share, "new")]
        assert once(lines, "DELETE") == [below(share, "n7")]


def test_killed_again_and_again_during_a_storm(share: Mount) -> None:
    with watching(share, events="create,delete") as watcher:
        for i in range(300):
            (share.source / f"n{i}").mkdir()
            if i in (100, 200):
                agent = agent_of(share)
                os.kill(agent, signal.SIGKILL)
                another_agent(share, agent)
        lines = watcher.wait((below(share, "n299"), "CREATE,ISDIR"))
        assert once(lines, "CREATE") == [below(share, f"n{i}") for i in range(300)]


def test_an_agent_that_somebody_terminates_is_replaced(share: Mount) -> None:
    with watching(share) as watcher:
        agent = agent_of(share)
        os.kill(agent, signal.SIGTERM)
        another_agent(share, agent)
        (share.source / "x").mkdir()
        watcher.wait((below(share, "x"), "CREATE,ISDIR"))


def test_watches_that_come_and_go_while_there_is_no_agent(share: Mount) -> None:
    (share.source / "a").mkdir()
    (share.source / "b").mkdir()
    with watching(share, share.mountpoint / "a") as gone:
        agent = agent_of(share)
        os.kill(agent, signal.SIGSTOP)
        assert gone.pid
    with watching(share, share.mountpoint / "b", arm=False) as came:
        os.kill(agent, signal.SIGKILL)
        another_agent(share, agent)
        share.wait_armed(share.mountpoint / "b", pid=came.pid)
        (share.source / "b/x").mkdir()
        came.wait((below(share, "b/x"), "CREATE,ISDIR"))
        assert [m["path"] for m in the_mount(share.mountpoint)["armed"]] == ["b"]


def test_the_servers_death_ends_the_agent(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    server = subprocess.Popen(
        [command("fsd"), "mount", source, mountpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(b"fsd: ready")
        agent = the_mount(mountpoint)["agent_pid"]
        server.kill()
        server.wait()
        wait_until(lambda: _is_gone(agent), 10, "the agent's end")
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
        subprocess.run(["umount", "-l", mountpoint], check=True)


def _is_gone(pid: int) -> bool:
    try:
        return "(zombie)" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


# The agent is stopped


def test_stopped_agent_delays_nobody_and_loses_nothing(share: Mount) -> None:
    with watching(share, events="create,delete") as watcher:
        agent = agent_of(share)
        os.kill(agent, signal.SIGSTOP)
        try:
            for i in range(2000):
                (share.source / f"n{i}").mkdir()
            done = subprocess.run(  # a user of the mount meanwhile; it must not hang
                ["sh", "-c", "ls >/dev/null && mkdir own && echo y > own/file && cat own/file"],
                cwd=share.mountpoint, capture_output=True, timeout=20, check=True,
            )  # fmt: skip
            assert done.stdout == b"y\n"
            assert the_mount(share.mountpoint)["depth"] >= 1000
        finally:
            os.kill(agent, signal.SIGCONT)
        lines = watcher.wait((below(share, "n1999"), "CREATE,ISDIR"))
        made = [name for name in once(lines, "CREATE") if name != below(share, "own")]
        assert made == [below(share, f"n{i}") for i in range(2000)]


def test_stopped_and_killed(share: Mount) -> None:
    with watching(share, events="create,delete") as watcher:
        agent = agent_of(share)
        os.kill(agent, signal.SIGSTOP)
        for i in range(100):
            (share.source / f"n{i}").mkdir()
        os.kill(agent, signal.SIGKILL)
        lines = watcher.wait((below(share, "n99"), "CREATE,ISDIR"))
        assert once(lines, "CREATE") == [below(share, f"n{i}") for i in range(100)]


# The host's queue overflows


@contextmanager
def stopped(share: Mount) -> Iterator[None]:
    """The server does nothing for the block, and the host's queue has room for a few events."""
    share.process.send_signal(signal.SIGSTOP)
    try:
        with queue_of(share.process.pid) as queue:
            fill(queue, room=16)
        yield
    finally:
        share.process.send_signal(signal.SIGCONT)


def test_overflow_of_the_hosts_queue(make_share: Callable[..., Mount]) -> None:
    share = make_share()
    for name in ("kept", "removed", "renamed"):
        (share.source / name).mkdir()
    (share.source / "changed").write_text("x")
    with watching(share) as watcher:
        with stopped(share):
            for i in range(100):
                (share.source / f"s{i}").mkdir()
                (share.source / f"s{i}").rmdir()
            for i in range(100):
                (share.source / f"n{i}").mkdir()
            (share.source / "removed").rmdir()
            (share.source / "renamed").rename(share.source / "to")
            (share.source / "changed").write_text("changed")
        new = [(below(share, f"n{i}"), "CREATE,ISDIR") for i in range(100)]
        lines = watcher.wait(
            *new,
            (below(share, "removed"), "DELETE,ISDIR"),
            (below(share, "renamed"), "MOVED_FROM,ISDIR"),
            (below(share, "to"), "MOVED_TO,ISDIR"),
            (below(share, "changed"), "MODIFY"),
            (below(share, "changed"), "CLOSE_WRITE,CLOSE"),
        )
        reported = [line for line in lines if not line.path.startswith(below(share, "s"))]
        assert len(once(reported, "CREATE")) == 100
        assert once(reported, "DELETE") == [below(share, "removed")]
        assert not [line for line in reported if line.path == below(share, "kept")]
        state = status(share.mountpoint)
        assert state["counts"]["overflows"] >= 1
        assert state["counts"]["resyncs"] >= 1
        (share.source / "after").mkdir()
        watcher.wait((below(share, "after"), "CREATE,ISDIR"))


def test_overflow_under_a_recursive_watcher(make_share: Callable[..., Mount]) -> None:
    """Its picture is right in the end: it adds watches for what is reported to it."""
    share = make_share()
    (share.source / "a").mkdir()
    with watching(share, recursive=True, events="create,delete,move") as watcher:
        with stopped(share):
            for i in range(50):
                (share.source / f"a/s{i}").mkdir()
                (share.source / f"a/s{i}").rmdir()
            (share.source / "a/new").mkdir()
        watcher.wait((below(share, "a/new"), "CREATE,ISDIR"))
        share.wait_armed(share.mountpoint / "a/new", pid=watcher.pid)
        (share.source / "a/new/x").touch()
        watcher.wait((below(share, "a/new/x"), "CREATE"))


def test_overflow_and_a_watched_file(make_share: Callable[..., Mount]) -> None:
    """An editor watches the one file that it has open."""
    share = make_share()
    (share.source / "file").write_text("x")
    (share.source / "other").write_text("x")
    file = share.mountpoint / "file"
    with watching(share, file, events="modify,close_write,delete_self") as watcher:
        with stopped(share):
            for _ in range(100):
                (share.source / "other").chmod(0o600)
                (share.source / "d").mkdir()
                (share.source / "d").rmdir()
            (share.source / "file").write_text("changed")
        watcher.wait((os.fsencode(file), "MODIFY"))


# The host gives no more watches


def test_a_small_limit_of_watches(make_share: Callable[..., Mount]) -> None:
    share = make_share("--max-watches", "3")
    names = [f"d{i}" for i in range(8)]
    for name in names:
        (share.source / name).mkdir()
    with watching(share, recursive=True, events="create,delete,move", arm=False) as watcher:
        wait_until(lambda: the_mount(share.mountpoint)["marks"] == 9, 20, "marks")
        state = status(share.mountpoint)
        assert state["host_watches"] <= 3
        unwatched = {entry["path"]: entry["reason"] for entry in state["unwatched"]}
        assert len(unwatched) >= 6
        assert set(unwatched.values()) == {"limit on host watches reached"}
        armed = {mark["path"]: mark["watched"] for mark in the_mount(share.mountpoint)["armed"]}
        assert {path for path, watched in armed.items() if not watched} <= set(unwatched)
        for name in names:
            (share.source / name / "x").mkdir()
        lines = watcher.wait(*((below(share, f"{name}/x"), "CREATE,ISDIR") for name in names))
        once(lines, "CREATE")
        for name in names:
            (share.source / name / "x").rename(share.source / name / "y")
        lines = watcher.wait(*((below(share, f"{name}/y"), "MOVED_TO,ISDIR") for name in names))
        once(lines, "MOVED_FROM")
        once(lines, "MOVED_TO")


# With faults and limits injected into the server


@contextmanager
def injected(tmp_path: Path, code: str) -> Iterator[None]:
    """Python lines that the server's interpreter runs before anything else."""
    directory = tmp_path / "inject"
    directory.mkdir()
    body = "".join(f"    {line}\n" for line in code.splitlines())
    text = f"import sys\nif 'mount' in sys.orig_argv:\n{body}"
    (directory / "sitecustomize.py").write_text(text)
    os.environ["PYTHONPATH"] = str(directory)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]


def test_a_full_outbox_while_the_agent_is_stopped(
    tmp_path: Path, make_share: Callable[..., Mount]
) -> None:
    limit = (
        "from fsd.export.export import Export\nExport.__init__.__kwdefaults__['outbox_limit'] = 50"
    )
    with injected(tmp_path, limit):
        share = make_share()
    (share.source / "old").mkdir()
    (share.source / "gone").mkdir()
    with watching(share, events="create,delete,move") as watcher:
        agent = agent_of(share)
        os.kill(agent, signal.SIGSTOP)
        try:
            for i in range(500):
                (share.source / f"s{i}").mkdir()
                if i % 2:
                    (share.source / f"s{i}").rmdir()
            (share.source / "old").rename(share.source / "new")
            (share.source / "gone").rmdir()
            wait_until(lambda: the_mount(share.mountpoint)["missed"] > 100, 10, "a full outbox")
            assert the_mount(share.mountpoint)["depth"] <= 60
        finally:
            os.kill(agent, signal.SIGCONT)
        lines = watcher.wait(
            (below(share, "s498"), "CREATE,ISDIR"),
            (below(share, "gone"), "DELETE,ISDIR"),
            (below(share, "new"), "MOVED_TO,ISDIR"),
        )
        there: set[bytes] = {below(share, "old"), below(share, "gone")}
        for line in lines:
            kinds = line.kinds.split(",")
            if "CREATE" in kinds or "MOVED_TO" in kinds:
                assert line.path not in there, f"{line} twice"
                there.add(line.path)
            else:
                assert line.path in there, f"{line}, and it was not there"
                there.discard(line.path)
        assert there == {below(share, name) for name in os.listdir(share.source)}
        assert the_mount(share.mountpoint)["resyncs"] >= 1


def test_a_burst_beyond_the_outbox(tmp_path: Path, make_share: Callable[..., Mount]) -> None:
    """Two writers of the host are much faster than the replay. What does not fit becomes a
    difference: in the end watchers believe what is there, and nothing is delivered twice.
    """
    limit = (
        "from fsd.export.export import Export\nExport.__init__.__kwdefaults__['outbox_limit'] = 300"
    )
    with injected(tmp_path, limit):
        share = make_share()
    top = share.source / "top"
    for number in range(20):
        (top / f"old{number}").mkdir(parents=True)

    def write(seed: int) -> None:
        chance = random.Random(seed)
        for number in range(3000):
            a, b = (top / f"{chance.choice(('old', 'new'))}{chance.randrange(20)}" for _ in "ab")
            with suppress(OSError):
                chance.choice((a.mkdir, a.rmdir, lambda a=a, b=b: a.rename(b)))()
            if number % 3 == 0:
                (top / f"{seed} {number}").mkdir()

    with watching(share, share.mountpoint / "top", events="create,delete,move") as watcher:
        writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        (top / "end").mkdir()
        wait_until(lambda: idle(share.mountpoint), 120, "nothing more to deliver")
        lines = watcher.wait((below(share, "top/end"), "CREATE,ISDIR"))
    state = the_mount(share.mountpoint)
    assert state["overflows"] >= 1
    assert state["missed"] > 300
    assert not state["failed"]
    believed = {below(share, f"top/old{number}") for number in range(20)}
    for line in lines:
        kinds = line.kinds.split(",")
        if "CREATE" in kinds or "MOVED_TO" in kinds:
            believed.add(line.path)
        else:
            believed.discard(line.path)
    assert believed == {below(share, f"top/{path.name}") for path in top.iterdir()}


class Reader:
    """A program on the mount that reads each file when it gets an event about it."""

    EVENTS = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.MODIFY

    def __init__(self, directory: Path) -> None:
        self.content: dict[str, bytes | None] = {}
        """What it has read last; None if the file was not there."""
        self._directory = directory
        self._fd = notify.inotify_init(os.O_CLOEXEC)
        notify.add_watch(self._fd, str(directory), int(self.EVENTS))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while "end" not in self.content:
            for event in parse_events(os.read(self._fd, 65536)):
                assert not event.mask & Mask.Q_OVERFLOW
                self._read(os.fsdecode(event.name))
        os.close(self._fd)

    def _read(self, name: str) -> None:
        try:
            self.content[name] = (self._directory / name).read_bytes()
        except FileNotFoundError:
            self.content[name] = None

    def join(self, timeout: float) -> None:
        """Wait until it has got the event of a file "end"."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the last event has not come"


def change_files(top: Path, writer: int, count: int) -> None:
    """Random changes of files that the other writers change, too, and of the writer's own."""
    chance = random.Random(writer)
    for number in range(count):
        a, b = (top / f"{chance.choice(('all', str(writer)))}{chance.randrange(30)}" for _ in "ab")
        text = f"{writer} {number}"
        with suppress(OSError):
            chance.choice(
                (lambda a=a, text=text: a.write_text(text), a.unlink, lambda a=a, b=b: a.rename(b))
            )()
        if number % 4 == 0:
            (top / f"{writer} {number}").write_text(text)


@pytest.mark.parametrize("writers", [2, 4])
def test_what_watchers_have_read_after_a_burst_beyond_the_outbox(
    tmp_path: Path, make_share: Callable[..., Mount], writers: int
) -> None:
    """The difference comes after the changes: who reads a file upon each event has read what is
    there in the end, of all files.
    """
    limit = (
        "from fsd.export.export import Export\nExport.__init__.__kwdefaults__['outbox_limit'] = 300"
    )
    with injected(tmp_path, limit):
        share = make_share()
    top = share.source / "top"
    top.mkdir()
    reader = Reader(share.mountpoint / "top")
    share.wait_armed(share.mountpoint / "top", pid=os.getpid(), timeout=20)
    threads = [
        threading.Thread(target=change_files, args=(top, writer, 4000 // writers))
        for writer in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: idle(share.mountpoint), 120, "nothing more to deliver")
    (top / "end").touch()
    reader.join(60)
    state = the_mount(share.mountpoint)
    assert state["overflows"] >= 1
    assert state["missed"] > 300
    there = {path.name: path.read_bytes() for path in top.iterdir()}
    assert {name: read for name, read in reader.content.items() if read is not None} == there


FAULTS = """
import os
from fsd.fuse.openfiledata import OpenFileData
from fsd.fuse.operations import Operations
TRIGGER = {trigger!r}
def broken(name, real):
    def method(self, *args, **keywords):
        if os.path.exists(TRIGGER) and name in open(TRIGGER).read().split():
            raise RuntimeError("injected into " + name)
        return real(self, *args, **keywords)
    return method
for kind in (Operations, OpenFileData):
    for name, real in list(vars(kind).items()):
        if callable(real) and not name.startswith("_") and name != "close":
            setattr(kind, name, broken(name, real))
"""

OPERATIONS: dict[str, Callable[[Path], object]] = {
    "lookup": lambda m: os.stat(m / "file"),
    "getattr": lambda m: os.stat(m),
    "setattr": lambda m: os.chmod(m / "file", 0o600),
    "readlink": lambda m: os.readlink(m / "link"),
    "mknod": lambda m: os.mknod(m / "new"),
    "mkdir": lambda m: os.mkdir(m / "new"),
    "symlink": lambda m: os.symlink("t", m / "new"),
    "link": lambda m: os.link(m / "file", m / "new"),
    "unlink": lambda m: os.unlink(m / "file"),
    "rmdir": lambda m: os.rmdir(m / "dir"),
    "rename": lambda m: os.rename(m / "file", m / "new"),
    "open": lambda m: os.open(m / "file", os.O_RDONLY),
    "create": lambda m: os.open(m / "new", os.O_CREAT | os.O_WRONLY),
    "read_into": lambda m: (m / "file").read_bytes(),
    "write_from": lambda m: os.write(os.open(m / "file", os.O_WRONLY), b"x"),
    "opendir": lambda m: os.listdir(m / "dir"),
    "names": lambda m: os.listdir(m / "dir"),
    "statfs": lambda m: os.statvfs(m),
    "setxattr": lambda m: os.setxattr(m / "file", "user.x", b"1"),
    "getxattr": lambda m: os.getxattr(m / "file", "user.y"),
    "listxattr": lambda m: os.listxattr(m / "file"),
    "removexattr": lambda m: os.removexattr(m / "file", "user.y"),
}


IN_BYTES = {"read_into": "read", "write_from": "write"}
"""What pyfuse3's operations call instead."""


@pytest.mark.parametrize("transport", ["devfuse", "libfuse"])
def test_every_handler_may_fail_and_the_server_lives_on(tmp_path: Path, transport: str) -> None:
    """A bug in any operation is EIO for its caller; the mount and its watchers continue."""
    source, mountpoint, trigger = tmp_path / "source", tmp_path / "mount", tmp_path / "trigger"
    for directory in (source, mountpoint, source / "dir"):
        directory.mkdir()
    (source / "file").write_text("content")
    os.setxattr(source / "file", "user.y", b"1")
    (source / "link").symlink_to("file")
    unseen: list[str] = []
    with (
        injected(tmp_path, FAULTS.format(trigger=str(trigger))),
        serving(source, mountpoint, f"--transport={transport}") as share,
        watching(share, events="create,delete") as watcher,
    ):
        for name in OPERATIONS:
            trigger.write_text(f"{name} {IN_BYTES.get(name, '')}")
            script = "import sys; sys.path.insert(0, sys.argv[1])\n"
            script += "from tests.mount.test_loss import try_one\ntry_one(*sys.argv[2:])"
            done = subprocess.run(
                [sys.executable, "-c", script, Path(__file__).parents[2], name, mountpoint],
                capture_output=True, text=True, timeout=20, check=False,
            )  # fmt: skip
            trigger.unlink()
            if done.stdout.strip() != "EIO":
                unseen.append(f"{name}: {done.stdout.strip() or done.stderr[-300:]}")
            assert (mountpoint / "file").read_text() == "content", f"dead after {name}"
        trigger.write_text("release forget")
        (mountpoint / "file").read_text()
        trigger.unlink()
        (source / "alive").mkdir()
        watcher.wait((below(share, "alive"), "CREATE,ISDIR"))
    assert not unseen


def try_one(name: str, mountpoint: str) -> None:
    """In a process of its own: the operation, and what came of it."""
    try:
        OPERATIONS[name](Path(mountpoint))
    except OSError as error:
        print(errno.errorcode[error.errno or 0])
    else:
        print("done")


@contextmanager
def serving(source: Path, mountpoint: Path, option: str) -> Iterator[Mount]:
    """``mounted``, for a server that is made to log tracebacks."""
    try:
        with mounted(source, mountpoint, option) as share:
            yield share
    except AssertionError as error:
        if "fsd wrote a traceback" not in str(error):
            raise


def test_the_agents_own_faults_are_counted_and_survived(share: Mount) -> None:
    """A user of the mount removes what the agent is about to replay on: counted, no more."""
    with watching(share, recursive=True, events="create,delete") as watcher:
        agent = agent_of(share)
        os.kill(agent, signal.SIGSTOP)
        for i in range(20):
            (share.source / f"d{i}").mkdir()
            (share.source / f"d{i}/x").mkdir()
        for i in range(0, 20, 2):
            os.rmdir(share.mountpoint / f"d{i}/x")
            os.rmdir(share.mountpoint / f"d{i}")
        os.kill(agent, signal.SIGCONT)
        (share.source / "last").mkdir()
        watcher.wait((below(share, "last"), "CREATE,ISDIR"))
        wait_until(lambda: idle(share.mountpoint), 10, "rest")
        assert sorted(os.listdir(share.mountpoint)) == sorted(os.listdir(share.source))
