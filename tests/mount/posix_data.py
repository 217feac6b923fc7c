"""POSIX cases on what a file holds: open flags, reading and writing, sizes, mappings, deletion."""

import errno
import fcntl
import mmap
import os
import resource
import signal
import stat
import struct
from functools import partial
from pathlib import Path

from tests.mount.posix_support import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    Child,
    case,
    fails,
    fallocate,
    in_child,
    link_descriptor,
    mkdir,
    opened,
    page_aligned,
    pattern,
    write,
)

FS_IOC_GETFLAGS = 0x80086601

# -- opening ---------------------------------------------------------------------------------------


@case()
def open_flags(d: Path) -> None:
    f = d / "f"
    with fails(errno.ENOENT):
        os.open(f, os.O_RDWR)
    with opened(f, os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
        os.write(fd, b"content")
    with fails(errno.EEXIST):
        os.open(f, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    with opened(f, os.O_CREAT | os.O_RDWR) as fd:
        assert os.read(fd, 100) == b"content"
    with opened(f, os.O_RDWR) as old:
        with opened(f, os.O_TRUNC | os.O_WRONLY) as fd:
            assert os.fstat(fd).st_size == os.fstat(old).st_size == 0
            with fails(errno.EBADF):
                os.read(fd, 1)
        assert os.read(old, 100) == b""
    with opened(f) as fd, fails(errno.EBADF):
        os.write(fd, b"x")
    with fails(errno.ENOTDIR):
        os.open(f, os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.EISDIR):
        os.open(d, os.O_RDONLY | os.O_CREAT)
    with opened(d) as fd, fails(errno.EISDIR):
        os.read(fd, 1)


@case()
def open_created_without_permission(d: Path) -> None:
    """The descriptor that creates a file may do what it asked for, whatever the mode."""
    with opened(d / "f", os.O_CREAT | os.O_RDWR, 0) as fd:
        assert os.write(fd, b"data") == 4
        assert os.pread(fd, 10, 0) == b"data"
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0


@case()
def open_keeps_its_access(d: Path) -> None:
    f = write(d / "f", b"data")
    with opened(f, os.O_RDWR) as fd:
        f.chmod(0)
        assert os.pread(fd, 10, 0) == b"data"
        assert os.pwrite(fd, b"DATA!", 0) == 5
        os.ftruncate(fd, 3)
        os.fsync(fd)
        assert os.fstat(fd).st_size == 3
        os.fchmod(fd, 0o600)
    assert f.read_bytes() == b"DAT"


@case()
def open_append(d: Path) -> None:
    f = write(d / "f", b"one")
    with opened(f, os.O_WRONLY | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b" two")
        with opened(f, os.O_WRONLY | os.O_APPEND) as other:
            os.write(other, b" three")
        os.write(fd, b" four")
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(b"one two three four")
    assert f.read_bytes() == b"one two three four"


@case()
def open_flag_changes(d: Path) -> None:
    """O_APPEND set and cleared by fcntl on an open descriptor."""
    f = write(d / "f", b"12345")
    with opened(f, os.O_RDWR) as fd:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"6")
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"x")
    assert f.read_bytes() == b"x23456"


