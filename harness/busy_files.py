"""Runs in a guest: works on files of the share without a pause, and checks each step.

Argument: a directory of the share. Ends with the end of input: prints how many rounds it made, how
long the longest call took (seconds), and what failed.
"""

from __future__ import annotations

import os
import select
import sys
import time
import zlib


def main(directory: str) -> None:
    """Until the end of input."""
    os.makedirs(directory)
    os.chdir(directory)
    log = os.open("log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    rounds, longest = 0, 0.0
    failures: list[str] = []
    print("READY", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        begun = time.monotonic()
        try:
            one_round(rounds, log)
        except (OSError, AssertionError) as error:
            failures.append(repr(error))
        rounds += 1
        longest = max(longest, time.monotonic() - begun)
    print(rounds, round(longest, 2), *failures, sep="\n", flush=True)


def one_round(number: int, log: int) -> None:
    """Make, write, sync, rename, read, list and remove a file. Raises OSError, AssertionError."""
    data = b"%d " % number * 2000
    for left in ("new", "made"):
        if os.path.exists(left):  # by a round that failed
            os.unlink(left)
    with open("new", "xb") as file:
        file.write(data)
        if number % 8 == 0:
            os.fsync(file.fileno())
    os.rename("new", "made")
    with open("made", "rb") as file:
        assert zlib.crc32(file.read()) == zlib.crc32(data), "not what was written"
    assert "made" in os.listdir(".")
    size = os.fstat(log).st_size
    os.write(log, b"x")
    assert os.fstat(log).st_size == size + 1, "the log is not longer"
    os.unlink("made")


if __name__ == "__main__":
    main(sys.argv[1])
