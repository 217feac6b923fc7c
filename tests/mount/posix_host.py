"""POSIX cases with one foot on each side: inode numbers, and host changes seen through the mount
by the very next call. Natively both sides are one path, so these hold there too.
"""

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from tests.mount.posix_support import (
    ALICE,
    RENAME_EXCHANGE,
    fails,
    getdents,
    list_all,
    mkdir,
    mode_of,
    opened,
    pattern,
    renameat2,
    settle,
    two_sided,
    write,
)

# -- identity --------------------------------------------------------------------------------------


@two_sided()
def host_inode_numbers(d: Path, host: Path) -> None:
    write(d / "f")
    mkdir(host / "sub")
    os.mkfifo(host / "p")
    (d / "s").symlink_to("f")
    for name in (".", "f", "sub", "p", "s"):
        assert (d / name).lstat().st_ino == (host / name).lstat().st_ino, name
    with opened(d / "f") as fd:
        assert os.fstat(fd).st_ino == (host / "f").stat().st_ino
    with opened(d) as fd, opened(host) as other:
        assert {(entry.ino, entry.type, entry.name) for entry in list_all(fd)} == {
            (entry.ino, entry.type, entry.name) for entry in list_all(other)
        }


@two_sided()
def host_link_is_one_inode(d: Path, host: Path) -> None:
    f = write(d / "f", pattern(5000))
    with opened(f, os.O_RDWR) as fd:
        os.link(host / "f", host / "g")
        settle(d)
        assert (d / "g").stat().st_nlink == os.fstat(fd).st_nlink == 2
        assert (d / "g").samefile(f)
        with opened(d / "g", os.O_RDWR) as other, mmap.mmap(other, 5000) as memory:
            os.pwrite(fd, b"through f", 1000)
            assert memory[1000:1009] == b"through f"  # one page cache
            assert os.pread(other, 9, 1000) == b"through f"


@two_sided()
def host_makes_a_name_again(d: Path, host: Path) -> None:
    """The host may give the same inode number to the new file: still two files."""
    old = write(host / "f", b"old content")
    with opened(d / "f", os.O_RDWR) as fd:
        assert os.pread(fd, 4, 0) == b"old "
        old.unlink()
        write(host / "f", b"new")
        assert (d / "f").read_bytes() == b"new"
        assert os.pread(fd, 100, 0) == b"old content"
        assert os.pwrite(fd, b"OLD", 0) == 3
        assert os.fstat(fd).st_nlink == 0
        assert (d / "f").read_bytes() == b"new"
    for i in range(30):
        (host / "f").unlink()
        kind = i % 3
        if kind == 0:
            write(host / "f", b"round %d" % i)
            assert (d / "f").read_bytes() == b"round %d" % i
        elif kind == 1:
            (host / "f").symlink_to(f"target-{i}")
            assert os.readlink(d / "f") == f"target-{i}"
        else:
            os.mkfifo(host / "f")
            assert stat.S_ISFIFO((d / "f").lstat().st_mode)
        assert (d / "f").lstat().st_ino == (host / "f").lstat().st_ino


@two_sided()
def host_reuses_numbers_of_many(d: Path, host: Path) -> None:
    for generation in range(3):
        for i in range(50):
            write(host / f"{generation}-{i}", b"%d %d" % (generation, i))
        for i in range(50):
            name = f"{generation}-{i}"
            assert (d / name).read_bytes() == b"%d %d" % (generation, i)
            assert (d / name).stat().st_ino == (host / name).stat().st_ino
        for i in range(50):
            (host / f"{generation}-{i}").unlink()
        assert os.listdir(d) == []


# -- what the host does is seen at once ------------------------------------------------------------


