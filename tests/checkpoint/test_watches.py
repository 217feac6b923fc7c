"""inotify instances of a real process, saved and made again: numbers, masks and files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_tools.watcher import restore
from harness.mounts import command, wait_until
from harness.namespace import as_user
from protocol.masks import Mask

from .remote import Remote, guest, remote, restored, save, shown

LAST = 0x34D71D6
ALL, CREATE, ONESHOT, EXCL = 0xFFF, 0x100, 0x8000_0000, 0x0400_0000


@pytest.fixture
def watcher() -> Iterator[Remote]:
    with remote() as driver:
        yield driver


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory of directories and files."""
    top = tmp_path / "tree"
    top.mkdir()
    for name in ("one", "two", "three"):
        (top / name).mkdir()
        (top / f"{name}.txt").write_text(name)
    return top


def report(driver: Remote) -> str:
    """The last line that restore wrote."""
    return driver.stderr.splitlines()[-1]


def test_a_thousand_watches(watcher: Remote, tmp_path: Path) -> None:
    """The numbers have gaps and reach far; files are renamed and deleted meanwhile."""
    top, numbers = tmp_path / "tree", []
    for i in range(1000):
        path = top / f"{i:03}"
        (path if i % 3 else path.parent).mkdir(parents=True, exist_ok=True)
        if not i % 3:
            path.touch()
        wd = i + 1 if i < 400 else 1000 * i if i < 999 else LAST
        mask = (ALL, CREATE | ONESHOT, ALL | EXCL, 0x2 | ONESHOT | EXCL)[i % 4]
        numbers.append((str(path), mask, wd))
    watcher("inotify(7)")
    watcher(f"[watch(7, path, mask, wd) for path, mask, wd in {numbers!r}]")
    before = watcher.marks(7)
    assert len(before) == 1000
    assert any("wd:34d71d6 " in line for line in before)

    start = time.monotonic()
    save(watcher, tmp_path / "saved")
    saving = time.monotonic() - start
    for i in range(0, 100, 2):  # renamed: found by handle
        (top / f"{i:03}").rename(top / f"moved {i}")
    start = time.monotonic()
    with restored(tmp_path / "saved") as again:
        restoring = time.monotonic() - start
        assert again.marks(7) == before
        assert report(again) == ("fsd-guest: restored 1000 watches and 0 epoll entries; 0 problems")
        (top / "moved 4" / "new").touch()
        assert again("events(7)")[0] == [5, CREATE, 0, "new"]
    print(f"1,000 watches: saved in {saving:.2f} s, restored in {restoring:.2f} s, as commands")
    assert max(saving, restoring) < 5  # about 0.3 s where nothing else runs


def test_deleted_files_are_reported_one_by_one(watcher: Remote, tree: Path) -> None:
    """And a file that has their name by now, or their inode number, is never watched."""
    watcher("inotify(3)")
    for wd, name in enumerate(("one", "two.txt", "three.txt"), 5):
        watcher(f"watch(3, {str(tree / name)!r}, {ALL}, {wd})")
    kept = [line for line in watcher.marks(3) if "wd:5 " in line]
    save(watcher, tree.parent / "saved")
    watcher.process.kill()
    watcher.process.wait()  # or it would keep the inodes in the kernel's cache
    numbers = {os.lstat(tree / name).st_ino for name in ("two.txt", "three.txt")}
    (tree / "two.txt").unlink()
    (tree / "three.txt").unlink()
    (tree / "two.txt").write_text("another file")
    for i in range(200):  # ext4 gives out a number that is free again
        (tree / f"{i}.txt").write_text("another file")
    if os.statvfs(tree).f_files:
        others = {entry.inode() for entry in os.scandir(tree)}
        print("inode numbers used again:", len(numbers & others))
    with restored(tree.parent / "saved") as again:
        assert again.marks(3) == kept
        assert "restored 1 watches" in again.stderr
        for wd, name in ((6, "two.txt"), (7, "three.txt")):
            (line,) = (line for line in again.stderr.splitlines() if f"watch {wd} on" in line)
            assert str(tree / name) in line
            assert "does not exist any more" in line or "another file" in line
        assert again("events(3)") == [[-1, int(Mask.Q_OVERFLOW), 0, ""]]
    strict = guest("restore", "--strict", tree.parent / "saved", "--", "echo", "run")
    assert (strict.returncode, strict.stdout) == (1, "")


