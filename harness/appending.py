"""Appends numbered lines to a file, or reads them: runs in guests and on the host.

python3 -m harness.appending write PATH NAME LINES  # prints how many failed with EIO
python3 -m harness.appending read PATH SIZE         # prints the SHA-256 of that many bytes
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections import Counter
from pathlib import Path

SECONDS = 120.0


def line(who: str, number: int) -> bytes:
    """A line of 100 to 299 bytes."""
    return f"{who} {number} ".encode().ljust(100 + number * 7 % 200, b"x") + b"\n"


def check(content: bytes, writers: dict[str, int], *, unsure: int = 0) -> None:
    """Each line of each writer is there, complete and once; ``unsure`` lines may be missing."""
    found = Counter(content.splitlines(keepends=True))
    wanted = Counter(line(who, i) for who, lines in writers.items() for i in range(lines))
    assert found <= wanted, f"lost or torn: {[*(found - wanted)][:3]}"
    assert (wanted - found).total() <= unsure, f"lost: {[*(wanted - found)][:3]}"


def write(path: Path, who: str, lines: int) -> int:
    """Returns how many of them may be missing."""
    failed = 0
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number in range(lines):
        data = line(who, number)
        try:
            assert os.write(fd, data) == len(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            failed += 1
        if number % 10 == 0:
            os.fstat(fd)
    os.close(fd)
    return failed


def read(path: Path, size: int) -> str:
    """Reads until there are that many bytes."""
    digest, end = hashlib.sha256(), time.monotonic() + SECONDS
    with path.open("rb", buffering=0) as file:
        while size > 0:
            data = file.read(size)
            digest.update(data)
            size -= len(data)
            assert time.monotonic() < end, f"{size} bytes did not come"
    return digest.hexdigest()


if __name__ == "__main__":
    print("READY", flush=True)
    what, path, *rest = sys.argv[1:]
    if what == "write":
        print(write(Path(path), rest[0], int(rest[1])), flush=True)
    else:
        print(read(Path(path), int(rest[0])), flush=True)
