"""Real CRIU beside ours: the same process, saved by both, field by field; and what CRIU makes of a
watcher of our mount.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest_tools.watcher import images as stored
from harness.mounts import Mount, wait_until
from protocol import images

from .criu import Criu, criu
from .remote import PYTHON, guest, shown

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CRIU is root's")

ALL, CREATE, ONESHOT, EXCL = 0xFFF, 0x100, 0x8000_0000, 0x0400_0000
LAST = 0x34D71D6


@pytest.fixture(scope="module")
def real() -> Criu:
    return criu()


class Recorder:
    """A watcher that CRIU can save: it has files open, and no pipe."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.log = log

    def events(self) -> list[list[Any]]:
        """All that it has seen."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return [event for line in lines if line.endswith("\n") for event in json.loads(line)]

    def marks(self, fd: int) -> list[str]:
        """Lines of fdinfo about marks and entries."""
        text = Path(f"/proc/{self.pid}/fdinfo/{fd}").read_text()
        head = ("pos", "flags", "mnt_id", "ino")
        return sorted(line for line in text.splitlines() if line.split(":")[0] not in head)


@contextmanager
def recorder(setup: list[str], folder: Path, *prefix: str) -> Iterator[Recorder]:
    log = folder / "log"
    # It opens its streams, in the namespace that it may have of its own.
    streams = ("sh", "-c", 'exec "$@" <>/dev/null >&0 2>&0', "sh")
    process = subprocess.Popen(
        [*prefix, *streams, *PYTHON, json.dumps(setup), log],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=folder,
    )
    try:
        wait_until(log.exists, 30, "the watcher is ready")
        yield Recorder(process, log)
    finally:
        process.kill()
        process.wait()
        _end(process.pid, log)


def _end(pid: int, log: Path) -> None:
    """End what CRIU has restored under that number, and nothing else that has it by now."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if os.fsencode(log) in words:
        os.kill(pid, 9)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10)


def notify_files(real: Criu, files: Path, fdinfo: Path) -> dict[int, dict[str, Any]]:
    """For each notification descriptor its file as CRIU's library decodes it, but for ids."""
    by_id = {entry["id"]: entry for entry in real.entries(files)}
    found = {}
    for entry in real.entries(fdinfo):
        file = dict(by_id[entry["id"]])
        for key in ("ify", "ffy", "epfd"):
            if key in file:
                body = dict(file[key])
                del file["id"], body["id"]
                for part in ("wd", "mark", "tfd"):  # the kernel's order is none
                    if part in body:
                        body[part] = sorted(body[part], key=json.dumps)
                file[key] = body
                found[entry["fd"]] = {"type": entry["type"], "flags": entry["flags"], **file}
    return found


def ours(directory: Path, folder: Path) -> tuple[Path, Path]:
    """files.img and fdinfo.img without the envelope: images of CRIU's form."""
    folder.mkdir()
    for name in ("files", "fdinfo"):
        body = images.unpack((directory / f"{name}.img").read_bytes(), name, stored.VERSION)
        (folder / f"{name}.img").write_bytes(body)
    return folder / "files.img", folder / "fdinfo.img"


def test_ours_agrees_with_criu_field_by_field(real: Criu, tmp_path: Path) -> None:
    top = tmp_path / "top"
    setup = ["inotify(3)", "inotify(7, 0)", "os.dup2(7, 8)", "epoll(4)", "epoll(5)"]
    for i in range(50):
        (top / str(i)).mkdir(parents=True)
        mask = (ALL, CREATE | ONESHOT, ALL | EXCL)[i % 3]
        setup.append(f"watch(3, {str(top / str(i))!r}, {mask}, {i * 1000 + 1})")
    (top / "file").touch()
    (top / "gefüllt").touch()
    setup += [
        f"watch(3, {str(top / 'file')!r}, 2, {LAST})",
        f"watch(7, {str(top / 'gefüllt')!r}, 2)",
        "add(4, 3, 1, 0xfedcba9876543210)",
        "add(4, 7, 0x80000001, 7)",
        "add(5, 4, 1, 4)",
        "fanotify(6, 2)",
        f"mark(6, 0, 0x2, {str(top / 'file')!r})",
        f"mark(6, 0x60, 0x20, {str(top / 'file')!r})",
    ]
    with recorder(setup, tmp_path) as watcher:
        done = guest("checkpoint", "--pid", watcher.pid, tmp_path / "ours")
        assert (done.returncode, done.stderr) == (0, "")
        real.run("dump", tmp_path / "criu", "-t", watcher.pid)
        watcher.process.wait(10)  # CRIU has killed it; its number is free when it is reaped
    (fdinfo,) = (tmp_path / "criu").glob("fdinfo-*.img")
    theirs = notify_files(real, tmp_path / "criu" / "files.img", fdinfo)
    mine = notify_files(real, *ours(tmp_path / "ours", tmp_path / "plain"))
    assert sorted(theirs) == [3, 4, 5, 6, 7, 8]
    assert len(theirs[3]["ify"]["wd"]) == 51
    assert mine == theirs