def test_a_deleted_file_that_is_still_open(watcher: Remote, tree: Path) -> None:
    path = tree / "one.txt"
    watcher("inotify(3)")
    watcher(f"watch(3, {str(path)!r}, {ALL})")
    with path.open("a") as file:
        path.unlink()
        watcher("events(3)")
        before = watcher.marks(3)
        assert len(before) == 1
        save(watcher, tree.parent / "saved")
        (row,) = shown(tree.parent / "saved")["files"][0]["watches"]
        assert (row["path"], row["deleted"]) == (str(path), True)
        path.write_text("another file of the same name")
        with restored(tree.parent / "saved") as again:
            assert again.marks(3) == before
            file.write("still watched")
            file.flush()
            assert again("events(3)") == [[1, 0x2, 0, ""]]


def test_masks_do_what_they_did(watcher: Remote, tree: Path) -> None:
    watcher("inotify(3)")
    watcher(f"watch(3, {str(tree / 'one')!r}, {CREATE | ONESHOT})")
    watcher(f"watch(3, {str(tree / 'two')!r}, {0x2 | EXCL})")
    save(watcher, tree.parent / "saved")
    with restored(tree.parent / "saved") as again:
        (tree / "one" / "a").touch()
        (tree / "one" / "b").touch()
        assert again("events(3)") == [[1, CREATE, 0, "a"], [1, 0x8000, 0, ""]]
        path = tree / "two" / "unlinked"
        with path.open("wb", buffering=0) as file:
            file.write(b"seen")
            path.unlink()
            file.write(b"not seen: it has no name any more")
            (tree / "two" / "last").write_text("seen")
        names = [event[3] for event in again("events(3)")]
        assert names == ["unlinked", "last"]


def test_new_watches_get_new_numbers(watcher: Remote, tree: Path) -> None:
    watcher("inotify(3)")
    watcher(f"watch(3, {str(tree / 'one')!r}, {ALL}, 9)")
    watcher(f"watch(3, {str(tree / 'two')!r}, {ALL}, 4)")
    save(watcher, tree.parent / "saved")
    for option in ("auto", "always"):
        with restored(tree.parent / "saved", "--overflow", option) as again:
            assert again(f"watch(3, {str(tree / 'three')!r}, {ALL})") == 10


def test_a_watched_symbolic_link(watcher: Remote, tree: Path) -> None:
    link = tree / "link"
    link.symlink_to("one.txt")
    watcher("inotify(3)")
    watcher(f"watch(3, {str(link)!r}, {ALL | 0x0200_0000})")  # IN_DONT_FOLLOW
    before = watcher.marks(3)
    assert f"ino:{link.lstat().st_ino:x} " in before[0]
    save(watcher, tree.parent / "saved")
    with restored(tree.parent / "saved") as again:
        assert again.marks(3) == before


def test_names_of_any_bytes(watcher: Remote, tree: Path) -> None:
    path = os.fsencode(tree) + b"/\xff \\ \n(deleted)"
    os.mkdir(path)
    watcher("inotify(3)")
    watcher(f"watch(3, {os.fsdecode(path)!r}, {ALL})")
    before = watcher.marks(3)
    save(watcher, tree.parent / "saved")
    (row,) = shown(tree.parent / "saved")["files"][0]["watches"]
    assert os.fsencode(row["path"]) == path
    assert guest("show", tree.parent / "saved").returncode == 0
    with restored(tree.parent / "saved") as again:
        assert again.marks(3) == before


