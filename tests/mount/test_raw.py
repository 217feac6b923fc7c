"""The same over the /dev/fuse transport, whose session is also the virtual machines': the POSIX map
without exclusions, locks between processes, and what only this transport can do.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from harness.mounts import Mount, command, mounted, wait_until
from tests.mount.posix_cases import CASES, run_case
from tests.mount.posix_parameters import PARAMETERS
from tests.mount.posix_support import ALICE, Child, User, fails, in_child, opened, write
from tests.mount.sides import Sides, two_sides

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mount(2) on /dev/fuse")


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    with two_sides("--raw") as both:
        yield both


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Mount]:
    """A mount of its own, with an agent."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, "--raw") as made:
        yield made


@pytest.mark.parametrize(("name", "user"), PARAMETERS)
def test_posix(name: str, user: User | None, sides: Sides) -> None:
    d, host = sides.mount.mountpoint / name, sides.mount.source / name
    try:
        run_case(CASES[name], d, host, user)
    finally:
        sides.check_alive()
        shutil.rmtree(d)
    assert not host.exists()


# -- locks between processes -----------------------------------------------------------------------


def test_a_waiting_lock_blocks_nobody_else(place: tuple[Path, Path]) -> None:
    d, _ = place
    f = write(d / "f", b"data")

    def take() -> None:
        with opened(f, os.O_RDWR) as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX)  # waits
            os.pwrite(fd, b"taken", 0)

    with opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        children = [Child(take) for _ in range(3)]
        time.sleep(0.3)  # they wait by now; if not, nothing is lost but the point
        begun = time.monotonic()
        for i in range(50):
            write(d / f"other{i}").unlink()
        assert time.monotonic() - begun < 5
        assert f.read_bytes() == b"data"
        begun = time.monotonic()
        fcntl.lockf(fd, fcntl.LOCK_UN)
        for child in children:
            child.join()
    assert f.read_bytes() == b"taken"
    assert time.monotonic() - begun < 5


def test_a_killed_process_waits_no_more(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f")
    with opened(host / "f", os.O_RDWR) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = subprocess.Popen(["flock", f, "true"])
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(5) == -signal.SIGTERM


def test_locks_are_the_hosts(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f", b"data")
    with opened(f, os.O_RDWR) as fd, opened(host / "f", os.O_RDWR) as other:
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
        with fails(errno.EAGAIN):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 15)
        with fails(errno.EAGAIN):
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 15)
        fcntl.flock(other, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_closing_any_descriptor_of_a_file_drops_a_process_s_locks(
    place: tuple[Path, Path],
) -> None:
    d, host = place
    f = write(d / "f", b"data")
    with opened(host / "f", os.O_RDWR) as other, opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with opened(f):
            pass
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(other, fcntl.LOCK_UN)


def test_who_holds_a_lock(place: tuple[Path, Path]) -> None:
    d, _ = place
    f = write(d / "f", b"data")
    with opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 2, 1)
        mine = os.getpid()

        def ask() -> None:
            with opened(f, os.O_RDWR) as other:
                question = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                answer = fcntl.fcntl(other, fcntl.F_GETLK, question)
                assert struct.unpack("@hhqqi4x", answer) == (fcntl.F_WRLCK, 0, 1, 2, mine)

        in_child(ask)


# -- data ------------------------------------------------------------------------------------------


def test_copy_file_range(place: tuple[Path, Path]) -> None:
    d, host = place
    content = os.urandom(3_000_000)
    source = write(d / "source", content)
    with opened(source) as fd, opened(d / "target", os.O_RDWR | os.O_CREAT) as target:
        copied = 0
        while step := os.copy_file_range(fd, target, 10_000_000):
            copied += step
        assert copied == len(content)
    assert (host / "target").read_bytes() == content


def test_a_shared_mapping(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f", bytes(100_000))
    with opened(f, os.O_RDWR) as fd, mmap.mmap(fd, 0) as mapped:
        mapped[50_000:50_005] = b"hello"
        mapped.flush()
    assert (host / "f").read_bytes()[50_000:50_005] == b"hello"


def test_a_temporary_file_gets_a_name(place: tuple[Path, Path]) -> None:
    d, host = place
    with opened(d, os.O_TMPFILE | os.O_RDWR) as fd:
        os.write(fd, b"data")
        assert os.listdir(host) == []
        with opened(d) as directory:  # without dst_dir_fd Python does not follow the link
            os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=directory, follow_symlinks=True)
        assert os.fstat(fd).st_nlink == 1
    assert (host / "named").read_bytes() == b"data"


def test_time_of_birth(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f")
    done = subprocess.run(["stat", "-c", "%W", f, host / "f"], capture_output=True, check=True)
    mine, native = map(int, done.stdout.split())
    assert mine == native > 0


def test_flags_of_a_file(place: tuple[Path, Path]) -> None:
    d, host = place
    f = write(d / "f")
    subprocess.run(["chattr", "+A", f], check=True)
    lines = [
        subprocess.run(["lsattr", path], capture_output=True, check=True).stdout.split()
        for path in (f, host / "f")
    ]
    assert b"A" in lines[0][0]
    assert lines[0][0] == lines[1][0]
    in_child(lambda: _may_not_set_flags(f), ALICE)


def _may_not_set_flags(path: Path) -> None:
    with opened(path) as fd, fails(errno.EPERM, errno.EACCES):
        fcntl.ioctl(fd, 0x4008_6602, struct.pack("q", 0))


# -- events ----------------------------------------------------------------------------------------


def test_inotifywait_sees_the_host(share: Mount) -> None:
    (share.source / "d").mkdir()
    with subprocess.Popen(
        ["inotifywait", "-m", "-r", "--format", "%w%f %e", share.mountpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        try:
            share.wait_armed(share.mountpoint / "d", pid=watcher.pid)
            (share.source / "d" / "f").write_bytes(b"x")
            (share.source / "d" / "f").rename(share.source / "g")
            (share.source / "g").unlink()
            lines = [watcher.stdout.readline() for _ in range(7)]
        finally:
            watcher.terminate()
    root = share.mountpoint
    assert lines == [
        f"{root}/d/f CREATE\n",
        f"{root}/d/f OPEN\n",
        f"{root}/d/f MODIFY\n",
        f"{root}/d/f CLOSE_WRITE,CLOSE\n",
        f"{root}/d/f MOVED_FROM\n",
        f"{root}/g MOVED_TO\n",
        f"{root}/g DELETE\n",
    ]


def test_a_killed_agent_is_replaced(share: Mount) -> None:
    agents = _agents(share)
    os.kill(agents[0], signal.SIGKILL)
    wait_until(lambda: set(_agents(share)) - set(agents), 10, "another agent")
    with subprocess.Popen(
        ["inotifywait", "-q", "-e", "create", share.mountpoint],
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "new").touch()
        assert watcher.communicate(timeout=10)[0] == f"{share.mountpoint}/ CREATE new\n"


def _agents(share: Mount) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"agent" in words and os.fsencode(share.mountpoint) in words:
                found.append(int(path.parent.name))
    return found


def test_status(share: Mount) -> None:
    done = subprocess.run([command("fsd"), "status", share.mountpoint], capture_output=True)
    assert done.returncode == 0