@case()
def open_direct(d: Path) -> None:
    size = 3 * 4096
    with page_aligned(size) as buffer:
        buffer[:] = pattern(size)
        with opened(d / "f", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as fd:
            assert os.pwritev(fd, [buffer], 4096) == size
            buffer[:] = bytes(size)
            assert os.preadv(fd, [buffer], 4096) == size
            assert buffer[:] == pattern(size)
            assert os.preadv(fd, [buffer], 4096 + size) == 0
    assert (d / "f").read_bytes() == bytes(4096) + pattern(size)


@case()
def open_sync(d: Path) -> None:
    for flag in (os.O_SYNC, os.O_DSYNC):
        with opened(d / "f", os.O_CREAT | os.O_RDWR | flag) as fd:
            assert os.write(fd, b"data") == 4
    assert (d / "f").read_bytes() == b"data"


@case()
def open_tmpfile(d: Path) -> None:
    with opened(d, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
        os.write(fd, b"data")
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(d) == []
        link_descriptor(fd, d / "f")
    assert (d / "f").read_bytes() == b"data"


# -- reading and writing ---------------------------------------------------------------------------


@case()
def io_positions(d: Path) -> None:
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.write(fd, b"0123456789") == 10
        assert os.pwrite(fd, b"AB", 2) == 2
        assert os.lseek(fd, 0, os.SEEK_CUR) == 10
        assert os.pread(fd, 4, 1) == b"1AB4"
        assert os.lseek(fd, -3, os.SEEK_END) == 7
        assert os.read(fd, 100) == b"789"
        assert os.read(fd, 100) == b""
        assert os.pread(fd, 10, 1000) == b""
        with fails(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)
        with fails(errno.EINVAL):
            os.pread(fd, 1, -1)
        assert os.writev(fd, [b"x", b"", b"yz"]) == 3
        parts = [bytearray(5), bytearray(20)]
        assert os.preadv(fd, parts, 6) == 7
        assert bytes(parts[0] + parts[1][:2]) == b"6789xyz"


@case()
def io_large(d: Path) -> None:
    data = pattern((5 << 20) + 123)
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.write(fd, data) == len(data)
        assert os.pread(fd, len(data) + 1, 0) == data
        assert os.pread(fd, 300_000, (1 << 20) - 7) == data[(1 << 20) - 7 :][:300_000]
    assert (d / "f").stat().st_size == len(data)


@case()
def io_beyond_4_gib(d: Path) -> None:
    offsets = (0, (1 << 31) - 3, (1 << 32) - 3, (5 << 32) + 1, (1 << 40) + 5)
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        for i, offset in enumerate(offsets):
            assert os.pwrite(fd, pattern(64, i), offset) == 64
        for i, offset in enumerate(offsets):
            assert os.pread(fd, 64, offset) == pattern(64, i)
        assert os.pread(fd, 8, 3 << 32) == bytes(8)
        found = os.fstat(fd)
        assert found.st_size == offsets[-1] + 64
        assert found.st_blocks * 512 < 1 << 20  # sparse
        os.ftruncate(fd, (1 << 32) + 10)
        assert os.lseek(fd, 0, os.SEEK_END) == (1 << 32) + 10
        assert os.pread(fd, 64, (1 << 32) - 3) == pattern(64, 2)[:13]


@case()
def io_limit(d: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
            assert os.write(fd, bytes(6000)) == 5000
            with fails(errno.EFBIG):
                os.write(fd, b"x")
            with fails(errno.EFBIG):
                os.ftruncate(fd, 5001)

    in_child(limited)


@case()
def io_appenders(d: Path) -> None:
    """Concurrent appenders: every record whole, each writer's records in its order."""
    f, writers, count = write(d / "f"), 4, 150

    def append(writer: int) -> None:
        with opened(f, os.O_WRONLY | os.O_APPEND) as fd:
            for i in range(count):
                record = struct.pack("<II", writer, i) + bytes([writer]) * (56 + i % 7)
                assert os.write(fd, record) == len(record)

    children = [Child(partial(append, writer)) for writer in range(writers)]
    for child in children:
        child.join()
    data, position, after = f.read_bytes(), 0, [0] * writers
    while position < len(data):
        writer, i = struct.unpack_from("<II", data, position)
        assert i == after[writer]
        after[writer] += 1
        end = position + 64 + i % 7
        assert data[position + 8 : end] == bytes([writer]) * (56 + i % 7)
        position = end
    assert after == [count] * writers


@case()
def io_sync(d: Path) -> None:
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"data")
        os.fsync(fd)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 10, 0) == b"data"
    with opened(d) as fd:
        os.fsync(fd)
        os.fdatasync(fd)


@case()
def io_copy(d: Path) -> None:
    data = pattern(300_000)
    write(d / "f", data)
    with opened(d / "f") as source, opened(d / "g", os.O_CREAT | os.O_RDWR) as sink:
        assert os.sendfile(sink, source, 0, 100_000) == 100_000
        done = 100_000
        while done < len(data):
            moved = os.copy_file_range(source, sink, len(data) - done, done, done)
            assert moved > 0
            done += moved
        assert os.copy_file_range(source, sink, 10, len(data), 0) == 0
        reader, writer = os.pipe()
        moved = os.splice(source, writer, 4096, offset_src=1000)
        assert os.read(reader, 4096) == data[1000 : 1000 + moved]
        os.close(reader)
        os.close(writer)
    assert (d / "g").read_bytes() == data


# -- sizes -----------------------------------------------------------------------------------------


@case()
def size_truncate(d: Path) -> None:
    f = write(d / "f", b"0123456789")
    os.truncate(f, 4)
    assert f.read_bytes() == b"0123"
    os.truncate(f, 5000)
    assert f.read_bytes() == b"0123" + bytes(4996)
    os.truncate(f, 0)
    assert (f.stat().st_size, f.stat().st_blocks) == (0, 0)
    with opened(f, os.O_RDWR) as fd:
        os.write(fd, b"abcdef")
        os.ftruncate(fd, 2)
        os.ftruncate(fd, 6)  # what was cut must not come back
        assert os.pread(fd, 10, 0) == b"ab\0\0\0\0"
        os.ftruncate(fd, 1)
        os.write(fd, b"!")  # the position has stayed behind the end
        assert os.pread(fd, 10, 0) == b"a\0\0\0\0\0!"
        with fails(errno.EINVAL):
            os.ftruncate(fd, -1)
    with opened(f) as fd, fails(errno.EINVAL):
        os.ftruncate(fd, 0)
    with fails(errno.EISDIR):
        os.truncate(d, 0)
    with fails(errno.ENOENT):
        os.truncate(d / "none", 0)


@case()
def size_times(d: Path) -> None:
    f = write(d / "f", b"data")
    for step in (lambda: os.truncate(f, 2), lambda: f.write_bytes(b"new"), lambda: _add(f)):
        os.utime(f, ns=(10**18, 10**18))
        step()
        assert f.stat().st_mtime_ns > 10**18


def _add(f: Path) -> None:
    with opened(f, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"more")


@case()
def size_sparse(d: Path) -> None:
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"end", 10 << 20)
        assert os.fstat(fd).st_blocks * 512 < 1 << 20
        assert os.pread(fd, 100, (10 << 20) - 97) == bytes(97) + b"end"
        assert os.lseek(fd, 0, os.SEEK_DATA) in (0, 10 << 20)  # "all data" is a legal answer
        with fails(errno.ENXIO):
            os.lseek(fd, 11 << 20, os.SEEK_DATA)


