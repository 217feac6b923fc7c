"""Marks are a process's: the thread that set them may end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from guest_tools.agent.schedule import RECHECK
from harness.mounts import mounted, wait_until

PROGRAM = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
inotify = libc.inotify_init1(0)
def watch():
    assert libc.inotify_add_watch(inotify, sys.argv[1].encode(), 0x100) > 0  # IN_CREATE
    print("watching", flush=True)
    sys.stdin.readline()
thread = threading.Thread(target=watch)
thread.start()
thread.join()
print("alone", flush=True)
while data := os.read(inotify, 4096):
    print(data[16:].rstrip(b"\\0").decode(), flush=True)
"""


def test_a_mark_outlives_its_thread(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    (source / "d").mkdir(parents=True)
    mountpoint.mkdir()
    with (
        mounted(source, mountpoint) as mount,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, mountpoint / "d"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        ) as watcher,
    ):  # fmt: skip
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        try:
            assert watcher.stdout.readline() == "watching\n"
            mount.wait_armed(mountpoint / "d", pid=watcher.pid)
            watcher.stdin.write("\n")
            watcher.stdin.flush()
            assert watcher.stdout.readline() == "alone\n"
            for number in range(6):  # events make the agent look again at watchers
                (source / "d" / f"n{number}").touch()
                assert watcher.stdout.readline() == f"n{number}\n"
                time.sleep(RECHECK / 4)
            wait_until(lambda: [m for m in mount.marks() if m["armed"]], 1, "the mark is there")
        finally:
            watcher.kill()