def test_descriptors_and_flags(watcher: Remote, tree: Path) -> None:
    """Two instances; one of them under two numbers, with a signal for its owner."""
    pid = watcher("os.getpid()")
    assert watcher("inotify(0o100)") == 64
    watcher("os.dup2(64, 200)")
    watcher("inotify(9, 0)")
    watcher(f"watch(64, {str(tree)!r}, {ALL})")
    watcher("fcntl.fcntl(64, 10, 34)")  # F_SETSIG
    watcher(f"fcntl.fcntl(64, fcntl.F_SETOWN, {pid})")
    watcher("fcntl.fcntl(64, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)")
    save(watcher, tree.parent / "saved")
    first, second = shown(tree.parent / "saved")["files"]
    assert first["fds"] == [{"fd": 9, "cloexec": True}]
    assert second["fds"] == [{"fd": 64, "cloexec": True}, {"fd": 200, "cloexec": False}]
    assert second["flags"] == os.O_NONBLOCK | os.O_ASYNC
    assert second["owner"]["signum"] == 34
    with restored(tree.parent / "saved") as again:
        assert [fd for fd in again("descriptors()") if 2 < fd < 300] == [9, 64, 200]
        assert again("fcntl.fcntl(9, fcntl.F_GETFL)") == 0
        assert again("fcntl.fcntl(64, fcntl.F_GETFL)") == os.O_NONBLOCK | os.O_ASYNC
        assert again("fcntl.fcntl(64, fcntl.F_GETOWN)") == again("os.getpid()")
        assert again("fcntl.fcntl(64, 11)") == 34  # F_GETSIG
        again("os.close(64)")
        assert len(again.marks(200)) == 1  # one instance