@two_sided()
def host_creates(d: Path, host: Path) -> None:
    for i in range(20):
        with fails(errno.ENOENT):
            (d / f"f{i}").stat()  # now the guest knows that it is not there
        write(host / f"f{i}", b"data")
        assert (d / f"f{i}").stat().st_size == 4
    mkdir(host / "sub")
    write(host / "sub" / "g", b"x")
    assert (d / "sub" / "g").read_bytes() == b"x"
    with fails(errno.EEXIST):
        (d / "sub").mkdir()
    with fails(errno.EEXIST):
        os.open(d / "f0", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert len(os.listdir(d)) == 21


@two_sided()
def host_creates_what_the_guest_opens_for_creation(d: Path, host: Path) -> None:
    assert not (d / "f").exists()
    write(host / "f", b"the host's")
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.read(fd, 100) == b"the host's"


@two_sided()
def host_writes(d: Path, host: Path) -> None:
    write(host / "f", b"0" * 6000)
    assert (d / "f").read_bytes() == b"0" * 6000
    with opened(d / "f") as fd:
        assert os.pread(fd, 10, 0) == b"0" * 10
        for i in range(1, 20):
            data = b"%d" % (i % 10) * (6000 if i % 2 else 5000 + i)  # also with the size unchanged
            write(host / "f", data)
            assert (d / "f").stat().st_size == len(data)
            assert (d / "f").read_bytes() == data, f"by name, round {i}"
            assert os.pread(fd, 7000, 0) == data, f"by descriptor, round {i}"
        with opened(host / "f", os.O_WRONLY | os.O_APPEND) as out:
            os.write(out, b"more")
        settle(d)
        assert os.fstat(fd).st_size == 6004
        os.truncate(host / "f", 10)
        settle(d)
        assert os.pread(fd, 7000, 0) == b"9" * 10


@two_sided()
def host_overwrites_in_place(d: Path, host: Path) -> None:
    """Same inode, same size: only the timestamps differ."""
    write(host / "f", b"a" * 4096)
    with opened(host / "f", os.O_WRONLY) as out, opened(d / "f") as fd:
        for letter in b"bcdefghij":
            os.pwrite(out, bytes([letter]) * 4096, 0)
            settle(d)
            assert os.pread(fd, 4096, 0) == bytes([letter]) * 4096


@two_sided()
def host_changes_attributes(d: Path, host: Path) -> None:
    write(host / "f", mode=0o644)
    assert mode_of(d / "f") == 0o644
    with opened(d / "f") as fd:
        for mode in (0o600, 0o755, 0o444):
            (host / "f").chmod(mode)
            assert mode_of(d / "f") == stat.S_IMODE(os.fstat(fd).st_mode) == mode
        os.utime(host / "f", ns=(10**18 + 1, 10**18 + 2))
        settle(d)
        assert os.fstat(fd).st_mtime_ns == (d / "f").stat().st_mtime_ns == 10**18 + 2
        (host / "f").chmod(0o644)
        os.setxattr(host / "f", "user.k", b"v")
        assert os.getxattr(d / "f", "user.k") == b"v"


@two_sided(root=True)
def host_changes_the_owner(d: Path, host: Path) -> None:
    write(host / "f")
    assert (d / "f").stat().st_uid == 0
    os.chown(host / "f", ALICE.uid, ALICE.gid)
    assert ((d / "f").stat().st_uid, (d / "f").stat().st_gid) == (ALICE.uid, ALICE.gid)


@two_sided()
def host_removes(d: Path, host: Path) -> None:
    write(mkdir(host / "sub") / "f", b"data")
    assert (d / "sub" / "f").read_bytes() == b"data"
    with opened(d / "sub" / "f") as fd, opened(d / "sub") as directory:
        (host / "sub" / "f").unlink()
        with fails(errno.ENOENT):
            (d / "sub" / "f").stat()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 10, 0) == b"data"
        assert os.listdir(d / "sub") == []
        (host / "sub").rmdir()
        with fails(errno.ENOENT):
            (d / "sub").stat()
        with fails(errno.ENOENT):
            (d / "sub" / "f").write_bytes(b"x")
        with fails(errno.ENOENT):
            os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        assert os.fstat(directory).st_nlink == 0
    assert os.listdir(d) == []


@two_sided()
def host_replaces_by_rename(d: Path, host: Path) -> None:
    """The way editors and configuration managers save."""
    write(host / "f", b"first")
    for i in range(10):
        with opened(d / "f") as fd:
            before = os.pread(fd, 100, 0)
            write(host / "tmp", b"version %d" % i)
            (host / "tmp").rename(host / "f")
            assert (d / "f").read_bytes() == b"version %d" % i
            assert (d / "f").stat().st_ino == (host / "f").stat().st_ino
            assert os.pread(fd, 100, 0) == before
            assert os.fstat(fd).st_nlink == 0
            assert not (d / "tmp").exists()


@two_sided()
def host_replaces_a_link(d: Path, host: Path) -> None:
    """A ConfigMap's way: `..data` is switched from one directory to the next."""
    for i in range(5):
        write(mkdir(host / f"..{i}") / "key", b"value %d" % i)
        (host / "tmp").symlink_to(f"..{i}")
        (host / "tmp").rename(host / "..data")
        assert os.readlink(d / "..data") == f"..{i}"
        assert (d / "..data" / "key").read_bytes() == b"value %d" % i


@two_sided()
def host_replaces_one_type_by_another(d: Path, host: Path) -> None:
    write(host / "x", b"file")
    assert (d / "x").read_bytes() == b"file"
    (host / "x").unlink()
    write(mkdir(host / "x") / "inside", b"y")
    assert (d / "x" / "inside").read_bytes() == b"y"
    (host / "x" / "inside").unlink()
    (host / "x").rmdir()
    write(host / "x", b"file again")
    assert (d / "x").read_bytes() == b"file again"
    with fails(errno.ENOTDIR):
        (d / "x" / "inside").stat()


