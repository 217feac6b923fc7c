"""POSIX cases on attributes: modes, times, extended attributes, statfs."""

import ctypes
import errno
import os
import stat
import time
from pathlib import Path

from tests.mount.posix_support import (
    CLOCK_REALTIME_COARSE,
    UTIME_NOW,
    UTIME_OMIT,
    case,
    clock_passes,
    fails,
    in_child,
    libc,
    mkdir,
    mode_of,
    opened,
    pattern,
    two_sided,
    utimensat,
    write,
)

# -- modes -----------------------------------------------------------------------------------------


@case()
def mode_every_bit(d: Path) -> None:
    f, sub = write(d / "f"), mkdir(d / "sub")
    for mode in (0o7777, 0, 0o4711, 0o2755, 0o1777, 0o644, 0o755):
        for path in (f, sub):
            path.chmod(mode)
            assert mode_of(path) == mode, f"{path.name} {mode:o} {mode_of(path):o}"
    with opened(f) as fd:
        os.fchmod(fd, 0o600)
    assert mode_of(f) == 0o600


@case()
def mode_of_a_link_target(d: Path) -> None:
    write(d / "f", mode=0o644)
    (d / "s").symlink_to("f")
    (d / "s").chmod(0o600)
    assert mode_of(d / "f") == 0o600
    assert mode_of(d / "s") == 0o777


@case()
def mode_and_umask(d: Path) -> None:
    def masked() -> None:
        for mask in (0, 0o22, 0o27, 0o77, 0o777):
            os.umask(mask)
            os.close(os.open(d / f"f{mask}", os.O_CREAT | os.O_WRONLY, 0o666))
            os.mkdir(d / f"d{mask}", 0o777)
            os.mkfifo(d / f"p{mask}", 0o666)
            os.symlink("x", d / f"s{mask}")
            assert mode_of(d / f"f{mask}") == 0o666 & ~mask
            assert mode_of(d / f"d{mask}") == 0o777 & ~mask
            assert mode_of(d / f"p{mask}") == 0o666 & ~mask
            assert mode_of(d / f"s{mask}") == 0o777
        os.umask(0)
        os.close(os.open(d / "suid", os.O_CREAT | os.O_WRONLY, 0o6755))
        assert mode_of(d / "suid") == 0o6755
        os.mkdir(d / "sticky", 0o1777)
        assert mode_of(d / "sticky") == 0o1777

    in_child(masked)


@case()
def mode_changes_ctime_only(d: Path) -> None:
    f = write(d / "f")
    before = f.stat()
    clock_passes(f)
    f.chmod(0o600)
    after = f.stat()
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (after.st_mtime_ns, after.st_atime_ns) == (before.st_mtime_ns, before.st_atime_ns)
    clock_passes(f)
    os.link(f, d / "g")
    assert f.stat().st_ctime_ns > after.st_ctime_ns


# -- times -----------------------------------------------------------------------------------------


@case()
def times_nanoseconds(d: Path) -> None:
    f, sub = write(d / "f"), mkdir(d / "sub")
    for path in (f, sub):
        for second in (0, 1, 1_700_000_000, (1 << 31) + 5, (1 << 32) + 5, -5):
            pair = (second * 10**9 + 123_456_789, second * 10**9 + 987_654_321)
            os.utime(path, ns=pair)
            found = path.stat()
            assert (found.st_atime_ns, found.st_mtime_ns) == pair
    with opened(f, os.O_RDWR) as fd:
        os.utime(fd, ns=(5, 6))
        assert (os.fstat(fd).st_atime_ns, os.fstat(fd).st_mtime_ns) == (5, 6)


@case()
def times_of_a_symlink(d: Path) -> None:
    write(d / "f")
    before = (d / "f").stat()
    (d / "s").symlink_to("f")
    os.utime(d / "s", ns=(10**18 + 1, 10**18 + 2), follow_symlinks=False)
    assert (d / "s").lstat().st_mtime_ns == 10**18 + 2
    assert (d / "f").stat().st_mtime_ns == before.st_mtime_ns


@case()
def times_now_and_omit(d: Path) -> None:
    f = write(d / "f")
    os.utime(f, ns=(10**18 + 1, 10**18 + 2))
    utimensat(f, UTIME_OMIT, 5)
    assert (f.stat().st_atime_ns, f.stat().st_mtime_ns) == (10**18 + 1, 7 * 10**9 + 5)
    utimensat(f, 6, UTIME_OMIT)
    assert (f.stat().st_atime_ns, f.stat().st_mtime_ns) == (7 * 10**9 + 6, 7 * 10**9 + 5)
    ctime = f.stat().st_ctime_ns
    clock_passes(f)
    utimensat(f, UTIME_OMIT, UTIME_OMIT)
    assert f.stat().st_ctime_ns == ctime
    start = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    utimensat(f, 6, UTIME_NOW)
    assert f.stat().st_atime_ns == 7 * 10**9 + 6
    assert start <= f.stat().st_mtime_ns <= time.time_ns()
    utimensat(f, UTIME_NOW, UTIME_OMIT)
    assert start <= f.stat().st_atime_ns <= time.time_ns()
    with fails(errno.EINVAL):
        utimensat(f, 10**9, 0)


# -- extended attributes ---------------------------------------------------------------------------


