"""`fsd mount --passthrough=auto`: the kernel moves file data itself, and everything else stays."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from harness.mounts import Mount, mounted, wait_until
from protocol.masks import EVENTS, Mask, names

from .observing import guests, the_mount
from .test_around_marks import ALL, watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's mounts have it")
DATA = Mask.OPEN | Mask.ACCESS | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
QUIET = 0.3


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Mount]:
    with serving(tmp_path, f"--socket={tmp_path / 'socket'}") as served:
        yield served


@contextmanager
def serving(tmp_path: Path, *options: str) -> Iterator[Mount]:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--passthrough=auto", *options) as served:
        yield served


def state(share: Mount) -> dict[str, Any]:
    """What `fsd status` shows of it."""
    shown = the_mount(share.mountpoint)["passthrough"]
    assert shown is not None
    return dict(shown)


# Data


@pytest.mark.parametrize("cache", ["never", "coherent"])
def test_data_needs_no_request(tmp_path: Path, cache: str) -> None:
    data = random.Random(1).randbytes(1 << 20)
    with serving(tmp_path, f"--cache={cache}") as share:
        with open(share.mountpoint / "f", "wb+", buffering=0) as file:
            assert state(share)["files"] == 1
            kept = cache == "coherent"  # its watch on the directory
            wait_until(lambda: _watches(share) == kept, 10, "no watch for marks on the directory")
            before = _calls(share)
            for start in range(0, len(data), 512):
                assert os.pwrite(file.fileno(), data[start : start + 512], start) == 512
            for start in range(0, len(data), 512):
                assert os.pread(file.fileno(), 512, start) == data[start : start + 512]
            assert _calls(share) - before < 500  # of 4096 calls
        assert (share.source / "f").read_bytes() == data
        assert state(share)["opens"] == 1
        wait_until(lambda: not state(share)["files"], 5, "its end")


def _calls(share: Mount) -> int:
    """By which the server has read or written so far: each request makes some."""
    text = Path(f"/proc/{share.process.pid}/io").read_text()
    counts = dict(line.split(": ") for line in text.splitlines())
    return int(counts["syscr"]) + int(counts["syscw"])


def _watches(share: Mount) -> int:
    text = ""
    for info in Path(f"/proc/{share.process.pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            text += info.read_text()
    return text.count("inotify wd:") + text.count("fanotify ino:")


def test_off_means_off(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--passthrough=off") as share:
        (mountpoint / "f").write_bytes(b"data")
        assert the_mount(share.mountpoint)["passthrough"] is None


def _flags(rng: random.Random) -> int:
    mode = rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
    more = rng.choice((0, 0, 0, os.O_APPEND, os.O_APPEND, os.O_DSYNC, os.O_TRUNC, os.O_NOATIME))
    return mode | (more if mode != os.O_RDONLY or more == os.O_NOATIME else 0)


class Program:
    """Uses one file through many descriptors: through the mount, and on the host."""

    def __init__(self, here: Path, there: Path) -> None:
        self.paths = here / "f", there / "f"
        self.paths[1].write_bytes(b"0123456789" * 1000)
        self.open: list[tuple[int, int]] = []
        self.maps: list[mmap.mmap] = []

    def step(self, rng: random.Random) -> Any:
        """One call; what the program sees of it."""
        what, place, pick = rng.randrange(12), rng.randrange(9000), rng.random()
        size, byte, where = rng.randrange(1, 6000), rng.randbytes(1), rng.random() < 0.3
        flags, append = _flags(rng), rng.random() < 0.5
        if what == 0 or not self.open:
            self.open.append((os.open(self.paths[where], flags), flags))
            return None
        fd, mode = self.open[int(pick * len(self.open))]
        reads, writes = mode & os.O_ACCMODE != os.O_WRONLY, mode & os.O_ACCMODE != os.O_RDONLY
        if what == 1 and len(self.open) > 6:
            self.open.remove((fd, mode))
            return os.close(fd)
        if what == 2 and writes:
            return os.ftruncate(fd, place)
        if what == 3:
            before = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_APPEND
            return fcntl.fcntl(fd, fcntl.F_SETFL, before | (os.O_APPEND if append else 0))
        if what == 4 and mode & os.O_ACCMODE == os.O_RDWR and os.fstat(fd).st_size:
            shared = mmap.mmap(fd, 0)
            shared[place % len(shared)] = byte[0]
            self.maps.append(shared)
            if len(self.maps) > 3:
                self.maps.pop(0).close()
            return None
        if what in (5, 6, 7, 8) and writes:
            os.lseek(fd, place, os.SEEK_SET)
            written = os.write(fd, byte * size)
            appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
            # After an append the kernel sets the position by the end that it knows.
            return written, None if appends else os.lseek(fd, 0, os.SEEK_CUR)
        if what == 9 and writes:
            return os.posix_fallocate(fd, place, size)
        if reads:
            return os.pread(fd, size, place)
        return os.fstat(fd).st_size, os.lseek(fd, 0, os.SEEK_END)

    def close(self) -> None:
        """The end."""
        for shared in self.maps:
            shared.close()
        for fd, _ in self.open:
            os.close(fd)


@pytest.mark.parametrize(
    ("cache", "seed"),
    [*itertools.product(["never"], range(8)), *[("coherent", n) for n in range(4)]],
)
def test_each_call_returns_the_same_as_natively(tmp_path: Path, cache: str, seed: int) -> None:
    """Whatever is open at the same time, this way and others: no call fails, all see one file."""
    native = tmp_path / "native"
    native.mkdir()
    with serving(tmp_path, f"--cache={cache}") as share:
        here, other = Program(share.mountpoint, share.source), Program(native, native)
        for number in range(400):
            rng, same = random.Random(1000 * seed + number), random.Random(1000 * seed + number)
            assert here.step(rng) == other.step(same), f"step {number}"
            if cache == "coherent":  # the host's change is seen within about a millisecond
                wait_until(lambda: _is_settled(share))
        here.close()
        other.close()
        assert (share.source / "f").read_bytes() == (native / "f").read_bytes()
        shown = state(share)
        assert shown["opens"]
        assert shown["not_so"]
        wait_until(lambda: not state(share)["files"], 5, "its end")


def _is_settled(share: Mount) -> bool:
    return bool(the_mount(share.mountpoint)["cache"]["settled"])


def test_files_by_reason(share: Mount) -> None:
    """Which files the server moves data of, and why."""
    there, here = share.source, share.mountpoint
    (there / "f").write_bytes(b"data")
    (there / "suid").write_bytes(b"data")
    (there / "suid").chmod(0o4755)
    (there / "more").symlink_to("f")
    for name, flags, reason in (
        ("f", os.O_RDWR, ""),
        ("more", os.O_RDONLY, ""),
        ("f", os.O_WRONLY | os.O_APPEND, "appends"),
        ("f", os.O_RDONLY | os.O_DIRECT, "direct I/O"),
        ("suid", os.O_WRONLY, "set-user-ID or set-group-ID"),
        ("suid", os.O_RDONLY, ""),
    ):
        before = state(share)
        os.close(os.open(here / name, flags))
        after = state(share)
        assert after["opens"] == before["opens"] + (not reason), name
        if reason:
            assert after["not_so"][reason] == before["not_so"].get(reason, 0) + 1
    with watch() as marks:
        marks.add(here, int(Mask.MODIFY))
        share.wait_armed(here, pid=os.getpid())
        with open(here / "f", "r+b"):
            assert state(share)["not_so"]["watched"]
        marks.add(here, int(Mask.CREATE | Mask.DELETE))


def test_no_set_user_id_survives_a_write(share: Mount) -> None:
    """Not even if it came while the file was open."""
    path = share.mountpoint / "f"
    path.write_bytes(b"data")
    path.chmod(0o666)
    share.mountpoint.chmod(0o755)
    program = (
        "import os; fd = os.open('f', os.O_WRONLY); print(flush=True); input();os.write(fd, b'x')"
    )
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program], cwd=share.mountpoint,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=1234, group=1234,
    ) as user:  # fmt: skip
        assert user.stdout is not None
        user.stdout.readline()
        assert state(share)["files"] == 1
        (share.source / "f").chmod(0o6777)
        user.communicate(b"\n")
    assert (share.source / "f").stat().st_mode & 0o7777 == 0o777


def test_a_share_on_a_stacked_file_system(tmp_path: Path) -> None:
    """The kernel refuses such backing files; then the server moves the data."""
    for name in ("lower", "upper", "work", "source", "mount"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, source], check=True)
    try:
        with mounted(source, mountpoint, "--passthrough=auto") as share:
            (mountpoint / "f").write_bytes(b"data")
            assert (mountpoint / "f").read_bytes() == b"data"
            assert not state(share)["opens"]
            assert state(share)["disabled"] or state(share)["not_so"]
    finally:
        subprocess.run(["umount", source], check=True)


# Events

Case = Callable[[Path, Path], Any]


def both(case: Case, share: Mount, tmp_path: Path) -> tuple[Any, Any]:
    """What a case sees natively and through the mount."""
    native = tmp_path / "native"
    native.mkdir()
    (share.source / "d").mkdir()
    with ThreadPoolExecutor(1) as other:
        natively = other.submit(case, native, native)
        return natively.result(), case(share.mountpoint / "d", share.source / "d")


def use(path: Path) -> None:
    """As programs use files."""
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY, os.O_WRONLY | os.O_TRUNC):
        fd = os.open(path, flags)
        time.sleep(0.05)
        if flags & os.O_ACCMODE:
            os.write(fd, b"data")
            time.sleep(0.05)
        if flags & os.O_ACCMODE != os.O_WRONLY:
            os.pread(fd, 10, 0)
            time.sleep(0.05)
        os.close(fd)
        time.sleep(0.05)


def text(event: Any) -> str:
    return f"{'|'.join(names(event.mask & int(EVENTS))).upper()} {os.fsdecode(event.name)}".strip()


def merged(events: Iterable[str]) -> list[str]:
    """Those of files, as a queue that is not read merges them."""
    files = (event for event in events if "ISDIR" not in event)
    return [event for event, _ in itertools.groupby(files)]


def test_an_observer_gets_each_event_once(share: Mount, tmp_path: Path) -> None:
    (share.source / "d").mkdir()
    native = tmp_path / "native"
    native.mkdir()
    with guests(tmp_path / "socket", 1) as (observer,), watch() as marks:
        observer.mark(b"d", ALL)
        marks.add(native, ALL)
        for _ in range(3):
            use(native / "f")
            use(share.mountpoint / "d/f")
        wanted = merged(marks.read())

        def seen() -> list[str]:
            return merged(map(text, observer.take()))

        wait_until(lambda: len(seen()) >= len(wanted), 10, "events")
        time.sleep(QUIET)
        assert seen() == wanted
    assert state(share)["opens"] >= 9


@pytest.mark.parametrize("on", ["directory", "file", "both"])
def test_a_mark_that_comes_while_it_is_open(share: Mount, tmp_path: Path, on: str) -> None:
    """The guest's own use of the file is not delivered once more, and what the host does is."""

    def case(here: Path, there: Path) -> list[str]:
        fd = os.open(here / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"begin")
        time.sleep(QUIET)  # a mark may get what was right before it (README)
        events = []
        with watch() as marks, ExitStack() as stack:
            if on != "file":
                marks.add(here, int(DATA), "d")
            if on != "directory":
                marks.add(here / "f", int(DATA), "f")
            time.sleep(QUIET)
            for number in range(12):
                if number % 3 == 0:
                    os.write(fd, b"own")
                elif number % 3 == 1:
                    os.pread(fd, 3, 0)
                else:
                    host = stack.enter_context(open(there / "f", "r+b", buffering=0))
                    host.write(b"host")
                events += marks.read(quiet=QUIET)
            os.close(fd)
            return events + marks.read(quiet=QUIET)

    native, mount = both(case, share, tmp_path)
    assert mount == native
    assert state(share)["opens"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_writers_on_both_sides(share: Mount, tmp_path: Path, seed: int) -> None:
    """A mark for MODIFY while a file is open; random steps, with whatever merges in the queue read
    out between them.
    """

    def case(here: Path, there: Path) -> list[str]:
        rng = random.Random(seed)
        fds = [os.open(here / "f", os.O_RDWR | os.O_CREAT)]
        hosts = [os.open(there / "f", os.O_RDWR)]
        events = []
        with watch() as marks:
            marks.add(here, int(Mask.MODIFY | Mask.CLOSE_WRITE))
            time.sleep(QUIET)
            for _ in range(30):
                what = rng.randrange(5)
                if what == 0:
                    os.write(fds[-1], b"own")
                elif what == 1:
                    os.write(hosts[-1], b"host")
                elif what == 2:
                    os.ftruncate(rng.choice((fds[-1], hosts[-1])), rng.randrange(100))
                elif what == 3:
                    fds.append(os.open(here / "f", os.O_RDWR))
                else:
                    os.close(hosts.pop()) if len(hosts) > 1 else hosts.append(
                        os.open(there / "f", os.O_RDWR)
                    )
                events.append(marks.read(quiet=0.12))
        for fd in (*fds, *hosts):
            os.close(fd)
        return list(itertools.chain.from_iterable(events))

    native, mount = both(case, share, tmp_path)
    assert mount == native


def test_the_host_renames_and_removes_what_is_open(share: Mount, tmp_path: Path) -> None:
    """Own use of it is not the host's, whatever it is called."""

    def case(here: Path, there: Path) -> list[str]:
        fd = os.open(here / "f", os.O_RDWR | os.O_CREAT)
        events = []
        with watch() as marks:
            marks.add(here, int(Mask.MODIFY | Mask.MOVED_FROM | Mask.MOVED_TO))
            time.sleep(QUIET)
            (there / "f").rename(there / "g")
            events += marks.read(quiet=QUIET)
            os.write(fd, b"own")
            events += marks.read(quiet=QUIET)
            (there / "f").write_bytes(b"another")
            events += marks.read(quiet=QUIET)
            (there / "g").unlink()
            events += marks.read(quiet=QUIET)
            os.write(fd, b"own")
            events += marks.read(quiet=QUIET)
            (there / "f").write_bytes(b"the host's")
            events += marks.read(quiet=QUIET)
        os.close(fd)
        return events

    native, mount = both(case, share, tmp_path)
    assert merged(mount) == merged(native)


def test_what_the_host_repeats_is_delivered_each_time(share: Mount, tmp_path: Path) -> None:
    """The group merges equal events also where the queue has others between them."""

    def case(here: Path, there: Path) -> list[str]:
        fd = os.open(here / "f", os.O_RDWR | os.O_CREAT)
        with watch() as marks:
            marks.add(here, int(Mask.OPEN | Mask.MODIFY | Mask.CLOSE_WRITE))
            time.sleep(QUIET)
            for _ in range(5):
                (there / "f").open("ab").close()
                with open(there / "f", "ab") as file:
                    file.write(b"host")
            events = marks.read(quiet=1)
        os.close(fd)
        return events

    native, mount = both(case, share, tmp_path)
    assert mount == native
    assert len(native) == 25


def test_many_opens_while_an_observer_watches(share: Mount, tmp_path: Path) -> None:
    """The kernel's own opens and closes are nobody's, however close to the next."""
    (share.source / "d").mkdir()
    (share.source / "d/f").write_bytes(b"data")
    with guests(tmp_path / "socket", 1) as (observer,):
        observer.mark(b"d", int(Mask.CLOSE_NOWRITE | Mask.CREATE))
        for _ in range(300):
            os.close(os.open(share.mountpoint / "d/f", os.O_RDONLY))
        (share.source / "d/end").touch()
        wait_until(lambda: "CREATE end" in map(text, observer.take()), 10, "the last event")
        time.sleep(QUIET)
        closes = [event for event in map(text, observer.take()) if event == "CLOSE_NOWRITE f"]
        assert len(closes) == 300
    shown = state(share)
    assert shown["opens"] == 300


def test_the_agent_opens_beside(share: Mount) -> None:
    """It replays the host's opening of a file that is open this way."""
    (share.source / "f").write_bytes(b"data")
    with open(share.mountpoint / "f", "r+b", buffering=0) as file, watch() as marks:
        marks.add(share.mountpoint / "f", int(DATA))
        share.wait_armed(share.mountpoint / "f", pid=os.getpid())
        for _ in range(5):
            (share.source / "f").read_bytes()
            # A CLOSE may come once too often (docs/decisions/passthrough.md).
            assert "OPEN" in marks.read(until="OPEN")
        assert file.read() == b"data"


@pytest.mark.parametrize("option", ["auto", "off"])
def test_the_host_sees_each_open_twice(tmp_path: Path, option: str) -> None:
    """The server's, and the kernel's; what is done with the data once."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    (source / "f").write_bytes(b"")
    with mounted(source, mountpoint, f"--passthrough={option}"), watch() as marks:
        marks.add(source / "f", int(DATA))
        seen: list[str] = []
        rounds = extra = 0
        while rounds < 10 or (option == "auto" and not extra and rounds < 200):
            rounds += 1
            fd = os.open(mountpoint / "f", os.O_WRONLY)
            seen += marks.read(quiet=0.05)
            os.write(fd, b"data")
            seen += marks.read(quiet=0.05)
            os.close(fd)
            seen += marks.read(quiet=0.05)
            opens, closes = seen.count("OPEN"), seen.count("CLOSE_WRITE")
            extra = opens + closes - 2 * rounds
    assert seen.count("MODIFY") == rounds
    if option == "off":
        assert (opens, closes) == (rounds, rounds)
    else:  # two that nobody reads in between are one: on a busy machine nearly all
        assert 0 < extra <= 2 * rounds, (opens, closes)
