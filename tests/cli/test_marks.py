"""`fsd-guest marks`: inotify's and fanotify's, armed or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.mounts import Mount, wait_until
from harness.namespace import run
from tests.cli.support import GUEST, background, line_of, status_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")


def marks_of(share: Mount, pid: int) -> list[dict[str, Any]]:
    return [mark for mark in share.marks() if mark["pid"] == pid]


def test_marks(share: Mount) -> None:
    (share.source / "dir").mkdir()
    (share.source / "file").touch()
    with background(
        "inotifywait", "-m", "-q", "-e", "create,delete",
        share.mountpoint / "dir", share.mountpoint / "file",
    ) as watcher:  # fmt: skip
        share.wait_armed(share.mountpoint / "dir", share.mountpoint / "file", pid=watcher.pid)
        marks = sorted(marks_of(share, watcher.pid), key=lambda mark: mark["wd"])
        assert [mark["path"] for mark in marks] == [
            str(share.mountpoint / "dir"), str(share.mountpoint / "file"),
        ]  # fmt: skip
        for mark in marks:
            assert mark["process"] == "inotifywait"
            assert mark["mask"] == ["create", "delete"]
            assert mark["armed"] is True
        assert [mark["wd"] for mark in marks] == [1, 2]
        numbers = [os.stat(share.source / name).st_ino for name in ("dir", "file")]
        assert [mark["nodeid"] for mark in marks] == numbers
        table = run([GUEST, "marks", share.mountpoint])
        assert table.returncode == 0
        heads, *rows = table.stdout.splitlines()
        assert heads.split() == ["PID", "PROCESS", "WD", "NODEID", "ARMED", "PATH", "MASK"]
        row = next(row.split() for row in rows if str(share.mountpoint / "dir") in row)
        assert row[:3] == [str(watcher.pid), "inotifywait", "1"]
        assert row[4] == "yes"
    wait_until(lambda: not share.marks(), 10, "the end of the marks")
    wait_until(
        lambda: not status_of(share.mountpoint)["guests"][0]["marks"], 10, "the server's marks' end"
    )


def test_marks_without_an_agent_are_not_armed(share_no_agent: Mount) -> None:
    """The counterpart: the kernel holds the mark, and nobody has published it."""
    share = share_no_agent
    with background("inotifywait", "-m", share.mountpoint) as watcher:
        wait_until(lambda: marks_of(share, watcher.pid), 10, "the mark")
        (mark,) = marks_of(share, watcher.pid)
        assert mark["armed"] is False
        assert "create" in mark["mask"]


FANOTIFY = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
flags, path = int(sys.argv[1], 0), sys.argv[2].encode()
fd = libc.fanotify_init(0, os.O_RDONLY)
mask = 0x2 | 0x8  # FAN_MODIFY, FAN_CLOSE_WRITE
mask |= 0x08000000 if flags == 1 else 0  # EVENT_ON_CHILD: for an inode mark on a directory
result = libc.fanotify_mark(fd, flags, ctypes.c_uint64(mask), -100, path)
if fd < 0 or result < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
print("marked", flush=True)
while True:
    buffer = os.read(fd, 4096)
    while buffer:
        length, _, _, _, mask, event_fd, pid = struct.unpack_from("=IBBHQii", buffer)
        print(hex(mask), os.readlink(f"/proc/self/fd/{event_fd}"), flush=True)
        os.close(event_fd)
        buffer = buffer[length:]
"""
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM = 0x1, 0x10, 0x100
FAN_MODIFY, FAN_CLOSE_WRITE = 0x2, 0x8


@pytest.mark.parametrize(
    ("kind", "nodeid"),
    [(0, None), (FAN_MARK_MOUNT, 0), (FAN_MARK_FILESYSTEM, 0)],
    ids=["inode", "mount", "filesystem"],
)
def test_fanotify_marks_show_up_armed_and_work(share: Mount, kind: int, nodeid: int | None) -> None:
    (share.source / "deep/er").mkdir(parents=True)
    (share.source / "deep/file").write_text("x")
    where = share.mountpoint / "deep" if nodeid is None else share.mountpoint
    with background(sys.executable, "-c", FANOTIFY, hex(FAN_MARK_ADD | kind), where) as watcher:
        assert line_of(watcher) == "marked", line_of(watcher, stderr=True)
        # Its look-up came before, its mark without one: the slow safety net may have to find it.
        share.wait_armed(where, pid=watcher.pid, timeout=45)
        (mark,) = marks_of(share, watcher.pid)
        assert mark["wd"] == -1
        assert mark["mask"] == ["modify", "close_write"]
        assert mark["nodeid"] == (os.stat(where).st_ino if nodeid is None else nodeid)
        with open(share.source / "deep/file", "a") as file:
            file.write("y")
        reported = until_closed(watcher, share.mountpoint / "deep/file")
        # A limit: a mark on the whole file system is one on the agent's channel, too.
        channel = {"/.fsd/control"} if kind == FAN_MARK_FILESYSTEM else set()
        assert reported == channel
        # And between events the mountpoint is as idle as without such a mark.
        wait_until(lambda: not status_of(share.mountpoint)["guests"][0]["depth"], 10, "rest")
        held = [os.readlink(fd) for fd in Path(f"/proc/{agent_of(share)}/fd").iterdir()]
        assert not [path for path in held if path.startswith(str(share.mountpoint))]


