"""`fsd mount --cache=coherent`: the kernel keeps what it was given, and shows each change of the
host.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness.mounts import Mount, command, mounted, wait_until
from harness.namespace import as_user, inside
from harness.usersmount import users_mount
from protocol.masks import Mask
from tests.mount.test_around_marks import watch

NAMES = [f"n{number}" for number in range(6)]
STEPS = 400
SOON = 5.0
"""Seconds in which a change has to be seen, on a busy machine; on an idle one it takes 1 ms."""


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Mount]:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--cache=coherent") as share:
        yield share


def cache(share: Mount) -> dict[str, Any]:
    """The state of its kernel's cache."""
    status = json.loads((share.mountpoint / ".fsd/status").read_text())
    (state,) = [guest["cache"] for guest in status["guests"] if guest["kind"] == "mount"]
    return dict(state)


def requests(share: Mount) -> int:
    """System calls by which the server has read or written so far: each request makes some."""
    text = Path(f"/proc/{share.process.pid}/io").read_text()
    counts = dict(line.split(": ") for line in text.splitlines())
    return int(counts["syscr"]) + int(counts["syscw"])


def attempt(read: Callable[[], Any]) -> Any:
    """What it returns, or the errno."""
    try:
        return read()
    except OSError as error:
        return error.errno


def facts(path: Path) -> Any:
    """Everything that a program can see of a name but access times."""
    status = os.lstat(path)
    found: list[Any] = [status.st_mode, status.st_nlink, status.st_uid, status.st_mtime_ns]
    if path.is_symlink():
        return [*found, os.readlink(path)]
    if path.is_dir():
        return [*found, sorted(set(os.listdir(path)) - {".fsd"})]
    return [*found, status.st_size, path.read_bytes(), os.access(path, os.W_OK)]


def picture(top: Path, places: list[str]) -> dict[str, Any]:
    return {place: attempt(partial(facts, top / place)) for place in places}


def agree(share: Mount, places: list[str], what: str) -> None:
    """The mount shows what the host has, soon."""
    wanted = picture(share.source, places)
    end = time.monotonic() + SOON
    while (seen := picture(share.mountpoint, places)) != wanted and time.monotonic() < end:
        pass
    wrong = {
        place: (seen[place], wanted[place]) for place in places if seen[place] != wanted[place]
    }
    assert not wrong, f"after {what}: mount, host = {wrong}"


# Kept


def test_what_is_kept_makes_no_request(share: Mount) -> None:
    directory = share.source / "d"
    directory.mkdir()
    (directory / "file").write_text("data")
    (directory / "link").symlink_to("file")
    seen = share.mountpoint / "d"

    def use() -> None:
        (seen / "file").stat()
        assert not (seen / "none").exists()
        assert (seen / "link").read_bytes() == b"data"
        with open(seen / "file", "rb") as file:
            assert file.read() == b"data"

    def is_kept() -> bool:
        use()  # again, as events of the files just made take their names back
        return bool(cache(share)["names"] >= 4)

    wait_until(is_kept)
    before = requests(share)
    for _ in range(1000):
        (seen / "file").stat()
        (seen / "none").exists()
        (seen / "link").readlink()
    assert requests(share) - before < 200
    use()


def test_status_shows_what_is_kept_and_what_is_not(share: Mount) -> None:
    (share.source / "one").write_text("data")
    os.link(share.source / "one", share.source / "two")
    (share.source / "three").write_text("data")

    def line() -> str:
        for name in ("one", "three"):  # again, as events of the files just made take these back
            (share.mountpoint / name).stat()
        done = subprocess.run(
            [command("fsd"), "status", share.mountpoint], capture_output=True, text=True, check=True
        )
        (found,) = [line for line in done.stdout.splitlines() if "the kernel keeps" in line]
        return found

    wait_until(lambda: "keeps 2 names, " in line())
    assert "not kept: other links " in line()


