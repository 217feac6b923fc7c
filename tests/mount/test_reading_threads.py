"""What the server reads of a thread that sets a mark, which may be a hostile user's."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsd.linux import threads
from harness.mounts import mounted, wait_until

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="knows a system call by its number on x86_64"
)
PROGRAM = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print("ready", flush=True)
sys.stdin.read(1)
libc.inotify_add_watch(libc.inotify_init(), ctypes.c_void_p(address), 2)
print("done", flush=True)
"""


def test_a_path_in_memory_of_the_very_mount(tmp_path: Path) -> None:
    """It is read through the server, which asks for it: nobody waits longer than PATIENCE."""
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    (source / "path").write_bytes(b"/some/path".ljust(4096, b"\0"))
    with (
        mounted(source, mountpoint, "--no-agent") as share,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, mountpoint / "path"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as program,
    ):
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        os.kill(share.process.pid, signal.SIGSTOP)
        try:
            program.stdin.write(b"x")
            program.stdin.flush()
            call = Path(f"/proc/{program.pid}/syscall")
            wait_until(lambda: call.read_text().startswith("254 "))
            begun = time.monotonic()
            for _ in range(100):
                assert not threads.sets_mark(program.pid, b"path")
            assert threads._reader._late, "the memory was there: the test shows nothing"
            assert time.monotonic() - begun < 10 * threads.PATIENCE + 0.5
        finally:
            os.kill(share.process.pid, signal.SIGCONT)
        assert program.stdout.readline() == b"done\n"
        wait_until(lambda: threads._reader.ask(os.getpid()) is None and not threads._reader._late)


def test_a_process_that_is_gone() -> None:
    assert not threads.sets_mark((1 << 22) - 1, b"name")