def test_numbers_of_the_standard_streams(watcher: Remote, tree: Path) -> None:
    """An instance may bear the number that the command's own stderr had."""
    watcher("inotify(2)")
    watcher(f"watch(2, {str(tree)!r}, {ALL})")
    before = watcher.marks(2)
    save(watcher, tree.parent / "saved")
    with restored(tree.parent / "saved") as again:
        assert again.marks(2) == before
    # The complaint about a command that does not exist still finds its way.
    missing = guest("restore", tree.parent / "saved", "--", "/does/not/exist")
    assert missing.returncode == 127
    assert "/does/not/exist: No such file" in missing.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_neither_is_seen_by_the_watcher(watcher: Remote, tmp_path: Path) -> None:
    """Not even at the root of a file system, which handles are opened by."""
    top = tmp_path / "mounted"
    top.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", top], check=True)
    try:
        (top / "file").touch()
        watcher("inotify(3)")
        watcher(f"[watch(3, path, {ALL}) for path in {[str(top), str(top / 'file')]!r}]")
        before = watcher.marks(3)
        save(watcher, tmp_path / "saved")
        assert watcher("queued(3)") == 0
        with restored(tmp_path / "saved") as again:
            assert again.marks(3) == before
            assert again("queued(3)") == 0
            assert watcher("queued(3)") == 0
        watcher("os.close(3)")
    finally:
        subprocess.run(["umount", top], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_another_file_system_with_the_same_numbers(watcher: Remote, tmp_path: Path) -> None:
    """A device number is given out again: then name, inode and handle can all be the same."""
    top = tmp_path / "mounted"
    top.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(top)]
    subprocess.run(mount, check=True)
    try:
        watcher("inotify(3)")
        watcher(f"watch(3, {str(top)!r}, {ALL})")
        (line,) = watcher.marks(3)
        save(watcher, tmp_path / "saved")
        watcher("os.close(3)")
        subprocess.run(["umount", top], check=True)
        subprocess.run(mount, check=True)
        with remote() as other:
            other("inotify(3)")
            other(f"watch(3, {str(top)!r}, {ALL})")
            print("same device and inode number:", other.marks(3) == [line])
        with restored(tmp_path / "saved") as again:
            assert again.marks(3) == []
            assert f"watch 1 on {top}" in again.stderr
    finally:
        subprocess.run(["umount", top], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_handles_that_identify_and_do_not_lead_anywhere(watcher: Remote, tmp_path: Path) -> None:
    """An overlay's, as in containers: files are looked for by name, and verified by handle."""
    top = tmp_path / "top"
    for name in ("lower/old", "upper", "work", "top"):
        (tmp_path / name).mkdir(parents=True)
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", top], check=True)
    try:
        (top / "new").mkdir()
        watcher("inotify(3)")
        watcher(f"[watch(3, path, {CREATE}) for path in {[str(top / 'old'), str(top / 'new')]!r}]")
        before = watcher.marks(3)
        blind = save(watcher, tmp_path / "blind")
        assert "2 watched files have no known path, and 2 of them cannot be found" in blind
        kinds = [w["handle"]["kind"] for w in shown(tmp_path / "blind")["files"][0]["watches"]]
        assert kinds == ["encodable only"] * 2
        with restored(tmp_path / "blind") as again:
            assert again.marks(3) == []
            assert again.stderr.count("its path is not known") == 2
        assert save(watcher, tmp_path / "saved", "--search", str(top)) == ""
        with restored(tmp_path / "saved") as again:
            assert again.marks(3) == before
        (top / "new").rename(top / "gone")
        (top / "new").mkdir()
        with restored(tmp_path / "saved") as again:
            assert again.marks(3) == [line for line in before if "wd:1 " in line]
            assert f"watch 2 on {top}/new" in again.stderr
        watcher("os.close(3)")
    finally:
        subprocess.run(["umount", top], check=True)


# Queued events


def test_the_kernel_offers_no_peek(watcher: Remote, tree: Path) -> None:
    """Why queued events are left where they are: each way to read them takes them or fails."""
    watcher("inotify(3)")
    watcher(f"watch(3, {str(tree)!r}, {CREATE})")
    (tree / "a long name that needs more than sixteen bytes").touch()
    wait_until(lambda: watcher("queued(3)") > 0)
    size = watcher("queued(3)")
    for expression in (
        "os.read(3, 16)",  # too small: EINVAL
        "os.pread(3, 4096, 0)",
        "os.preadv(3, [bytearray(4096)], 0, os.RWF_NOWAIT)",
        "os.splice(3, os.pipe()[1], 4096)",
        "os.sendfile(os.pipe()[1], 3, None, 4096)",
    ):
        with pytest.raises(AssertionError, match=r"OSError|AttributeError"):
            watcher(expression)
        assert watcher("queued(3)") == size


def test_queued_events_stay_with_the_process(watcher: Remote, tree: Path) -> None:
    watcher("inotify(3)")
    watcher(f"watch(3, {str(tree)!r}, {CREATE})")
    (tree / "new").touch()
    wait_until(lambda: watcher("queued(3)") > 0)
    assert "descriptor 3: 32 bytes of events are queued and not saved" in save(
        watcher, tree.parent / "saved"
    )
    (row,) = shown(tree.parent / "saved")["files"]
    assert row["queue"] == {"size": 32, "saved": False, "events": []}
    assert watcher("events(3)") == [[1, CREATE, 0, "new"]]
    with restored(tree.parent / "saved") as again:
        assert "descriptor 3: 32 bytes of events were queued" in again.stderr
        assert again("events(3)") == [[-1, int(Mask.Q_OVERFLOW), 0, ""]]
        (tree / "next").touch()
        assert again("events(3)") == [[1, CREATE, 0, "next"]]
    with restored(tree.parent / "saved", "--overflow", "never") as again:
        assert again("queued(3)") == 0


def test_events_that_are_taken_are_handed_on(watcher: Remote, tree: Path) -> None:
    watcher("inotify(3)")
    watcher(f"watch(3, {str(tree)!r}, {CREATE})")
    (tree / "new").touch()
    wait_until(lambda: watcher("queued(3)") > 0)
    running = guest("checkpoint", "--pid", watcher.pid, "--take-events", tree.parent / "no")
    assert running.returncode == 1
    assert f"stop it first (kill -STOP {watcher.pid})" in running.stderr
    os.kill(watcher.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: _state(watcher.pid) == "T")
        assert save(watcher, tree.parent / "saved", "--take-events") == ""
    finally:
        os.kill(watcher.pid, signal.SIGCONT)
    assert watcher("queued(3)") == 0
    (row,) = shown(tree.parent / "saved")["files"]
    (event,) = row["queue"]["events"]
    assert (event["wd"], event["mask"], event["name"]) == (1, CREATE, "new")
    with restored(tree.parent / "saved", "--overflow", "never") as again:
        instance, _, memory = again("os.environ['FSD_EVENTS']").partition(":")
        assert instance == "3"
        assert again(f"events({memory})") == [[1, CREATE, 0, "new"]]
        assert again("queued(3)") == 0


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# Kernels and users that can less


LACKING = """
import ctypes, os, sys
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
class Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int),
                ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]
context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
number = library.seccomp_syscall_resolve_name(b"ioctl")
request = Comparison(1, 4, 0x40044900, 0)  # INOTIFY_IOC_SETNEXTWD: ENOTTY
assert not library.seccomp_rule_add_array(context, 0x50000 | 25, number, 1, ctypes.byref(request))
assert not library.seccomp_load(context)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def lacking(tmp_path: Path) -> list[str | Path]:
    """The command that takes INOTIFY_IOC_SETNEXTWD from what follows, as a kernel without
    CONFIG_CHECKPOINT_RESTORE does.
    """
    script = tmp_path / "lacking.py"
    script.write_text(LACKING)
    return [os.path.realpath("/proc/self/exe"), "-I", "-S", script]


def test_without_the_ioctl_numbers_are_counted_up(
    watcher: Remote, tree: Path, lacking: list[str | Path]
) -> None:
    watcher("inotify(3)")
    watcher(f"watch(3, {str(tree / 'one')!r}, {ALL}, 3)")
    watcher(f"watch(3, {str(tree / 'two')!r}, {ALL}, 10000)")
    near = watcher.marks(3)
    watcher(f"watch(3, {str(tree / 'three')!r}, {ALL}, {LAST})")
    save(watcher, tree.parent / "saved")
    prefix = [*lacking, command("fsd-guest"), "restore", "--overflow", "never"]
    with remote(*prefix, tree.parent / "saved", "--") as again:
        assert again.marks(3) == near
        (line,) = (line for line in again.stderr.splitlines() if f"watch {LAST} on" in line)
        assert "out of reach" in line
        assert "INOTIFY_IOC_SETNEXTWD" in line
        assert again("queued(3)") == 0  # nothing of the watches that came and went
    assert LAST > restore.REACH


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user")
def test_an_ordinary_user(tree: Path) -> None:
    """Handles cannot be opened: files are found by path, if that can be shown, and their number."""
    for path in (tree, *tree.iterdir(), tree.parent, tree.parent.parent):
        os.chown(path, 65534, 65534)
    for parent in tree.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            parent.chmod(0o755)
    with remote(*as_user()) as watcher:
        watcher("inotify(3)")
        for name in ("one", "two", "three"):
            watcher(f"watch(3, {str(tree / name)!r}, {CREATE})")
        before = watcher.marks(3)
        prefix: list[str | Path] = [*as_user(), command("fsd-guest")]
        words = [*prefix, "checkpoint", "--pid", str(watcher.pid), str(tree.parent / "blind")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "3 watched files have no known path" in done.stderr
        words[-1:] = ["--search", str(tree), str(tree.parent / "saved")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        (tree / "two").rename(tree / "moved")
        (tree / "two").mkdir()
        with remote(
            *prefix, "restore", "--overflow", "never", tree.parent / "saved", "--"
        ) as again:
            assert again.marks(3) == [line for line in before if "wd:2 " not in line]
            assert "watch 2 on" in again.stderr


# Wrong usage


def test_what_cannot_be_saved(watcher: Remote, tmp_path: Path) -> None:
    for pid, says in (
        (watcher.pid, "has no inotify, fanotify or epoll descriptor"),
        (2**22 + 1, "there is no process"),
    ):
        done = guest("checkpoint", "--pid", pid, tmp_path / "saved")
        assert done.returncode == 1
        assert says in done.stderr
        assert not (tmp_path / "saved").exists()


def test_nothing_is_overwritten(watcher: Remote, tmp_path: Path) -> None:
    watcher("inotify(3)")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = guest("checkpoint", "--pid", watcher.pid, tmp_path / "full")
    assert done.returncode == 1
    assert "full: is not empty; give a new directory" in done.stderr
    done = guest("checkpoint", "--pid", watcher.pid, tmp_path / "not" / "there")
    assert done.returncode == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / "full"]
    (tmp_path / "empty").mkdir()
    save(watcher, tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [
        "fdinfo.img", "files.img", "process.img",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_limit_of_descriptors_that_is_too_low(watcher: Remote, tmp_path: Path) -> None:
    watcher("inotify(900)")
    save(watcher, tmp_path / "saved")
    for limit, says in (("512", "beyond this process's limit of 512"), ("64:", "restored 0")):
        prefix = ("prlimit", f"--nofile={limit}", command("fsd-guest"))
        words = (*prefix, "restore", tmp_path / "saved", "--", "true")
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert says in done.stderr
        assert (done.returncode == 0) == (limit == "64:")