@case()
def size_seek_hole(d: Path) -> None:
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x", 0)
        os.pwrite(fd, b"x", 10 << 20)
        hole = os.lseek(fd, 0, os.SEEK_HOLE)
        assert 0 < hole < 10 << 20
        assert hole < os.lseek(fd, hole, os.SEEK_DATA) <= 10 << 20


@case()
def size_posix_fallocate(d: Path) -> None:
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:  # libc falls back to writing
        os.write(fd, b"data")
        os.posix_fallocate(fd, 0, 100_000)
        assert os.fstat(fd).st_size == 100_000
        assert os.pread(fd, 8, 0) == b"data\0\0\0\0"


@case()
def size_fallocate(d: Path) -> None:
    with opened(d / "f", os.O_CREAT | os.O_RDWR) as fd:
        fallocate(fd, 0, 0, 100_000)
        assert os.fstat(fd).st_size == 100_000
        assert os.fstat(fd).st_blocks * 512 >= 100_000
        fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 200_000)
        assert os.fstat(fd).st_size == 100_000


@case()
def size_punch_hole(d: Path) -> None:
    with opened(write(d / "f", pattern(65536)), os.O_RDWR) as fd:
        fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 4096, 8192)
        assert os.pread(fd, 16384, 0) == pattern(4096) + bytes(8192) + pattern(16384)[12288:]


@case()
def ioctl_get_flags(d: Path) -> None:
    with opened(write(d / "f")) as fd:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytearray(8))


# -- mappings --------------------------------------------------------------------------------------


@case()
def mmap_shared(d: Path) -> None:
    f = write(d / "f", pattern(20_000))
    with opened(f, os.O_RDWR) as fd, mmap.mmap(fd, 20_000) as memory:
        assert memory[:] == pattern(20_000)
        memory[5000:5004] = b"here"
        assert os.pread(fd, 4, 5000) == b"here"
        os.pwrite(fd, b"there", 9000)
        assert memory[9000:9005] == b"there"
        memory.flush()
    assert f.read_bytes()[5000:5004] == b"here"
    assert f.stat().st_size == 20_000