@case()
def xattr_user(d: Path) -> None:
    f, sub = write(d / "f"), mkdir(d / "sub")
    for path in (f, sub):
        assert _user_names(path) == []
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.two", b"\0bin\xff")
        os.setxattr(path, "user.empty", b"")
        assert os.getxattr(path, "user.two") == b"\0bin\xff"
        assert os.getxattr(path, "user.empty") == b""
        assert _user_names(path) == ["user.empty", "user.one", "user.two"]
        os.removexattr(path, "user.one")
        with fails(errno.ENODATA):
            os.getxattr(path, "user.one")
        with fails(errno.ENODATA):
            os.removexattr(path, "user.one")
        assert _user_names(path) == ["user.empty", "user.two"]
    with opened(f, os.O_RDWR) as fd:
        os.setxattr(fd, "user.fd", b"x")
        assert "user.fd" in os.listxattr(fd)
        os.removexattr(fd, "user.fd")


def _user_names(path: Path) -> list[str]:
    return sorted(name for name in os.listxattr(path) if name.startswith("user."))


@case()
def xattr_flags(d: Path) -> None:
    f = write(d / "f")
    with fails(errno.ENODATA):
        os.setxattr(f, "user.k", b"v", os.XATTR_REPLACE)
    os.setxattr(f, "user.k", b"v", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr(f, "user.k", b"w", os.XATTR_CREATE)
    os.setxattr(f, "user.k", b"w", os.XATTR_REPLACE)
    assert os.getxattr(f, "user.k") == b"w"


@case()
def xattr_sizes(d: Path) -> None:
    f = write(d / "f")
    for size in (1, 100, 2000, 3000):
        os.setxattr(f, "user.k", pattern(size))
        assert os.getxattr(f, "user.k") == pattern(size)
    name = os.fsencode(f)
    assert libc("getxattr", name, b"user.k", None, ctypes.c_size_t(0)) == 3000
    small = ctypes.create_string_buffer(2999)
    with fails(errno.ERANGE):
        libc("getxattr", name, b"user.k", small, ctypes.c_size_t(2999))
    with fails(errno.ERANGE):
        libc("listxattr", name, small, ctypes.c_size_t(3))
    with fails(errno.E2BIG):
        os.setxattr(f, "user.k", bytes(65537))
    with fails(errno.ENOSPC, errno.E2BIG):
        os.setxattr(f, "user.k2", bytes(65536))
    long = "user." + "n" * 250
    os.setxattr(f, long, b"v")
    assert long in os.listxattr(f)
    with fails(errno.ERANGE):
        os.setxattr(f, long + "n", b"v")


@case()
def xattr_names_of_any_bytes(d: Path) -> None:
    f = write(d / "f")
    os.setxattr(f, b"user.\xff\xfe\n", b"v")
    assert b"user.\xff\xfe\n" in [os.fsencode(name) for name in os.listxattr(f)]
    assert os.getxattr(f, b"user.\xff\xfe\n") == b"v"


@case()
def xattr_errors(d: Path) -> None:
    f = write(d / "f")
    (d / "s").symlink_to("f")
    with fails(errno.EPERM):
        os.setxattr(d / "s", "user.k", b"v", follow_symlinks=False)
    os.setxattr(d / "s", "user.k", b"v")
    assert os.getxattr(f, "user.k") == b"v"
    with fails(errno.EOPNOTSUPP):
        os.setxattr(f, "nonsense.k", b"v")
    with fails(errno.ENOENT):
        os.getxattr(d / "none", "user.k")


@case()
def xattr_follows_the_inode(d: Path) -> None:
    f = write(d / "f")
    os.setxattr(f, "user.k", b"v")
    os.link(f, d / "g")
    f.rename(d / "h")
    assert os.getxattr(d / "g", "user.k") == os.getxattr(d / "h", "user.k") == b"v"
    os.setxattr(d / "g", "user.k", b"w")
    assert os.getxattr(d / "h", "user.k") == b"w"


@case(root=True)
def xattr_trusted(d: Path) -> None:
    f = write(d / "f", mode=0o666)
    (d / "s").symlink_to("f")
    for path in (f, d / "s"):
        os.setxattr(path, "trusted.k", b"v", follow_symlinks=False)
        assert os.getxattr(path, "trusted.k", follow_symlinks=False) == b"v"
        assert "trusted.k" in os.listxattr(path, follow_symlinks=False)
    os.removexattr(f, "trusted.k")
    with fails(errno.ENODATA):
        os.getxattr(f, "trusted.k")


# -- statfs and pathconf ---------------------------------------------------------------------------


@two_sided()
def statfs(d: Path, host: Path) -> None:
    with opened(write(d / "f")) as fd:
        for seen in (os.statvfs(d), os.statvfs(d / "f"), os.fstatvfs(fd)):
            real = os.statvfs(host)
            assert seen.f_namemax == real.f_namemax
            assert seen.f_blocks * seen.f_frsize == real.f_blocks * real.f_frsize
            assert seen.f_files == real.f_files
            assert 0 <= seen.f_bavail <= seen.f_bfree <= seen.f_blocks
            assert 0 < seen.f_ffree <= seen.f_files or seen.f_files == 0


@case()
def stat_is_whole(d: Path) -> None:
    f = write(d / "f", pattern(10_000), 0o640)
    found = f.stat()
    assert found.st_dev == d.stat().st_dev
    assert (found.st_size, found.st_nlink, stat.S_IMODE(found.st_mode)) == (10_000, 1, 0o640)
    assert found.st_blksize >= 512
    with opened(f) as fd:
        os.fsync(fd)
        held, after = os.fstat(fd), f.stat()
    assert held.st_blocks == after.st_blocks == 24  # allocated when it was written out
    assert tuple(held)[:7] == tuple(after)[:7]
