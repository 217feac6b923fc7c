"""Marks of a program that looks things up all the time are found at once; and of one whose first
thread has ended. Real processes and real marks, the server's hints played by the test.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from guest_tools.agent.scanner import Scanner
from guest_tools.marks import pids
from harness.mounts import Mount, wait_until

from .test_looking import Server, nodes, scanning, share

__all__ = ["share"]
SETTER = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
inotify = libc.inotify_init1(0)
def run():
    for line in sys.stdin:
        assert libc.inotify_add_watch(inotify, line.strip().encode(), 0x300) > 0
        print("set", flush=True)
if sys.argv[1:] == ["thread"]:
    threading.Thread(target=run).start()
    libc.syscall(60, 0)  # exit(2) of the first thread alone, on x86-64
run()
"""


@contextmanager
def setter(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A program that marks each path that it is given."""
    with subprocess.Popen(
        [sys.executable, "-c", SETTER, *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def set_mark(process: subprocess.Popen[str], path: Path) -> None:
    """Have it mark a path."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "set\n"


@contextmanager
def hinting(running: Scanner, pid: int) -> Iterator[None]:
    """Hints of a process that keeps looking things up."""
    stop = threading.Event()

    def hint() -> None:
        number = 0
        while not stop.wait(0.005):
            number += 1
            running.hints(number, [pid])

    thread = threading.Thread(target=hint)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_mark_of_a_program_that_is_always_looking_is_found_at_once(
    share: Mount, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = Server()
    late = []
    with scanning(share, server) as running, setter() as program, hinting(running, program.pid):
        time.sleep(1.5)  # in which a scanner that slows down does
        for number in range(15):
            name = f"late{number}"
            (share.source / name).mkdir()
            set_mark(program, share.mountpoint / name)
            began = time.monotonic()
            wait_until(lambda name=name: nodes(share, name) <= server.knows(), 10, "the mark")  # type: ignore[misc]
            late.append(time.monotonic() - began)
            time.sleep(0.02)
    assert median(late) < 0.03, late


@pytest.mark.skipif("os.uname().machine != 'x86_64'", reason="exit(2) by its number")
def test_the_marks_of_a_program_whose_first_thread_has_ended(share: Mount) -> None:
    server = Server()
    with setter("thread") as program, scanning(share, server) as running:
        wait_until(lambda: Path(f"/proc/{program.pid}/stat").read_text().split()[2] == "Z", 10)
        set_mark(program, share.mountpoint / "one")
        running.hints(1, [program.pid])
        wait_until(lambda: nodes(share, "one") <= server.knows(), 10, "by a hint")
        assert running.scan(pids(), full=True)
        assert nodes(share, "one") <= server.knows()
        set_mark(program, share.mountpoint / "two")
        assert running.scan(pids(), full=True)
        assert nodes(share, "one", "two") <= server.knows()
        wait_until(lambda: server.ends[-1].hint == 1, 10, "the answer")
        program.kill()
        program.wait(10)
        wait_until(lambda: not server.marks, 20, "the end of the marks")