@case()
def mmap_shared_by_two_processes(d: Path) -> None:
    f = write(d / "f", bytes(8192))

    def other() -> None:
        with opened(f, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as memory:
            memory[4096:4101] = b"child"

    with opened(f, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as memory:
        memory[0:6] = b"parent"
        in_child(other)
        assert memory[4096:4101] == b"child"
    data = f.read_bytes()
    assert (data[:6], data[4096:4101]) == (b"parent", b"child")


@case()
def mmap_private(d: Path) -> None:
    f = write(d / "f", b"original" + bytes(100))
    with opened(f) as fd, mmap.mmap(fd, 8, access=mmap.ACCESS_COPY) as memory:
        memory[0:8] = b"changed!"
        assert memory[:] == b"changed!"
    with opened(f) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        assert memory[0:8] == b"original"
    with opened(f) as fd, fails(errno.EACCES):
        mmap.mmap(fd, 8, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@case()
def mmap_outlives_the_name(d: Path) -> None:
    f = write(d / "f", pattern(8192))
    with opened(f, os.O_RDWR) as fd:
        memory = mmap.mmap(fd, 8192)
    with memory:
        f.unlink()
        assert memory[4000:5000] == pattern(8192)[4000:5000]
        memory[0:3] = b"new"
        memory.flush()
        assert memory[0:3] == b"new"


@case()
def mmap_after_truncate(d: Path) -> None:
    f = write(d / "f", pattern(8192))
    with opened(f, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as memory:
        os.ftruncate(fd, 100)
        assert memory[0:4096] == pattern(100) + bytes(3996)  # the last page ends in zeros
        os.ftruncate(fd, 8192)
        assert memory[:] == pattern(100) + bytes(8092)
        memory[8000:8004] = b"tail"
    assert f.read_bytes()[8000:8004] == b"tail"


# -- unlinked but open -----------------------------------------------------------------------------


@case()
def unlinked_file(d: Path) -> None:
    f = write(d / "f", b"data", 0o644)
    with opened(f, os.O_RDWR) as fd, opened(f) as other:
        f.unlink()
        assert os.listdir(d) == []
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 10, 0) == b"data"
        assert os.pwrite(fd, b"more than before", 0) == 16
        assert os.pread(other, 100, 0) == b"more than before"
        os.ftruncate(fd, 4)
        assert os.fstat(other).st_size == 4
        os.fchmod(fd, 0o600)
        assert stat.S_IMODE(os.fstat(other).st_mode) == 0o600
        os.fchown(fd, -1, os.getegid())
        os.utime(fd, ns=(10**18 + 1, 10**18 + 2))
        assert os.fstat(other).st_mtime_ns == 10**18 + 2
        os.setxattr(fd, "user.k", b"v")
        assert os.getxattr(other, "user.k") == b"v"
        os.fsync(fd)
        with opened(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_APPEND) as again:
            os.write(again, b"!")
        assert os.pread(fd, 10, 0) == b"more!"


@case()
def unlinked_and_made_again(d: Path) -> None:
    f = write(d / "f", b"old")
    with opened(f, os.O_RDWR) as fd:
        f.unlink()
        write(f, b"new one")
        assert os.pread(fd, 10, 0) == b"old"
        os.pwrite(fd, b"OLD", 0)
        assert f.read_bytes() == b"new one"
        assert os.fstat(fd).st_ino != f.stat().st_ino


@case()
def unlinked_with_another_name(d: Path) -> None:
    a = write(d / "a", b"data")
    os.link(a, mkdir(d / "sub") / "b")
    with opened(a, os.O_RDWR) as fd:
        a.unlink()
        assert os.fstat(fd).st_nlink == 1
        os.pwrite(fd, b"DATA", 0)
        assert (d / "sub" / "b").read_bytes() == b"DATA"


@case()
def unlinked_directory_as_working_directory(d: Path) -> None:
    def inside() -> None:
        os.chdir(mkdir(d / "sub"))
        os.rmdir(d / "sub")
        with fails(errno.ENOENT):
            os.getcwd()
        with fails(errno.ENOENT):
            Path("f").write_bytes(b"")
        assert os.listdir(".") == []

    in_child(inside)
