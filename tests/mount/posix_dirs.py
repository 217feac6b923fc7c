"""POSIX cases on reading directories: entries, positions, and changes while somebody reads."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from tests.mount.posix_support import case, fails, getdents, list_all, mkdir, opened, write


def _fill(d: Path, count: int) -> list[bytes]:
    names = [b"entry-%05d" % i for i in range(count)]
    with opened(d) as fd:
        for name in names:
            os.mknod(name, stat.S_IFREG | 0o644, dir_fd=fd)
    return names


@case()
def readdir_types_and_inodes(d: Path) -> None:
    write(d / "f")
    mkdir(d / "sub")
    os.mkfifo(d / "p")
    (d / "s").symlink_to("f")
    os.link(d / "f", d / "g")
    with opened(d) as fd:
        entries = {entry.name: entry for entry in list_all(fd)}
    assert sorted(entries) == [b"f", b"g", b"p", b"s", b"sub"]
    for name, entry in entries.items():
        found = (d / name.decode()).lstat()
        assert entry.ino == found.st_ino, name
        assert entry.type == stat.S_IFMT(found.st_mode) >> 12, name  # DT_* is that


@case()
def readdir_dot_entries(d: Path) -> None:
    with opened(mkdir(d / "sub")) as fd:
        entries = {entry.name: entry.ino for entry in getdents(fd)}
    assert sorted(entries) == [b".", b".."]
    assert entries[b"."] == (d / "sub").stat().st_ino
    assert entries[b".."] == d.stat().st_ino


@case()
def readdir_5000_entries(d: Path) -> None:
    names = _fill(d, 5000)
    with opened(d) as fd:
        for size in (4096, 1 << 20):
            assert sorted(entry.name for entry in list_all(fd, size)) == names, size
            os.lseek(fd, 0, os.SEEK_SET)
        for name in names:
            os.unlink(name, dir_fd=fd)
    assert os.listdir(d) == []


@case()
def readdir_small_buffer(d: Path) -> None:
    long = b"n" * 255
    write(d / long.decode())
    with opened(d) as fd:
        with fails(errno.EINVAL):
            getdents(fd, 16)
        os.lseek(fd, 0, os.SEEK_SET)
        assert [entry.name for entry in list_all(fd, 280)] == [long]


@case()
def readdir_telldir_seekdir(d: Path) -> None:
    _fill(d, 300)
    with opened(d) as fd:
        entries = []
        while part := getdents(fd, 1024):
            entries += part
        order = [entry.name for entry in entries]
        for index in (0, 1, 7, 100, 150, 298, 40, 3):
            os.lseek(fd, entries[index].off, os.SEEK_SET)
            rest = []
            while part := getdents(fd, 4096):
                rest += [entry.name for entry in part]
            assert rest == order[index + 1 :], index


@case()
def readdir_rewind_sees_changes(d: Path) -> None:
    write(d / "a")
    with opened(d) as fd:
        assert [entry.name for entry in list_all(fd)] == [b"a"]
        write(d / "b")
        (d / "a").unlink()
        os.lseek(fd, 0, os.SEEK_SET)
        assert [entry.name for entry in list_all(fd)] == [b"b"]


@case()
def readdir_two_readers(d: Path) -> None:
    names = _fill(d, 400)
    with opened(d) as one, opened(d) as two:
        seen: tuple[list[bytes], list[bytes]] = ([], [])
        more = True
        while more:
            parts = [getdents(one, 512), getdents(two, 1024)]
            for found, part in zip(seen, parts, strict=True):
                found += [entry.name for entry in part if entry.name.startswith(b"entry")]
            more = any(parts)
    assert sorted(seen[0]) == sorted(seen[1]) == names


@case()
def readdir_while_names_come_and_go(d: Path) -> None:
    """A name that stays must be seen exactly once, whatever happens to the others."""
    stay = _fill(d, 500)
    for i in range(200):
        write(d / f"old-{i}")
    seen: list[bytes] = []
    with opened(d) as fd:
        step = 0
        while part := getdents(fd, 1024):
            seen += [entry.name for entry in part]
            for i in range(step * 5, min(step * 5 + 5, 200)):
                (d / f"old-{i}").unlink()
                write(d / f"new-{i}")
            step += 1
    assert step > 10
    assert sorted(name for name in seen if name.startswith(b"entry")) == stay
    assert len(seen) == len(set(seen))


@case()
def readdir_while_removing_what_was_read(d: Path) -> None:
    """What `rm -r` does: no name may be left behind."""
    _fill(d, 1000)
    with opened(d) as fd:
        while part := getdents(fd, 4096):
            for entry in part:
                if entry.name not in (b".", b".."):
                    os.unlink(entry.name, dir_fd=fd)
    assert os.listdir(d) == []


@case()
def removed_directory_still_open(d: Path) -> None:
    with opened(mkdir(d / "sub")) as fd:
        (d / "sub").rmdir()
        assert os.fstat(fd).st_nlink == 0
        with fails(errno.ENOENT):
            getdents(fd)
        with fails(errno.ENOENT):
            os.mkdir("x", dir_fd=fd)
        with fails(errno.ENOENT):
            os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        mkdir(d / "sub")
        assert (d / "sub").stat().st_nlink == 2


@case()
def directory_times_change_with_its_names(d: Path) -> None:
    sub = mkdir(d / "sub")
    steps: tuple[Callable[[], object], ...] = (
        lambda: write(sub / "f"),
        lambda: os.link(sub / "f", sub / "g"),
        lambda: os.rename(sub / "g", sub / "h"),
        lambda: os.symlink("x", sub / "s"),
        lambda: os.mkdir(sub / "m"),
        lambda: os.rmdir(sub / "m"),
        lambda: os.unlink(sub / "h"),
    )
    for i, step in enumerate(steps):
        os.utime(sub, ns=(10**18, 10**18))
        step()
        assert sub.stat().st_mtime_ns > 10**18, i