def test_entries_whose_numbers_are_other_files_by_now(real: Criu, tmp_path: Path) -> None:
    """CRIU gives them the numbers that their files have now; ours keeps both. The files agree."""
    setup = [
        "inotify(3)",
        "inotify(7)",
        "epoll(4)",
        *("os.dup2(3, 20)", "add(4, 20, 1, 1)"),
        *("os.dup2(7, 20)", "add(4, 20, 1, 2)"),
        "os.dup2(4, 20)",
    ]
    with recorder(setup, tmp_path) as watcher:
        done = guest("checkpoint", "--pid", watcher.pid, tmp_path / "ours")
        assert (done.returncode, done.stderr) == (0, "")
        real.run("dump", tmp_path / "criu", "-t", watcher.pid)
        watcher.process.wait(10)
    (fdinfo,) = (tmp_path / "criu").glob("fdinfo-*.img")
    theirs = notify_files(real, tmp_path / "criu" / "files.img", fdinfo)[4]["epfd"]["tfd"]
    (mine,) = (row for row in shown(tmp_path / "ours")["files"] if row["kind"] == "epoll")
    assert sorted((entry["tfd"], entry["data"]) for entry in theirs) == [(3, 1), (7, 2)]
    assert sorted((t["target"]["fd"], t["data"]) for t in mine["targets"]) == [(3, 1), (7, 2)]
    assert {target["tfd"] for target in mine["targets"]} == {20}


def test_both_restore_the_same_watcher(real: Criu, tmp_path: Path) -> None:
    """With the same numbers; CRIU drops ONESHOT and EXCL_UNLINK, which ours keeps."""
    top = tmp_path / "top"
    for name in "ab":
        (top / name).mkdir(parents=True)
    setup = [
        "inotify(3)",
        f"watch(3, {str(top / 'a')!r}, {CREATE}, 5)",
        f"watch(3, {str(top / 'b')!r}, {CREATE | ONESHOT | EXCL}, {LAST})",
        "epoll(4)",
        "add(4, 3, 1, 3)",
    ]
    with recorder(setup, tmp_path) as watcher:
        before = watcher.marks(3), watcher.marks(4)
        done = guest("checkpoint", "--pid", watcher.pid, tmp_path / "ours")
        assert done.returncode == 0, done.stderr
        real.run("dump", tmp_path / "criu", "-t", watcher.pid)
        watcher.process.wait(10)

        done = guest("restore", tmp_path / "ours", "--", "cat", "/proc/self/fdinfo/3")
        again = done.stdout.splitlines()
        assert sorted(line for line in again if line.startswith("inotify")) == before[0]

        real.run("restore", tmp_path / "criu", "-d")
        theirs = watcher.marks(3)
        flags = f"{CREATE | ONESHOT | EXCL:x}"
        assert [line.replace(f"mask:{flags} ", "mask:100 ") for line in before[0]] == [
            line.replace(f"mask:{flags} ", "mask:100 ") for line in theirs
        ]
        assert watcher.marks(4) == before[1]
        seen = len(watcher.events())
        (top / "a" / "new").touch()
        (top / "b" / "new").touch()
        wait_until(lambda: len(watcher.events()) >= seen + 2, 10)
        assert [5, CREATE, 0, "new"] in watcher.events()[seen:]
        assert [LAST, CREATE, 0, "new"] in watcher.events()[seen:]


def test_a_watcher_of_our_mount(real: Criu, share: Mount, tmp_path: Path) -> None:
    """In the mount's own namespace CRIU saves and restores it; the host's events still arrive."""
    (share.source / "directory").mkdir()
    mounted = share.mountpoint / "directory"
    setup = ["inotify(3)", f"watch(3, {str(mounted)!r}, {CREATE}, 77)"]
    with recorder(setup, tmp_path) as watcher:
        share.wait_armed(mounted, pid=watcher.pid)
        before = watcher.marks(3)
        real.run("dump", tmp_path / "criu", "-t", watcher.pid)
        watcher.process.wait(10)
        real.run("restore", tmp_path / "criu", "-d")
        assert watcher.marks(3) == before
        share.wait_armed(mounted, pid=watcher.pid, timeout=40)
        (share.source / "directory" / "new").touch()
        wait_until(lambda: [77, CREATE, 0, "new"] in watcher.events(), 10)


def test_criu_refuses_our_mount_in_a_namespace_of_its_own(
    real: Criu, share: Mount, tmp_path: Path
) -> None:
    """There it would have to save the mount, too: "fuse: always fail". Ours does without."""
    (share.source / "directory").mkdir()
    mounted = share.mountpoint / "directory"
    setup = ["inotify(3)", f"watch(3, {str(mounted)!r}, {CREATE}, 77)"]
    unshare = ("unshare", "--mount", "--propagation", "private")
    with recorder(setup, tmp_path, *unshare) as watcher:
        before = watcher.marks(3)
        with pytest.raises(AssertionError, match=r"\(fuse\): always fail"):
            real.run("dump", tmp_path / "criu", "-t", watcher.pid)
        done = guest("checkpoint", "--pid", watcher.pid, tmp_path / "ours")
        assert (done.returncode, done.stderr) == (0, "")
    words = ("restore", tmp_path / "ours", "--", "cat", "/proc/self/fdinfo/3")
    again = guest(*words).stdout.splitlines()
    assert len(before) == 1
    assert sorted(line for line in again if line.startswith("inotify")) == before