def until_closed(watcher: subprocess.Popen[bytes], file: Path) -> set[str]:
    """Read fanotify's events until the file's change; returns the other paths reported."""
    reported: dict[str, int] = {}
    while not reported.get(str(file), 0) & FAN_CLOSE_WRITE:
        bits, path = line_of(watcher).split(" ", 1)
        reported[path] = reported.get(path, 0) | int(bits, 0)
    assert reported.pop(str(file)) & FAN_MODIFY
    return set(reported)


def test_what_was_open_before_the_mark_has_no_modify(share: Mount) -> None:
    """A limit for groups that report by descriptor: the agent has no file of it to write to."""
    path = share.mountpoint / "file"
    with open(share.source / "file", "w") as file:
        kind = hex(FAN_MARK_ADD)
        with background(sys.executable, "-c", FANOTIFY, kind, share.mountpoint) as watcher:
            assert line_of(watcher) == "marked", line_of(watcher, stderr=True)
            share.wait_armed(share.mountpoint, pid=watcher.pid, timeout=45)
            file.write("x")
            file.close()
            assert line_of(watcher) == f"{FAN_CLOSE_WRITE:#x} {path}"


def agent_of(share: Mount) -> int:
    pid: int = status_of(share.mountpoint)["guests"][0]["agent_pid"]
    return pid


def test_a_mount_mark_on_a_bind_mount_hears_nothing(share: Mount, tmp_path: Path) -> None:
    """A limit: the agent works through the mountpoint, and events carry the mount."""
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", share.mountpoint, tmp_path / "bound"], check=True)
    kind = hex(FAN_MARK_ADD | FAN_MARK_MOUNT)
    try:
        with (
            background(sys.executable, "-c", FANOTIFY, kind, tmp_path / "bound") as bound,
            background(sys.executable, "-c", FANOTIFY, kind, share.mountpoint) as direct,
        ):
            for watcher in (bound, direct):
                assert line_of(watcher) == "marked", line_of(watcher, stderr=True)
            share.wait_armed(share.mountpoint, pid=direct.pid, timeout=45)
            (share.source / "file").write_text("x")
            assert until_closed(direct, share.mountpoint / "file") == set()
            (tmp_path / "bound/own").write_text("x")
            assert line_of(bound).endswith("/own")
    finally:
        subprocess.run(["umount", "-l", tmp_path / "bound"], check=True)


@pytest.mark.parametrize("links", [1, 2])
def test_a_mark_on_a_file_gets_its_name(share: Mount, links: int) -> None:
    """To groups of fanotify that report names. Of several, nobody knows which one was used."""
    (share.source / "dir").mkdir()
    (share.source / "dir/file").touch()
    if links == 2:
        os.link(share.source / "dir/file", share.source / "link")
    # It looks for the directory's name on the file system that it is in.
    command = f"cd {share.mountpoint} && exec fsnotifywait --fanotify -mq -e attrib dir/file"
    with background("sh", "-c", command) as watcher:
        share.wait_armed(share.mountpoint / "dir/file", timeout=45)
        os.chmod(share.source / "dir/file", 0o600)
        said = line_of(watcher)
        if links == 1:
            assert said == f"{share.mountpoint}/dir/ ATTRIB file"
        else:
            number = os.stat(share.source / "dir/file").st_ino
            assert said == f"{share.mountpoint}/.fsd/alias/ ATTRIB {number} (deleted)"


@pytest.mark.parametrize("name", ["control", "session"])
def test_a_channel_opened_for_reading_is_an_empty_file(share: Mount, name: str) -> None:
    path = share.mountpoint / ".fsd" / name
    before = len(status_of(share.mountpoint)["guests"])
    with open(path, "rb", buffering=0) as file:
        assert file.read() == b""
        assert len(status_of(share.mountpoint)["guests"]) == before
    with pytest.raises(PermissionError):
        os.open(path, os.O_WRONLY)
    with background("inotifywait", "-m", "-q", share.mountpoint) as watcher:
        share.wait_armed(share.mountpoint, pid=watcher.pid)
        (share.source / "x").mkdir()
        assert line_of(watcher) == f"{share.mountpoint}/ CREATE,ISDIR x"
