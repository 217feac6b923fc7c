"""README's table of what differs from a local directory: each row's difference is really there, and
the tests that the table names exist. A test here that fails means that its row has to go.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest_tools.watcher import notify
from harness.mounts import Mount, mounted, wait_until
from protocol.inotify import parse_events
from protocol.masks import Mask, describe
from tests.clients.watchers import kernel_marks
from tests.mount.observing import the_mount
from tests.mount.posix_support import fails, opened, write
from tests.protocol import kernel

ROOT = Path(__file__).parents[2]
COLUMNS = ["what", "affects", "what to do", "shown by"]
FAN_REPORT_FID = 0x200

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


@pytest.fixture(params=["devfuse", "libfuse"])
def share(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mount]:
    """A share whose data goes through the server, on either transport."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    options = f"--transport={request.param}", "--passthrough=off"
    with mounted(source, mountpoint, *options) as share:
        yield share


def table() -> list[list[str]]:
    _, _, part = (ROOT / "README.md").read_text().partition("## What does not\n")
    part, _, _ = part.partition("\n## ")
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_names_tests_that_exist() -> None:
    rows = table()
    assert rows[0] == COLUMNS
    assert {len(row) for row in rows} == {len(COLUMNS)}, "a row has other columns"
    assert len(rows) > 15
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows[2:]:
        for name in re.findall(r"`(\w+)`", row[3]):
            assert f"def test_{name}(" in text, f"{row[0]}: there is no test_{name}"


def test_every_difference_here_has_a_row() -> None:
    named = {name for row in table() for name in re.findall(r"`(\w+)`", row[3])}
    here = set(re.findall(r"^def test_(\w+)\(share", Path(__file__).read_text(), re.MULTILINE))
    assert here <= named


# -- objects that live in one kernel ---------------------------------------------------------------


@root_only
def test_a_fifo_does_not_lead_across(share: Mount) -> None:
    os.mkfifo(share.source / "p")
    with opened(share.source / "p", os.O_RDONLY | os.O_NONBLOCK):
        os.close(os.open(share.source / "p", os.O_WRONLY | os.O_NONBLOCK))  # the host has a reader
        with fails(errno.ENXIO):
            os.open(share.mountpoint / "p", os.O_WRONLY | os.O_NONBLOCK)


@root_only
def test_a_socket_does_not_lead_across(share: Mount) -> None:
    # Addresses have 108 bytes: short ones, relative to the descriptor of the directory.
    with (
        opened(share.source) as host,
        opened(share.mountpoint) as guest,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as peer,
    ):
        listener.bind(f"/proc/self/fd/{host}/s")
        listener.listen()
        with fails(errno.ECONNREFUSED):
            peer.connect(f"/proc/self/fd/{guest}/s")
        peer.connect(f"/proc/self/fd/{host}/s")


@root_only
def test_a_mount_opens_no_device(share: Mount) -> None:
    null = share.mountpoint / "null"
    os.mknod(null, 0o20666, os.makedev(1, 3))
    assert (share.source / "null").stat().st_rdev == os.makedev(1, 3)
    with fails(errno.EACCES):
        os.open(null, os.O_RDWR)


@root_only
def test_a_program_that_runs_is_busy_on_its_own_side_alone(share: Mount) -> None:
    write(share.source / "program", Path("/bin/sleep").read_bytes(), 0o755)
    guest, host = share.mountpoint / "program", share.source / "program"
    with subprocess.Popen([guest, "60"]) as running:
        try:
            wait_until(
                lambda: os.readlink(f"/proc/{running.pid}/exe") == str(guest), 10, "the program"
            )
            with fails(errno.ETXTBSY):
                os.open(guest, os.O_WRONLY)
            os.close(os.open(host, os.O_WRONLY))
        finally:
            running.kill()


# -- the guest's page cache ------------------------------------------------------------------------


@contextmanager
def mapping(path: Path) -> Iterator[mmap.mmap]:
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 4096) as memory:
        yield memory


