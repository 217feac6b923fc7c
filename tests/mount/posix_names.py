"""POSIX cases on names: file types, links, symbolic links, renames, odd and long names."""

import errno
import os
import socket
import stat
from pathlib import Path

from tests.mount.posix_support import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    case,
    clock_passes,
    fails,
    file_handle,
    link_descriptor,
    mkdir,
    open_by_handle,
    opened,
    renameat2,
    write,
)

# -- file types ------------------------------------------------------------------------------------


@case()
def type_regular(d: Path) -> None:
    os.close(os.open(d / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
    found = (d / "f").lstat()
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_size, found.st_nlink, found.st_uid) == (0, 1, os.geteuid())
    os.mknod(d / "g", stat.S_IFREG | 0o600)
    assert stat.S_ISREG((d / "g").lstat().st_mode)
    assert sorted(os.listdir(d)) == ["f", "g"]


@case()
def type_directory(d: Path) -> None:
    (d / "a").mkdir()
    (d / "a" / "b").mkdir()
    assert stat.S_ISDIR((d / "a" / "b").lstat().st_mode)
    assert (d / "a").stat().st_nlink == 3
    assert (d / "a" / "b" / "..").stat().st_ino == (d / "a").stat().st_ino
    (d / "a" / "b").rmdir()
    assert (d / "a").stat().st_nlink == 2
    assert os.listdir(d / "a") == []


@case()
def type_fifo(d: Path) -> None:
    os.mkfifo(d / "p", 0o600)
    assert stat.S_ISFIFO((d / "p").lstat().st_mode)
    with fails(errno.ENXIO):
        os.open(d / "p", os.O_WRONLY | os.O_NONBLOCK)  # nobody reads


@case()
def type_socket(d: Path) -> None:
    with opened(d) as fd, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{fd}/s")  # the path itself may be too long for a socket
    assert stat.S_ISSOCK((d / "s").lstat().st_mode)
    with fails(errno.ENXIO):
        os.open(d / "s", os.O_RDWR)


@case(root=True)
def type_devices(d: Path) -> None:
    for kind, name in ((stat.S_IFCHR, "c"), (stat.S_IFBLK, "b")):
        os.mknod(d / name, kind | 0o600, os.makedev(259, 70000))
        found = (d / name).lstat()
        assert stat.S_IFMT(found.st_mode) == kind
        assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (259, 70000)


@case()
def type_mismatch(d: Path) -> None:
    f, sub = write(d / "f"), mkdir(d / "sub")
    write(sub / "x")
    with fails(errno.ENOTDIR):
        (f / "x").stat()
    with fails(errno.ENOTDIR):
        os.listdir(f)
    with fails(errno.ENOTDIR):
        f.rmdir()
    with fails(errno.EISDIR):
        sub.unlink()
    with fails(errno.ENOTEMPTY):
        sub.rmdir()
    with fails(errno.EISDIR):
        os.open(sub, os.O_WRONLY)
    with fails(errno.ENOTDIR):
        os.stat(f"{f}/")
    with fails(errno.EEXIST):
        sub.mkdir()
    with fails(errno.EEXIST):
        f.mkdir()
    with fails(errno.EEXIST):
        os.mkfifo(f)
    for call in (os.stat, os.unlink, os.rmdir, os.readlink):
        with fails(errno.ENOENT):
            call(d / "none")
    with fails(errno.ENOENT):
        (d / "none" / "f").mkdir()
    with fails(errno.EINVAL):
        os.readlink(f)


@case()
def remove_dot(d: Path) -> None:
    mkdir(d / "sub")
    with fails(errno.EINVAL):
        os.rmdir(f"{d}/sub/.")
    with fails(errno.ENOTEMPTY):
        os.rmdir(f"{d}/sub/..")
    with fails(errno.EBUSY):
        os.rename(f"{d}/sub/.", f"{d}/other")


# -- hard links ------------------------------------------------------------------------------------


@case()
def link_counts(d: Path) -> None:
    a, b = write(d / "a", b"one"), d / "b"
    os.link(a, b)
    assert a.stat().st_ino == b.stat().st_ino
    assert a.stat().st_nlink == b.stat().st_nlink == 2
    with open(a, "ab") as out:
        out.write(b" two")
    assert b.read_bytes() == b"one two"
    b.chmod(0o600)
    assert stat.S_IMODE(a.stat().st_mode) == 0o600
    a.unlink()
    assert b.stat().st_nlink == 1
    assert b.read_bytes() == b"one two"


@case()
def link_across_directories(d: Path) -> None:
    a = write(mkdir(d / "x") / "a", b"data")
    with opened(a) as fd:
        for i in range(10):
            os.link(a, mkdir(d / f"y{i}") / "a")
            assert os.fstat(fd).st_nlink == i + 2
        for i in range(10):
            (d / f"y{i}" / "a").unlink()
        assert os.fstat(fd).st_nlink == 1


@case()
def link_errors(d: Path) -> None:
    f = write(d / "f")
    with fails(errno.EEXIST):
        os.link(f, f)
    with fails(errno.EPERM):
        os.link(mkdir(d / "sub"), d / "sub2")
    with fails(errno.ENOENT):
        os.link(d / "none", d / "g")
    with fails(errno.ENOTDIR):
        os.link(f, f / "g")


@case()
def link_to_symlink(d: Path) -> None:
    (d / "s").symlink_to("nowhere")
    os.link(d / "s", d / "t", follow_symlinks=False)
    assert (d / "t").lstat().st_ino == (d / "s").lstat().st_ino
    assert os.readlink(d / "t") == "nowhere"


@case()
def link_of_a_descriptor(d: Path) -> None:
    write(d / "f", b"data")
    with opened(d / "f") as fd:
        link_descriptor(fd, d / "g")
    assert (d / "g").samefile(d / "f")


@case(root=True)
def file_handle_survives_a_rename(d: Path) -> None:
    f = write(mkdir(d / "sub") / "f", b"data")
    handles = [file_handle(path) for path in (f, d / "sub", d)]
    with opened(d) as fd:
        (d / "sub").rename(d / "moved")
        for handle, path in zip(handles, (d / "moved" / "f", d / "moved", d), strict=True):
            found = open_by_handle(fd, handle)
            try:
                assert os.fstat(found).st_ino == path.stat().st_ino
            finally:
                os.close(found)


# -- symbolic links --------------------------------------------------------------------------------


@case()
def symlink_targets(d: Path) -> None:
    targets = (b"f", b"../x", b"/absolute//odd/", b"\xff\xfe not utf-8", b"s" * 59, b"t" * 60)
    for i, target in enumerate((*targets, b"l" * 4000, b"m" * 4095)):
        path = os.fsencode(d / f"s{i}")
        os.symlink(target, path)
        assert os.readlink(path) == target
        found = os.lstat(path)
        assert stat.S_ISLNK(found.st_mode)
        assert (found.st_size, found.st_nlink) == (len(target), 1)


@case()
def symlink_is_followed(d: Path) -> None:
    write(mkdir(d / "sub") / "f", b"data")
    (d / "file").symlink_to("sub/f")
    (d / "dir").symlink_to(d / "sub")
    assert (d / "file").read_bytes() == b"data"
    assert (d / "dir" / "f").read_bytes() == b"data"
    with fails(errno.ELOOP):
        os.open(d / "file", os.O_RDONLY | os.O_NOFOLLOW)
    with fails(errno.ENOTDIR):
        os.open(d / "dir", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    os.close(os.open(d / "dir", os.O_RDONLY | os.O_DIRECTORY))
    with opened(d / "file", os.O_PATH | os.O_NOFOLLOW) as fd:
        assert stat.S_ISLNK(os.fstat(fd).st_mode)
    (d / "file").unlink()
    assert (d / "sub" / "f").exists()


@case()
def symlink_dangling(d: Path) -> None:
    (d / "s").symlink_to("made")
    with fails(errno.ENOENT):
        (d / "s").read_bytes()
    with fails(errno.EEXIST):
        os.open(d / "s", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    write(d / "s", b"through")
    assert (d / "made").read_bytes() == b"through"
    with fails(errno.ENOENT):
        os.symlink("", d / "empty")


@case()
def symlink_loop(d: Path) -> None:
    (d / "a").symlink_to("b")
    (d / "b").symlink_to("a")
    with fails(errno.ELOOP):
        (d / "a").stat()
    with fails(errno.ELOOP):
        (d / "b" / "x").stat()


# -- rename ----------------------------------------------------------------------------------------


@case()
def rename_keeps_the_inode(d: Path) -> None:
    f = write(d / "f", b"data")
    before = f.stat()
    clock_passes(f)
    f.rename(mkdir(d / "sub") / "g")
    after = (d / "sub" / "g").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert after.st_ctime_ns > before.st_ctime_ns
    assert not f.exists()
    assert os.listdir(d) == ["sub"]


@case()
def rename_replaces(d: Path) -> None:
    old, new = write(d / "old", b"old"), write(d / "new", b"new")
    os.link(old, d / "spare")
    new.rename(old)
    assert old.read_bytes() == b"new"
    assert (d / "spare").stat().st_nlink == 1
    assert sorted(os.listdir(d)) == ["old", "spare"]


@case()
def rename_over_open_file(d: Path) -> None:
    old, new = write(d / "old", b"old content"), write(d / "new", b"new")
    with opened(old, os.O_RDWR) as fd, opened(new) as moved:
        new.rename(old)
        assert os.pread(fd, 100, 0) == b"old content"
        assert os.pwrite(fd, b"OLD", 0) == 3
        assert os.pread(fd, 100, 0) == b"OLD content"
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(moved, 100, 0) == b"new"
        assert old.read_bytes() == b"new"


@case()
def rename_noreplace(d: Path) -> None:
    a, b = write(d / "a", b"a"), write(d / "b", b"b")
    with fails(errno.EEXIST):
        renameat2(a, b, RENAME_NOREPLACE)
    assert (a.read_bytes(), b.read_bytes()) == (b"a", b"b")
    renameat2(a, d / "c", RENAME_NOREPLACE)
    assert sorted(os.listdir(d)) == ["b", "c"]


@case()
def rename_exchange(d: Path) -> None:
    a, b = write(d / "a", b"a"), write(mkdir(d / "b") / "inside")
    renameat2(a, d / "b", RENAME_EXCHANGE)
    assert (d / "b").read_bytes() == b"a"
    assert os.listdir(d / "a") == ["inside"]
    assert (d / "a" / ".." / "b").is_file()
    with fails(errno.ENOENT):
        renameat2(d / "a", d / "none", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(d / "a", d / "b", RENAME_EXCHANGE | RENAME_NOREPLACE)
    assert not b.exists()


@case()
def rename_directories(d: Path) -> None:
    a, b = mkdir(d / "a"), mkdir(d / "b")
    write(a / "f", b"data")
    mkdir(a / "sub")
    write(b / "g")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        a.rename(b)
    with fails(errno.EINVAL):
        a.rename(a / "sub" / "a")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        (a / "sub").rename(a)
    (b / "g").unlink()
    links = d.stat().st_nlink
    a.rename(b)
    assert d.stat().st_nlink == links - 1
    assert (b / "f").read_bytes() == b"data"
    assert (b / "sub" / "..").samefile(b)


@case()
def rename_directory_to_another_parent(d: Path) -> None:
    x, y = mkdir(d / "x"), mkdir(d / "y")
    write(mkdir(mkdir(x / "m") / "deep") / "f", b"data")
    with opened(x / "m" / "deep") as fd:
        (x / "m").rename(y / "n")
        assert (x.stat().st_nlink, y.stat().st_nlink) == (2, 3)
        assert (y / "n" / "..").samefile(y)
        assert (y / "n" / "deep" / "f").read_bytes() == b"data"
        with opened("f", at=fd) as f:
            assert os.read(f, 10) == b"data"
        os.mkdir("made", dir_fd=fd)
    assert (y / "n" / "deep" / "made").is_dir()


@case()
def rename_mismatch(d: Path) -> None:
    f, sub = write(d / "f"), mkdir(d / "sub")
    with fails(errno.EISDIR):
        f.rename(sub)
    with fails(errno.ENOTDIR):
        sub.rename(f)
    with fails(errno.ENOENT):
        (d / "none").rename(d / "x")
    with fails(errno.ENOENT):
        f.rename(d / "none" / "x")


@case()
def rename_onto_its_own_link(d: Path) -> None:
    os.link(write(d / "a"), d / "b")
    (d / "a").rename(d / "b")  # POSIX: does nothing
    assert sorted(os.listdir(d)) == ["a", "b"]
    (d / "a").rename(d / "a")
    assert (d / "a").stat().st_nlink == 2


# -- odd and long names ----------------------------------------------------------------------------


@case()
def names_of_any_bytes(d: Path) -> None:
    base = os.fsencode(d)
    names = [bytes([i]) for i in range(1, 256) if i not in b"/."]
    names += [b"\xff\xfe\x80", b"new\nline", b"-rf", b"...", b"e\xcc\x81", b"\xc3\xa9", b"A", b"a "]
    names = list(dict.fromkeys(names))
    for name in names:
        with opened(base + b"/" + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.write(fd, name)
    assert sorted(os.listdir(base)) == sorted(names)
    for name in names:
        with opened(base + b"/" + name) as fd:
            assert os.read(fd, 300) == name
        os.unlink(base + b"/" + name)
    assert os.listdir(base) == []


@case()
def names_of_255_bytes(d: Path) -> None:
    for name in (b"n" * 255, b"\xc3\xa9" * 127 + b"x", b"\xff" * 255):
        path = os.fsencode(d) + b"/" + name
        os.mkdir(path)
        assert os.listdir(os.fsencode(d)) == [name]
        os.rename(path, path[:-1])
        os.rename(path[:-1], path)
        os.rmdir(path)
    with fails(errno.ENAMETOOLONG):
        (d / ("n" * 256)).mkdir()
    with fails(errno.ENAMETOOLONG):
        (d / ("n" * 256)).stat()
    with fails(errno.ENAMETOOLONG):
        write(d / "f").rename(d / ("n" * 256))
    with fails(errno.ENAMETOOLONG):
        os.symlink("x", d / ("n" * 256))


@case()
def path_deeper_than_path_max(d: Path) -> None:
    name = "d" * 250
    fds = [os.open(d, os.O_RDONLY)]
    try:
        for _ in range(20):  # 5,000 bytes, more than one path may have
            os.mkdir(name, dir_fd=fds[-1])
            fds.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fds[-1]))
        with opened("f", os.O_CREAT | os.O_RDWR, at=fds[-1]) as f:
            os.write(f, b"deep")
            assert os.pread(f, 10, 0) == b"deep"
        os.rename("f", "g", src_dir_fd=fds[-1], dst_dir_fd=fds[-2])
        os.symlink("g", "s", dir_fd=fds[-2])
        os.link("g", "h", src_dir_fd=fds[-2], dst_dir_fd=fds[-1])
        os.chmod("h", 0o600, dir_fd=fds[-1])
        assert os.stat("s", dir_fd=fds[-2]).st_nlink == 2
        assert sorted(os.listdir(fds[-2])) == [name, "g", "s"]
        with fails(errno.ENAMETOOLONG):
            os.stat(d / "/".join([name] * 20))
        for gone, fd in (("h", fds[-1]), ("g", fds[-2]), ("s", fds[-2])):
            os.unlink(gone, dir_fd=fd)
        while len(fds) > 1:
            os.close(fds.pop())
            os.rmdir(name, dir_fd=fds[-1])
    finally:
        for fd in fds:
            os.close(fd)
    assert os.listdir(d) == []
