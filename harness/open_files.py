"""Runs in a guest: keeps all kinds of files open, and checks them upon each line of input.

Argument: a directory of the share. Prints READY, then OK (or what is wrong) for each line.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
import traceback


def main(directory: str) -> None:
    """Until the end of input."""
    os.mkdir(directory)
    os.chdir(directory)
    os.mkdir("many")
    for number in range(300):
        os.close(os.open(f"many/{number:04d}-{'x' * 60}", os.O_CREAT))
    numbers = itertools.count(1)
    both = os.open("both", os.O_RDWR | os.O_CREAT, 0o600)
    log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    unlinked = os.open("unlinked", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink("unlinked")
    replaced = os.open("replaced", os.O_RDWR | os.O_CREAT, 0o600)
    os.close(os.open("other", os.O_CREAT))
    os.rename("other", "replaced")
    moved = os.open("before", os.O_RDWR | os.O_CREAT, 0o600)
    os.rename("before", "after")
    nameless = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o600)
    flocked = os.open("flocked", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(flocked, fcntl.LOCK_EX)
    locked = os.open("locked", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.lockf(locked, fcntl.LOCK_EX, 10, 5)
    os.mkdir("gone")
    gone = os.open("gone", os.O_RDONLY)
    os.rmdir("gone")
    files = [both, unlinked, replaced, moved, nameless, flocked, locked]
    for fd in files:
        os.write(fd, b"begin ")
    expected = dict.fromkeys(files, b"begin ")
    logged = b""
    print("READY", flush=True)
    listing: list[str] = []
    names = half_read(listing)
    for line in sys.stdin:
        del line
        try:
            more = b"%d " % next(numbers)
            for fd in files:
                os.write(fd, more)
                expected[fd] += more
                assert os.pread(fd, 1000, 0) == expected[fd], (fd, os.pread(fd, 1000, 0))
                assert os.fstat(fd).st_size == len(expected[fd])
            os.write(log, more)
            logged += more
            with open("log", "rb") as file:
                assert file.read() == logged
            assert os.fstat(unlinked).st_nlink == 0
            assert os.listdir(gone) == []
            assert os.getcwd() == directory
            assert sorted(os.listdir("many"))[0].startswith("0000")
            listing += names
            assert len(listing) == len(set(listing)) == 300, len(listing)
            listing = []
            names = half_read(listing)
            print("OK", flush=True)
        except BaseException:  # noqa: BLE001 - the other process raises it
            print(traceback.format_exc().replace("\n", " | "), flush=True)


def half_read(listing: list[str]) -> list[str]:
    """An iterator over a directory's names that has been read in part."""
    names = (entry.name for entry in os.scandir("many"))
    listing += itertools.islice(names, 10)
    return names  # type: ignore[return-value]


if __name__ == "__main__":
    main(sys.argv[1])