@root_only
def test_an_append_whose_descriptor_does_not_say_so(share: Mount) -> None:
    """RWF_APPEND of pwritev2(2)."""
    write(share.source / "log", b"one ")
    with opened(share.mountpoint / "log", os.O_WRONLY) as fd:
        with opened(share.source / "log", os.O_WRONLY | os.O_APPEND) as host:
            os.write(host, b"the host's")
        os.pwritev(fd, [b"two"], 0, os.RWF_APPEND)
    assert (share.source / "log").read_bytes() == b"one two host's"


@root_only
def test_the_position_after_an_append_is_the_guests_own(share: Mount) -> None:
    with opened(share.mountpoint / "log", os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
        os.write(fd, b"one ")
        with opened(share.source / "log", os.O_WRONLY | os.O_APPEND) as host:
            os.write(host, b"the host's ")
        os.write(fd, b"two")
        assert (share.source / "log").read_bytes() == b"one the host's two"
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(b"one two")
        assert os.lseek(fd, 0, os.SEEK_END) == len(b"one the host's two")


@root_only
def test_a_mapping_is_each_sides_own(share: Mount) -> None:
    write(share.source / "f", bytes(4096))
    with mapping(share.mountpoint / "f") as guest, mapping(share.source / "f") as host:
        assert guest[:4] == bytes(4)
        host[:4] = b"host"
        assert guest[:4] == bytes(4)  # the guest's page is another
        assert (share.mountpoint / "f").read_bytes()[:4] == b"host"  # an open reads it anew
        wait_until(lambda: guest[:4] == b"host", 10, "the guest's mapping after an open")
        guest[4:9] = b"guest"
        assert host[4:9] == bytes(5)
        guest.flush()
        assert host[4:9] == b"guest"


@root_only
@pytest.mark.parametrize("option", ["--cache=never", "--transport=libfuse"])
def test_a_rewrite_with_the_old_size_and_time_needs_a_new_open(tmp_path: Path, option: str) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    f = write(source / "f", b"old")
    before = f.stat()
    with mounted(source, mountpoint, option), opened(mountpoint / "f") as fd:
        assert os.pread(fd, 3, 0) == b"old"
        f.write_bytes(b"new")
        os.utime(f, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.pread(fd, 3, 0) == b"old"
        assert (mountpoint / "f").read_bytes() == b"new"
        assert os.pread(fd, 3, 0) == b"new"  # whoever opens it renews it for all


# -- what FUSE cannot say --------------------------------------------------------------------------


@root_only
def test_a_read_only_submount_does_not_look_so(share: Mount) -> None:
    below = share.source / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1M", "none", below], check=True)
    try:
        there = share.mountpoint / "below"
        assert not os.access(below, os.W_OK)
        assert os.access(there, os.W_OK)
        assert os.statvfs(below).f_flag & os.ST_RDONLY
        assert not os.statvfs(there).f_flag & os.ST_RDONLY
        with fails(errno.EROFS):
            (there / "new").mkdir()
    finally:
        # A process that has just looked there may have it open for a moment.
        subprocess.run(["umount", "-l", below], check=True)


def fanotify_marks(*paths: Path) -> list[int]:
    """The errors, 0 for none, of marks on the paths in one new group that reports by handle."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.fanotify_init(FAN_REPORT_FID, os.O_RDONLY)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    mask = ctypes.c_uint64(Mask.CREATE | Mask.MODIFY)
    try:
        return [
            ctypes.get_errno()
            if libc.fanotify_mark(fd, kernel.FAN_MARK_ADD, mask, -1, os.fsencode(path))
            else 0
            for path in paths
        ]
    finally:
        os.close(fd)


@root_only
def test_a_fanotify_group_by_handle_is_for_the_mount_alone(share: Mount, tmp_path: Path) -> None:
    """As TypeScript 7's: a FUSE mount has no file system number, so the kernel takes no others."""
    alone = fanotify_marks(share.mountpoint)
    if alone == [errno.ENODEV]:
        pytest.skip("before Linux 6.8 such a group takes no FUSE mount at all")
    assert alone == [0]
    assert fanotify_marks(tmp_path, share.source) == [0, 0]
    assert fanotify_marks(share.mountpoint, tmp_path) == [0, errno.EXDEV]
    assert fanotify_marks(tmp_path, share.mountpoint) == [0, errno.EXDEV]


# -- events ----------------------------------------------------------------------------------------


def failed(share: Mount) -> dict[str, int]:
    kinds = the_mount(share.mountpoint)["by_kind"]
    return {kind: what.get("failed", 0) for kind, what in kinds.items()}


@root_only
def test_a_program_that_runs_in_the_guest_has_no_close_write(share: Mount) -> None:
    """What can be delivered is; the rest is counted."""
    write(share.source / "program", Path("/bin/sleep").read_bytes(), 0o755)
    guest, host = share.mountpoint / "program", share.source / "program"
    inotify = notify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
    mask = int(Mask.OPEN | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE | Mask.CREATE)
    with subprocess.Popen([guest, "60"]) as running:
        try:
            notify.add_watch(inotify, str(share.mountpoint), mask)
            share.wait_armed(share.mountpoint, pid=os.getpid())
            for _ in range(2):
                with opened(host, os.O_WRONLY | os.O_APPEND) as fd:
                    os.write(fd, b"more")
            write(share.source / "last")
            reported: list[str] = []
            while reported[-1:] != ["IN_CREATE last"]:
                assert select.select([inotify], [], [], 20)[0], reported
                for event in parse_events(os.read(inotify, 4096)):
                    reported.append(f"{describe(event.mask)} {os.fsdecode(event.name)}")
                    if "CREATE" in reported[-1]:
                        break
            once = [f"{kind} program" for kind in ("IN_OPEN", "IN_MODIFY", "IN_CLOSE_NOWRITE")]
            assert reported == [*once, *once, "IN_CREATE last"]
            wait_until(
                lambda: failed(share).get("close_write") == 2, 20, "two CLOSE_WRITEs that failed"
            )
            assert failed(share)["open"] == 0
        finally:
            running.kill()
            os.close(inotify)


@root_only
def test_a_fifos_own_open_is_not_delivered(share: Mount) -> None:
    os.mkfifo(share.source / "p")
    fd = notify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mask = int(Mask.OPEN | Mask.CLOSE_WRITE | Mask.ATTRIB)
        notify.add_watch(fd, str(share.mountpoint / "p"), mask)
        share.wait_armed(share.mountpoint / "p", pid=os.getpid())
        with opened(share.source / "p", os.O_RDWR | os.O_NONBLOCK):
            pass
        os.chmod(share.source / "p", 0o600)  # comes later, and is delivered
        assert select.select([fd], [], [], 20)[0], "no ATTRIB came"
        assert {describe(event.mask) for event in parse_events(os.read(fd, 4096))} == {"IN_ATTRIB"}
    finally:
        os.close(fd)


@root_only
def test_tail_polls(share: Mount) -> None:
    """It takes FUSE for a network file system, and looks once a second instead of watching."""
    write(share.source / "log", b"first\n")
    marked = {}
    for path in (share.source / "log", share.mountpoint / "log"):
        with subprocess.Popen(["tail", "-n+1", "-f", path], stdout=subprocess.PIPE) as tail:
            assert tail.stdout is not None
            try:
                assert tail.stdout.readline() == b"first\n"
                with opened(share.source / "log", os.O_WRONLY | os.O_APPEND) as fd:
                    os.write(fd, b"second\n")
                assert tail.stdout.readline() == b"second\n"  # it sees it all the same
                marked[path.parent] = bool(kernel_marks(tail.pid))
                write(share.source / "log", b"first\n")
            finally:
                tail.kill()
    assert marked == {share.source: True, share.mountpoint: False}
