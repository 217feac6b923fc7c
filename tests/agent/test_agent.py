"""The agent's process on a real mount: what guests mount over the share, an old kernel, few
descriptors, its threads.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fsd.servers import agent as agent_process
from fsd.servers.agent import AgentError, AgentProcess
from guest_tools.agent import descriptors
from harness.forbid import OPENAT2
from harness.mounts import Mount, wait_until
from tests.cli.support import GUEST, line_of
from tests.mount.observing import Watcher, the_mount, watching

ROOT = Path(__file__).parent.parent.parent
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, which only root can")
LAST = "last"


@contextmanager
def agent(share: Mount, *before: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """The share's agent, started with the words ``before`` its command."""
    with subprocess.Popen(
        [*before, GUEST, "agent", share.mountpoint],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            assert line_of(process).startswith("fsd-guest: ready: ")
            yield process
        finally:
            process.kill()


def forbidding(number: int, error: int) -> list[str | Path]:
    return [sys.executable, ROOT / "harness/forbid.py", str(number), str(error)]


def without(*capabilities: str) -> list[str | Path]:
    """A root without capabilities, as in a container."""
    names = ",".join(f"-{name}" for name in capabilities)
    return ["setpriv", f"--bounding-set={names}", f"--inh-caps={names}"]


def seen(share: Mount, watcher: Watcher, name: str, kind: str) -> None:
    """Wait for an event of a name in the watched directory."""
    watcher.wait((os.fsencode(share.mountpoint / name), kind))


# What is mounted below


def picture(top: Path) -> list[tuple[str, int, int, str]]:
    """The files of a volume."""
    return sorted(
        (path.name, path.stat().st_ino, path.stat().st_mtime_ns, path.read_text())
        for path in top.iterdir()
        if path.is_file()
    ) + sorted((path.name, 0, 0, "") for path in top.iterdir() if not path.is_file())


@contextmanager
def marked(share: Mount) -> Iterator[None]:
    """Somebody has a mark of fanotify on the mount, for which the agent works through it."""
    libc = ctypes.CDLL(None, use_errno=True)
    group = libc.fanotify_init(0, os.O_RDONLY)
    assert group >= 0
    mask = ctypes.c_uint64(0x8)  # FAN_CLOSE_WRITE; FAN_MARK_ADD | FAN_MARK_MOUNT
    assert libc.fanotify_mark(group, 0x11, mask, -100, os.fsencode(share.mountpoint)) == 0
    try:
        share.wait_armed(pid=os.getpid())
        wait_until(lambda: any(mark["wd"] < 0 for mark in share.marks()), 10, "the mark")
        yield
    finally:
        os.close(group)


@AS_ROOT
@pytest.mark.parametrize("kind", ["tmpfs", "another directory of the share"])
@pytest.mark.parametrize("how", ["privately", "visibly", "without capabilities", "old kernel"])
def test_a_volume_over_a_directory_is_the_volumes(
    share_no_agent: Mount, how: str, kind: str
) -> None:
    share = share_no_agent
    below, over = share.source / "sub", share.mountpoint / "sub"
    (share.source / "other").mkdir()
    below.mkdir()
    capabilities = without("sys_admin", "dac_read_search")
    start: list[str | Path] = []
    if how != "privately" and how != "visibly":
        start = capabilities
    if how == "old kernel":
        start = [*start, *forbidding(OPENAT2, errno.ENOSYS)]
    for name in ("keep", "old", "moved"):
        (below / name).write_text("host")
    with (
        ExitStack() as stack,
        agent(share, *start),
        watching(share, share.mountpoint, over) as watcher,
    ):
        if how == "visibly":
            stack.enter_context(marked(share))
        source = [share.mountpoint / "other"] if kind != "tmpfs" else ["volume"]
        option = ["--bind"] if kind != "tmpfs" else ["-t", "tmpfs"]
        subprocess.run(["mount", *option, *source, over], check=True)
        try:
            for name in ("keep", "old", "moved"):
                (over / name).write_text("the volume's own")
            before = picture(over)
            (below / "new").write_text("host")
            (below / "newdir").mkdir()
            (below / "old").unlink()
            (below / "moved").rename(below / "moved2")
            (below / "keep").chmod(0o600)
            with (below / "keep").open("a") as file:
                file.write("more")
            (share.source / LAST).mkdir()  # behind it all, in order
            seen(share, watcher, LAST, "CREATE,ISDIR")
            assert picture(over) == before
            kinds = {line.kinds for line in watcher.lines() if line.path.startswith(bytes(over))}
            reported = {"CREATE", "DELETE", "MOVED_FROM", "MOVED_TO", "ATTRIB"}
            if start:
                assert not reported & kinds
                assert the_mount(share.mountpoint)["failed"] >= 5
            else:  # watchers of what the volume covers see all
                assert reported <= kinds
                assert not the_mount(share.mountpoint)["failed"]
        finally:
            subprocess.run(["umount", over], check=True)


# Old kernels


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_without_openat2_events_are_the_same(share_no_agent: Mount, error: int) -> None:
    share = share_no_agent
    (share.source / "a/b").mkdir(parents=True)
    with (
        agent(share, *forbidding(OPENAT2, error)),
        watching(share, share.mountpoint / "a/b", share.mountpoint) as watcher,
    ):
        (share.source / "a/b/one").write_text("x")
        seen(share, watcher, "a/b/one", "CLOSE_WRITE,CLOSE")
        (share.source / "a/b/one").rename(share.source / "two")
        seen(share, watcher, "two", "MOVED_TO")
        (share.source / "a").rename(share.source / "c")  # a directory: that is walked to
        seen(share, watcher, "c", "MOVED_TO,ISDIR")
        assert not the_mount(share.mountpoint)["failed"]


# Descriptors


def test_the_limit_is_raised() -> None:
    code = (
        "import resource; from guest_tools.agent import descriptors;"
        "print(*descriptors.raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limits in ((64, hard), (64, 256)):
        done = subprocess.run(
            [*without("sys_resource"), sys.executable, "-c", code],
            capture_output=True, text=True, cwd=ROOT, check=False,
            preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits),
        )  # fmt: skip
        opened, exits, soft, now = map(int, done.stdout.split())
        assert soft == now == limits[1], done.stderr
        assert opened == min(descriptors.OPENED, soft // 2)
        assert exits == min(descriptors.EXITS, soft // 4)


def limited(limit: int) -> list[str | Path]:
    return [*without("sys_resource"), "prlimit", f"--nofile={limit}:{limit}"]


def test_files_that_others_hold_open_do_not_end_events(share_no_agent: Mount) -> None:
    """The OPEN of those beyond the bound comes late, just before their CLOSE; nothing is lost."""
    share = share_no_agent
    with (
        agent(share, *limited(64)) as process,
        watching(share, events="create,open,close_write") as watcher,
        ExitStack() as held,
    ):
        for number in range(100):
            file = held.enter_context((share.source / f"held{number}").open("w"))
            file.write("x")
        (share.source / "after").write_text("x")
        seen(share, watcher, "after", "CLOSE_WRITE,CLOSE")
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 64
        held.close()
        for number in range(100):
            seen(share, watcher, f"held{number}", "CLOSE_WRITE,CLOSE")
        (share.source / "later").write_text("x")
        seen(share, watcher, "later", "CLOSE_WRITE,CLOSE")
        kinds = [line.kinds for line in watcher.lines() if line.path.endswith(b"/held99")]
        assert kinds == ["CREATE", "OPEN", "CLOSE_WRITE,CLOSE"]
        assert process.poll() is None


def test_without_a_descriptor_marks_stay(share_no_agent: Mount) -> None:
    """The kernel itself refuses: every file that the agent would open meanwhile is EMFILE."""
    share = share_no_agent
    for name in ("one", "two"):
        (share.source / name).mkdir()
    with (
        agent(share) as process,
        watching(share, share.mountpoint / "one", events="attrib,create") as first,
    ):
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        # Fewer than it has open, and no fewer than it gives to poll(2), which would fail.
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (8, limits[1]))
        with watching(share, share.mountpoint / "two", arm=False) as second:
            os.stat(share.mountpoint / "two")
            (share.source / "one/lost").mkdir()
            wait_until(lambda: the_mount(share.mountpoint)["failed"], 20, "an order that failed")
            assert not any(mark["armed"] for mark in share.marks() if mark["pid"] == second.pid)
            assert all(mark["armed"] for mark in share.marks() if mark["pid"] == first.pid)
            assert process.poll() is None
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
            share.wait_armed(share.mountpoint / "two", pid=second.pid, timeout=20)
            for name, watcher in (("one/new", first), ("two/new", second)):
                (share.source / name).mkdir()
                seen(share, watcher, name, "CREATE,ISDIR")


FORKS = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
assert libc.inotify_add_watch(libc.inotify_init1(0), os.fsencode(sys.argv[1]), 0x100) > 0
for _ in range(150):
    if not os.fork():
        os.stat(sys.argv[1])  # of which the server informs the agent
        sys.stdin.read()
        os._exit(0)
print("forked", flush=True)
sys.stdin.read()
"""


def test_watchers_that_fork_do_not_end_events(share_no_agent: Mount) -> None:
    share = share_no_agent
    for name in ("one", "two"):
        (share.source / name).mkdir()
    with agent(share, *limited(64)) as process:
        with subprocess.Popen(
            [sys.executable, "-c", FORKS, share.mountpoint / "one"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as forks:  # fmt: skip
            assert line_of(forks) == "forked"
            share.wait_armed(share.mountpoint / "one", pid=forks.pid)
            with watching(share, share.mountpoint / "two") as watcher:
                (share.source / "two/new").mkdir()
                seen(share, watcher, "two/new", "CREATE,ISDIR")
        with watching(share, share.mountpoint / "two") as watcher:
            (share.source / "two/again").mkdir()
            seen(share, watcher, "two/again", "CREATE,ISDIR")
        assert process.poll() is None


# Its threads, and its end


DYING = """
import sys
from guest_tools.agent import scanner
from guest_tools.cli import main
real = scanner.Scanner._watch_exits
def die(self, poll):
    if self._schedule.hot:
        raise RuntimeError("as a bug would")
    real(self, poll)
scanner.Scanner._watch_exits = die
sys.exit(main(["agent", sys.argv[1]]))
"""


def test_a_thread_that_dies_ends_the_agent(share_no_agent: Mount) -> None:
    share = share_no_agent
    (share.source / "d").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", DYING, share.mountpoint],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert line_of(process).startswith("fsd-guest: ready: ")
        os.stat(share.mountpoint / "d")
        with watching(share, share.mountpoint / "d", arm=False):
            assert process.wait(20) == 1
        assert process.stderr is not None
        (line,) = process.stderr.read().decode().splitlines()
        assert "its thread 'scanner' failed: RuntimeError: as a bug would" in line
    with agent(share), watching(share) as watcher:  # the next one, as of a supervisor
        (share.source / "new").mkdir()
        seen(share, watcher, "new", "CREATE,ISDIR")


def test_an_agent_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server without descriptors, say, which ends nothing but that try."""
    tries = []
    real = trio.lowlevel.open_process

    async def open_process(command: list[str], **options: Any) -> trio.Process:
        tries.append(command)
        if len(tries) in (2, 3):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        last = len(tries) == 4
        script = f"print('fsd-guest: ready: x', flush=True); raise SystemExit({int(not last)})"
        return await real([sys.executable, "-c", script], **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
    monkeypatch.setattr(agent_process, "FIRST_PAUSE", 0.01)
    trio.run(AgentProcess("/nowhere", lambda: None).run, lambda: None)
    assert len(tries) == 4

    async def never(command: list[str], **options: Any) -> trio.Process:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(trio.lowlevel, "open_process", never)
    with pytest.raises(AgentError, match="cannot be started: Too many open files"):
        trio.run(AgentProcess("/nowhere", lambda: None).run, lambda: None)


# Directories that only look like a mount


@pytest.mark.parametrize(
    "words", [["agent"], ["marks"], ["mark", "add", "--mask=create"], ["watch"]]
)
@pytest.mark.parametrize("kind", ["link", "pipes", "files", "links"])
def test_a_trap_is_refused(tmp_path: Path, words: list[str], kind: str) -> None:
    """Root is called on a directory whose owner has put something else in place of the channel."""
    trap, victim = tmp_path / "trap", tmp_path / "victim"
    victim.mkdir()
    trap.mkdir()
    names = ("control", "session", "status")
    for name in names:
        (victim / name).write_text("[]")
    if kind == "link":
        (trap / ".fsd").symlink_to(victim)
    else:
        (trap / ".fsd").mkdir()
        for name in names:
            place = trap / ".fsd" / name
            if kind == "pipes":
                os.mkfifo(place)
            elif kind == "links":
                place.symlink_to(victim / name)
            else:
                place.write_text("[]")
    if words[0] in ("mark", "watch"):  # which climb to the mount
        subprocess.run(["mount", "--bind", trap, trap], check=True)
    try:
        done = subprocess.run(
            [GUEST, *words, trap], capture_output=True, text=True, timeout=30, check=False
        )
    finally:
        if words[0] in ("mark", "watch"):
            subprocess.run(["umount", trap], check=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "not an fsd mount" in done.stderr or "not in an fsd mount" in done.stderr
    assert all((victim / name).read_text() == "[]" for name in names)
    if kind == "files":
        assert all((trap / ".fsd" / name).read_text() == "[]" for name in names)