@two_sided()
def host_renames_a_directory(d: Path, host: Path) -> None:
    write(mkdir(mkdir(host / "a") / "b") / "f", b"data")
    assert (d / "a" / "b" / "f").read_bytes() == b"data"
    with opened(d / "a" / "b") as fd, opened(d / "a" / "b" / "f", os.O_RDWR) as f:
        (host / "a").rename(host / "c")
        with fails(errno.ENOENT):
            (d / "a" / "b" / "f").stat()
        assert (d / "c" / "b" / "f").read_bytes() == b"data"
        os.pwrite(f, b"DATA", 0)
        with opened("f", at=fd) as again:
            assert os.read(again, 10) == b"DATA"
        mkdir(host / "a")  # another one under the old name
        with fails(errno.ENOENT):
            (d / "a" / "b").stat()
        os.mkdir("made", dir_fd=fd)
    assert (host / "c" / "b" / "made").is_dir()
    (host / "c" / "b").rename(host / "a" / "b")  # to another parent
    assert sorted(os.listdir(d / "a" / "b")) == ["f", "made"]
    assert (d / "a" / "b" / "..").stat().st_ino == (host / "a").stat().st_ino
    assert os.listdir(d / "c") == []


@two_sided()
def host_exchanges(d: Path, host: Path) -> None:
    write(host / "a", b"a")
    write(mkdir(host / "b") / "f", b"f")
    assert (d / "b" / "f").exists()
    for _ in range(4):
        renameat2(host / "a", host / "b", RENAME_EXCHANGE)
        assert (d / "a").is_dir() == (host / "a").is_dir()
        assert (d / "b").is_file() == (host / "b").is_file()
        file, directory = ("a", "b") if (host / "a").is_file() else ("b", "a")
        assert (d / file).read_bytes() == b"a"
        assert (d / directory / "f").read_bytes() == b"f"


@two_sided()
def host_changes_a_directory_while_it_is_read(d: Path, host: Path) -> None:
    names = [f"entry-{i:03}" for i in range(300)]
    for name in names:
        write(host / name)
    seen: list[str] = []
    with opened(d) as fd:
        while part := getdents(fd, 2048):
            seen += [entry.name.decode() for entry in part]
            for i in range(20):
                write(host / f"new-{len(seen)}-{i}")
    assert sorted(name for name in seen if name.startswith("entry")) == names
    assert len(seen) == len(set(seen))


@two_sided()
def host_sees_the_guest(d: Path, host: Path) -> None:
    f = write(d / "f", b"data", 0o600)
    assert (host / "f").read_bytes() == b"data"
    assert mode_of(host / "f") == 0o600
    with opened(f, os.O_RDWR) as fd:
        os.pwrite(fd, b"unflushed", 0)
        assert (host / "f").read_bytes() == b"unflushed"  # no write-back cache
        with mmap.mmap(fd, 9) as memory:
            memory[0:2] = b"UN"
            memory.flush()
            assert (host / "f").read_bytes() == b"UNflushed"
    f.rename(d / "g")
    assert os.listdir(host) == ["g"]
    (d / "g").unlink()
    assert os.listdir(host) == []


# -- a host that moves things under the guest's feet -----------------------------------------------


@two_sided()
def host_swaps_a_directory_for_a_link(d: Path, host: Path) -> None:
    """Between lookup and open: the descriptor stays with the directory that it was opened on."""
    mkdir(host / "inside")
    write(mkdir(host / "elsewhere") / "f", b"elsewhere")
    write(host / "inside" / "f", b"inside")
    with opened(d / "inside", os.O_PATH) as fd:
        (host / "inside").rename(host / "moved")
        (host / "inside").symlink_to("elsewhere")
        with opened("f", at=fd) as f:
            assert os.read(f, 100) == b"inside"
        os.mkdir("made", dir_fd=fd)
        assert os.readlink(d / "inside") == "elsewhere"
    assert sorted(os.listdir(host / "moved")) == ["f", "made"]
    assert os.listdir(host / "elsewhere") == ["f"]


@two_sided()
def host_swaps_a_file_for_a_link(d: Path, host: Path) -> None:
    write(host / "f", b"file")
    write(host / "other", b"other")
    with opened(d / "f", os.O_PATH) as fd:
        (host / "f").rename(host / "moved")
        (host / "f").symlink_to("other")
        with opened(f"/proc/self/fd/{fd}", os.O_RDWR) as f:
            assert os.read(f, 100) == b"file"
            os.ftruncate(f, 0)
        os.chmod(f"/proc/self/fd/{fd}", 0o600)
        with fails(errno.ELOOP):
            os.open(d / "f", os.O_RDONLY | os.O_NOFOLLOW)
    assert (host / "other").read_bytes() == b"other"
    assert (host / "moved").read_bytes() == b""


# -- locks -----------------------------------------------------------------------------------------


@two_sided()
def host_lock_is_seen(d: Path, host: Path) -> None:
    write(host / "f")
    with opened(host / "f", os.O_RDWR) as theirs, opened(d / "f", os.O_RDWR) as mine:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
