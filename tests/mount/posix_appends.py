"""POSIX cases on appends beside a host that writes to the same file: nothing is overwritten,
whatever end the guest's kernel remembers.
"""

import fcntl
import mmap
import os
from collections import Counter
from functools import partial
from pathlib import Path

from tests.mount.posix_support import Child, opened, settle, two_sided, write

BOTH_WAYS = (os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_APPEND)


@two_sided()
def append_beside_the_host(d: Path, host: Path) -> None:
    for number, flags in enumerate(BOTH_WAYS):
        log = d / f"log{number}"
        expected = b""
        with (
            opened(log, flags | os.O_CREAT | os.O_TRUNC) as guest,
            opened(log) as reader,
            opened(host / log.name, os.O_WRONLY | os.O_APPEND) as other,
        ):
            for i in range(150):  # some lie across the end of a page
                for fd, who in ((guest, "guest"), (other, "host"), (other, "host again")):
                    line = b"%s %d\n" % (who.encode(), i)
                    assert os.write(fd, line) == len(line)
                    expected += line
                    if i % 3 == 0:
                        settle(d)
                        assert os.fstat(guest).st_size == log.stat().st_size == len(expected)
                        assert os.pread(reader, 10_000, 0) == expected[:10_000]
            settle(d)
            assert os.lseek(guest, 0, os.SEEK_END) == len(expected)
            assert os.pwrite(guest, b"not at the start", 0) == 16
        assert log.read_bytes() == (host / log.name).read_bytes() == expected + b"not at the start"


@two_sided()
def append_after_the_host_has_cut(d: Path, host: Path) -> None:
    """The way of logrotate's copytruncate."""
    for flags in BOTH_WAYS:
        log = write(d / "log", b"old " * 2000)
        with opened(log, flags) as fd:
            os.write(fd, b"last\n")
            os.truncate(host / "log", 0)
            settle(d)
            os.write(fd, b"first\n")
            os.write(fd, b"second\n")
            assert os.fstat(fd).st_size == 13
        assert log.read_bytes() == (host / "log").read_bytes() == b"first\nsecond\n"


@two_sided()
def append_by_many(d: Path, host: Path) -> None:
    """No line is lost or torn."""
    lines, size = 300, 100
    write(host / "log")

    def add(who: int, path: Path) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            for i in range(lines):
                assert os.write(fd, b"%d %d ".ljust(size - 1, b"x") % (who, i) + b"\n")
                if who == 0:
                    path.stat()

    children = [Child(partial(add, who, (d, host)[who // 3] / "log")) for who in range(6)]
    for child in children:
        child.join()
    found = Counter(tuple(line.split()[:2]) for line in (host / "log").read_bytes().splitlines())
    assert found == Counter((b"%d" % who, b"%d" % i) for who in range(6) for i in range(lines))


@two_sided()
def append_is_not_what_a_mapping_writes(d: Path, host: Path) -> None:
    """Pages have their place, also of a file that is mapped by a descriptor that appends."""
    page = mmap.PAGESIZE
    log = write(d / "log", bytes(2 * page))
    with (
        opened(log, os.O_RDWR | os.O_APPEND) as fd,
        opened(host / "log", os.O_WRONLY | os.O_APPEND) as other,
        mmap.mmap(fd, 2 * page) as memory,
    ):
        expected = bytearray(2 * page)
        for i in range(4):
            os.write(other, b"host")
            at = page * (i % 2) + i
            memory[at : at + 5] = expected[at : at + 5] = b"pages"
            memory.flush()
            os.write(fd, b"guest")
            expected += b"hostguest"
            assert (host / "log").read_bytes() == bytes(expected)
            assert log.read_bytes() == bytes(expected)


@two_sided()
def append_no_more(d: Path, host: Path) -> None:
    """O_APPEND taken off by fcntl(2)."""
    for flags in BOTH_WAYS:
        log = write(d / "log", b"0123456789")
        with opened(log, flags) as fd, opened(host / "log", os.O_WRONLY | os.O_APPEND) as other:
            os.write(fd, b"-guest")
            os.write(other, b"-host")
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            os.pwrite(fd, b"xyz", 2)
            assert (host / "log").read_bytes() == b"01xyz56789-guest-host"
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
            os.write(other, b"-more")
            os.write(fd, b"-end")
        assert log.read_bytes() == b"01xyz56789-guest-host-more-end"


@two_sided()
def append_from_now_on(d: Path, host: Path) -> None:
    """O_APPEND set by fcntl(2)."""
    log = write(d / "log", b"0123456789")
    with opened(log, os.O_RDWR) as fd, opened(host / "log", os.O_WRONLY | os.O_APPEND) as other:
        os.pwrite(fd, b"x", 0)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.write(other, b"-host")
        os.write(fd, b"-guest")
    assert (host / "log").read_bytes() == b"x123456789-host-guest"