def test_libfuse_keeps_nothing(tmp_path: Path) -> None:
    for name in ("source", "mount"):
        (tmp_path / name).mkdir()
    options = ["--cache=coherent", "--transport=libfuse"]
    done = subprocess.run(
        [command("fsd"), "mount", *options, tmp_path / "source", tmp_path / "mount"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "fsd: --cache=coherent needs --transport=devfuse\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")
def test_names_are_kept_only_if_marks_are_seen(tmp_path: Path) -> None:
    """An ordinary user's agent cannot trace the calls that set marks: data is kept, not names."""
    with users_mount(tmp_path, "--cache=coherent") as (share, _):
        (share.source / "file").write_text("data")
        (share.source / "file").chmod(0o644)
        user = [*as_user(), "sh", "-c"]
        script = f"for i in 1 2 3; do cat {share.mountpoint}/file; done"
        subprocess.run(inside(share.process.pid, *user, script), check=True)
        done = subprocess.run(
            inside(share.process.pid, *as_user(), command("fsd"), "status", share.mountpoint),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert re.search(r"keeps \d+ names, 0 attributes, 1 contents of", done.stdout), done.stdout
    assert "marks are not seen" in done.stdout


def test_a_watched_directory_is_not_kept(share: Mount) -> None:
    (share.source / "d").mkdir()
    (share.source / "d/file").write_text("data")
    (share.mountpoint / "d/file").stat()
    assert cache(share)["names"] >= 2
    with subprocess.Popen(
        ["inotifywait", "-m", share.mountpoint / "d"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as watcher:
        try:
            share.wait_armed(share.mountpoint / "d", pid=watcher.pid)
            (share.mountpoint / "d/file").stat()
            assert cache(share)["short"]["watched by a program"]
            (share.source / "d/file").write_text("longer")
            assert watcher.stdout is not None
            line = watcher.stdout.readline()
            assert b"OPEN" in line or b"MODIFY" in line
            assert (share.mountpoint / "d/file").read_text() == "longer"
        finally:
            watcher.terminate()


# Marks on what is kept

WRITER = """
import os, sys, time
print("begun", flush=True)
for number in range(1000):
    before = time.monotonic()
    os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_EXCL))
    after = time.monotonic()
    print(before, after)
    while time.monotonic() < after + 0.0003:
        pass
"""
EARLY = 0.05
"""Seconds before a mark: what happened earlier is not delivered. It takes the server less to read
an event on an idle machine: 1 ms."""


@pytest.mark.parametrize("rest", [0.3, 3.5])
def test_nothing_is_lost_around_a_mark_that_makes_no_request(share: Mount, rest: float) -> None:
    """The host changes a directory all the time when a program marks it. ``rest``: the directory
    was looked up just before, or long ago.
    """
    (share.source / "d").mkdir()
    os.listdir(share.mountpoint / "d")
    (share.mountpoint / "d").stat()
    wait_until(lambda: cache(share)["settled"])
    time.sleep(rest)
    with (
        subprocess.Popen(
            [sys.executable, "-c", WRITER, share.source / "d"], stdout=subprocess.PIPE, text=True
        ) as writer,
        watch() as marks,
    ):
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.03)
        requested = requests(share)
        for _ in range(500):  # it is kept: a look-up each would be 1,000; events are read, too
            os.close(os.open(share.mountpoint / "d", os.O_PATH))
        assert requests(share) - requested < 400
        before = time.monotonic()
        marks.add(share.mountpoint / "d", Mask.CREATE)
        after = time.monotonic()
        times = [[float(part) for part in line.split()] for line in writer.stdout]
        seen = [int(event.split()[-1]) for event in marks.read(until="CREATE 999")]
    due = [number for number, (began, _) in enumerate(times) if began > after]
    early = [number for number, (_, ended) in enumerate(times) if ended < before - EARLY]
    assert len(due) > 100
    assert seen == list(range(seen[0], 1000))
    assert seen[0] <= due[0]
    assert not set(seen) & set(early)


def test_a_file_that_changes_right_after_its_mark(share: Mount) -> None:
    for number in range(10):
        name = f"file{number}"
        (share.source / name).write_text("old")
        (share.mountpoint / name).read_text()
        wait_until(lambda: cache(share)["settled"])
        with watch() as marks:
            marks.add(share.mountpoint / name, Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE)
            with open(share.source / name, "a") as file:
                file.write("new")
            seen = marks.read(until="CLOSE_WRITE")
            # What both watches have reported may come twice (docs/decisions/coherent.md).
            assert seen[0] == "MODIFY"
            assert set(seen) == {"MODIFY", "CLOSE_WRITE"}


MANY = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(0)
for number in range(20_000):
    path = os.fsencode(f"{sys.argv[1]}/{number}")
    os.mkdir(path)
    assert libc.inotify_add_watch(fd, path, 0x100) > 0
print("begun", flush=True)
while True:
    libc.inotify_add_watch(fd, path, 0x100)
    time.sleep(0.003)
"""


def test_a_program_with_many_marks_elsewhere_delays_no_mark(share: Mount, tmp_path: Path) -> None:
    """The agent reads all marks of a program that sets one: that takes long."""
    (tmp_path / "elsewhere").mkdir()
    many = [sys.executable, "-c", MANY, str(tmp_path / "elsewhere")]
    took = []
    with subprocess.Popen(many, stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            for number in range(5):
                (share.source / f"d{number}").mkdir()
                os.listdir(share.mountpoint / f"d{number}")
                time.sleep(0.5)
                with watch() as marks:
                    marks.add(share.mountpoint / f"d{number}", Mask.CREATE)
                    began = time.monotonic()
                    wait_until(lambda: _marks(share) == 1, 30)
                    took.append(time.monotonic() - began)
                wait_until(lambda: not _marks(share), 30)
        finally:
            busy.kill()
    assert statistics.median(took) < 1, took


def _marks(share: Mount) -> int:
    status = json.loads((share.mountpoint / ".fsd/status").read_text())
    return sum(guest["marks"] for guest in status["guests"] if guest["kind"] == "mount")


# Taken back


def test_what_a_guest_removes_wakes_no_thread(share: Mount) -> None:
    """Its kernel knows that. The thread of the notifier would take turns with the server's."""

    def turns() -> int:
        tasks = Path(f"/proc/{share.process.pid}/task").iterdir()
        states = [task.joinpath("status").read_text() for task in tasks if
                  task.name != str(share.process.pid)]  # fmt: skip
        return sum(int(re.findall(r"^voluntary_ctxt_switches:\t(\d+)", s, re.M)[0]) for s in states)

    for number in range(20):
        (share.source / f"t/{number}").mkdir(parents=True)
        (share.source / f"t/{number}/file").touch()
    subprocess.run(["ls", "-lR", share.mountpoint / "t"], stdout=subprocess.DEVNULL, check=True)
    assert cache(share)["directories"] >= 21
    wait_until(lambda: cache(share)["settled"])
    time.sleep(0.1)  # until what was just made is taken back a second time
    before = turns()
    subprocess.run(["rm", "-r", share.mountpoint / "t"], check=True)
    wait_until(lambda: cache(share)["directories"] <= 1)
    assert turns() - before < 20


def names_of(rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample(NAMES, 2)
    return f"{rng.choice(['', 'a/', 'b/', 'a/c/'])}{one}", f"{rng.choice(['', 'a/', 'b/'])}{other}"


def change(top: Path, rng: random.Random) -> str:
    """One random change below ``top``; returns which."""
    one, other = names_of(rng)
    path, path2 = top / one, top / other
    kinds: list[tuple[str, Callable[[], Any]]] = [
        ("write", lambda: path.write_bytes(rng.randbytes(rng.choice([0, 5, 5, 5000])))),
        ("append", lambda: _append(path)),
        ("same size", lambda: _rewrite(path)),
        ("replace", lambda: _replace(path, rng)),
        ("unlink", path.unlink),
        ("mkdir", path.mkdir),
        ("rmdir", path.rmdir),
        ("rename", lambda: path.rename(path2)),
        ("link", lambda: os.link(path, path2, follow_symlinks=False)),
        ("symlink", lambda: path.symlink_to(other)),
        ("chmod", lambda: path.chmod(rng.choice([0o600, 0o644, 0o755]))),
        ("truncate", lambda: os.truncate(path, rng.choice([0, 3]))),
        ("utime", lambda: os.utime(path, (1, rng.randrange(10**9)))),
        ("move directory", lambda: (top / "a").rename(top / "z")),
        ("move it back", lambda: (top / "z").rename(top / "a")),
    ]
    weights = [6, 3, 3, 3, 5, 2, 2, 5, 0 if rng.random() < 0.5 else 2, 2, 3, 2, 2, 1, 2]
    ((name, call),) = rng.choices(kinds, weights)
    attempt(call)
    return f"{name} {one} {other}"


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(bytes(byte ^ 1 for byte in data))


def _replace(path: Path, rng: random.Random) -> None:
    new = path.with_name("new")
    new.write_bytes(rng.randbytes(5))
    new.rename(path)


@pytest.mark.parametrize("guests", [0.0, 0.3], ids=["host", "host and guest"])
@pytest.mark.parametrize("seed", range(2))
def test_every_change_is_seen(share: Mount, seed: int, guests: float) -> None:
    """After each random change, the whole tree is as the host has it."""
    rng = random.Random(seed)
    for name in ("a", "b", "a/c"):
        (share.source / name).mkdir()
    tops = ["", "a", "b", "a/c", "z", "z/c"]
    places = tops[1:] + [f"{top}/{name}".lstrip("/") for top in tops for name in NAMES]
    done = []
    for step in range(STEPS):
        side = share.mountpoint if rng.random() < guests else share.source
        done.append(f"{step} {side.name}: {change(side, rng)}")
        if rng.random() < 0.5:  # only a few names: others stay kept
            agree(share, rng.sample(places, 4), " | ".join(done[-4:]))
        else:
            agree(share, places, " | ".join(done[-4:]))


def test_an_open_file_shows_new_data(share: Mount) -> None:
    path = share.source / "file"
    path.write_bytes(bytes(10_000))
    with open(share.mountpoint / "file", "rb", buffering=0) as file:
        for number in range(1, 200):
            with open(path, "r+b") as writer:
                writer.seek(number * 7)
                writer.write(bytes([number]))
            wait_until(partial(_shows, file.fileno(), number))
            assert os.pread(file.fileno(), 10_000, 0) == path.read_bytes()


def test_the_end_is_the_hosts_right_after_an_append(share: Mount) -> None:
    """Whatever the kernel keeps of the file's attributes, and is just told of them."""
    for number in range(100):
        name = f"log{number}"
        (share.source / name).write_text("one ")
        fd = os.open(share.mountpoint / name, os.O_WRONLY | os.O_APPEND)
        try:
            with (share.source / name).open("a") as host:
                host.write("the host's ")
            os.write(fd, b"two")
            assert os.lseek(fd, 0, os.SEEK_END) == len(b"one the host's two")
        finally:
            os.close(fd)


def test_an_open_file_with_several_names_shows_new_data_at_once(share: Mount) -> None:
    """It may be changed by the other one, elsewhere, and twice in one tick of its mtime."""
    (share.source / "one").write_bytes(bytes(8))
    os.link(share.source / "one", share.source / "two")
    with (
        open(share.source / "two", "r+b", buffering=0) as host,
        open(share.mountpoint / "one", "rb", buffering=0) as file,
    ):
        for number in range(300):
            os.pwrite(host.fileno(), number.to_bytes(8, "big"), 0)
            assert int.from_bytes(os.pread(file.fileno(), 8, 0), "big") == number
        with mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == (299).to_bytes(8, "big")


def _shows(fd: int, number: int) -> bool:
    return os.pread(fd, 1, number * 7) == bytes([number])


def test_what_is_written_through_a_mapping_is_seen_at_its_close(share: Mount) -> None:
    path = share.source / "file"
    path.write_bytes(bytes(4096))
    assert (share.mountpoint / "file").read_bytes() == bytes(4096)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
        mapping[:4] = b"data"
    wait_until(lambda: (share.mountpoint / "file").read_bytes()[:4] == b"data")


def test_what_is_only_written_is_not_kept(share: Mount) -> None:
    """Nothing is taken back for it: an open that reads drops what the kernel has of it."""
    path, seen = share.source / "file", share.mountpoint / "file"
    fd = os.open(seen, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(fd, bytes(5000))
        before = cache(share)["contents"]
        for number in range(1, 50):
            with open(path, "r+b") as writer:  # in the page that the guest has written
                writer.seek(number)
                writer.write(bytes([number]))
            os.pwrite(fd, b"x", 4999 - number)
            assert cache(share)["contents"] == before == 0
        assert seen.read_bytes() == path.read_bytes()
        assert cache(share)["contents"] == 1
        with open(seen, "rb", buffering=0) as reader:
            for number in range(50, 100):
                path.write_bytes(bytes([number]) * 5000)
                os.pwrite(fd, b"x", 4999 - number)
                wait_until(lambda: os.pread(reader.fileno(), 5000, 0) == path.read_bytes())
    finally:
        os.close(fd)


def test_a_file_with_other_names_is_not_kept(share: Mount) -> None:
    (share.source / "one").write_text("data")
    (share.source / "elsewhere").mkdir()
    os.link(share.source / "one", share.source / "elsewhere/two")
    assert (share.mountpoint / "one").read_text() == "data"
    assert cache(share)["short"]["other links"]
    for number in range(50):
        (share.source / "elsewhere/two").write_text(f"{number}")
        assert (share.mountpoint / "one").read_text() == f"{number}"


def test_a_file_that_has_moved_is_not_kept(share: Mount) -> None:
    """Its changes are events of a directory into which nobody has looked."""
    (share.source / "elsewhere").mkdir()
    (share.source / "file").write_bytes(b"")
    with open(share.mountpoint / "file", "rb") as file:
        os.fstat(file.fileno())
        (share.source / "file").rename(share.source / "elsewhere/file")
        wait_until(lambda: not (share.mountpoint / "file").exists())
        for size in range(1, 50):
            (share.source / "elsewhere/file").write_bytes(bytes(size))
            assert os.fstat(file.fileno()).st_size == size


def test_what_a_user_may_not_see_is_there_for_root(share: Mount) -> None:
    """Nobody else finds the hidden directory, and the kernel does not keep that."""
    if os.geteuid() != 0:
        pytest.skip("another user's view, which only root can take")
    share.mountpoint.parent.chmod(0o755)
    place = str(share.mountpoint / ".fsd")
    looking = ["setpriv", "--reuid=1000", "--clear-groups", "ls", place]
    for _ in range(2):
        assert subprocess.run(looking, capture_output=True, check=False).returncode
        assert (share.mountpoint / ".fsd/status").exists()


def test_a_mount_on_the_host_is_seen(share: Mount) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts, which only root can")
    (share.source / "d").mkdir()
    (share.source / "d/file").write_text("below")
    assert (share.mountpoint / "d/file").read_text() == "below"
    subprocess.run(["mount", "-t", "tmpfs", "none", share.source / "d"], check=True)
    try:
        wait_until(lambda: os.listdir(share.mountpoint / "d") == [])
        assert not (share.mountpoint / "d/file").exists()
    finally:
        subprocess.run(["umount", share.source / "d"], check=True)
    wait_until(lambda: (share.mountpoint / "d/file").exists())


def test_a_stopped_server_shows_the_change_when_it_continues(share: Mount) -> None:
    (share.source / "file").write_text("old")
    assert (share.mountpoint / "file").read_text() == "old"
    os.kill(share.process.pid, signal.SIGSTOP)
    try:
        (share.source / "file").write_text("newer")
        (share.source / "other").write_text("new")
    finally:
        os.kill(share.process.pid, signal.SIGCONT)
    wait_until(lambda: (share.mountpoint / "file").read_text() == "newer")
    assert (share.mountpoint / "other").exists()


def test_lost_events_take_everything_back(share: Mount) -> None:
    """While the server is stopped, more happens than the host's kernel queues."""
    directory = share.source / "d"
    directory.mkdir()
    places = [f"d/{number}" for number in range(50)]
    for place in places:
        (share.source / place).write_text("old")
    agree(share, places, "the start")
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    os.kill(share.process.pid, signal.SIGSTOP)
    try:
        for number in range(limit // 2 + 100):
            os.close(os.open(directory / f"x{number % 1000}", os.O_CREAT | os.O_WRONLY))
            os.unlink(directory / f"x{number % 1000}")
        for place in places:
            (share.source / place).write_text("new data")
    finally:
        os.kill(share.process.pid, signal.SIGCONT)
    agree(share, places, "the overflow")


def test_a_few_directories_are_enough(tmp_path: Path) -> None:
    """Beyond the limit, the directory that was not used for longest is given up."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    mountpoint.mkdir()
    places = [f"d{number}/file" for number in range(60)]
    for place in places:
        (source / place).parent.mkdir(parents=True)
        (source / place).write_text("old")
    with mounted(source, mountpoint, "--cache=coherent", "--max-watches=20") as share:
        agree(share, places, "the start")
        assert cache(share)["directories"] <= 20
        for place in places:
            (source / place).write_text("new data")
        agree(share, places, "the change")


def test_no_notification_waits_for_its_own_answer(share: Mount) -> None:
    """Look-ups, creations, removals and reads in the directory and file of which names and data are
    taken back: the kernel's locks are held by those who wait for the server.
    """
    seen, host = share.mountpoint, share.source
    (host / "file").write_bytes(bytes(100_000))
    stop = threading.Event()
    done = [0, 0, 0, 0]

    def repeat(index: int, call: Callable[[int], Any]) -> None:
        while not stop.is_set():
            attempt(lambda: call(done[index]))
            done[index] += 1

    def make(number: int) -> None:
        (seen / f"n{number % 7}").write_text("guest")
        (seen / f"n{number % 7}").unlink()

    threads = [
        threading.Thread(target=repeat, args=(index, call))
        for index, call in enumerate(
            (
                make,
                lambda number: (seen / f"n{number % 7}").stat(),
                lambda _: (seen / "file").read_bytes(),
                lambda _: os.listdir(seen),
            )
        )
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 4
    number = 0
    while time.monotonic() < end:
        number += 1
        with suppress(OSError):
            (host / f"n{number % 7}").write_text("host")
        attempt((host / f"n{(number + 3) % 7}").unlink)
        with open(host / "file", "r+b") as file:
            file.seek(number % 100_000)
            file.write(b"x")
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "the kernel and the server wait for each other"
    assert all(done), done
    agree(share, ["file", *(f"n{number}" for number in range(7))], "the end")
