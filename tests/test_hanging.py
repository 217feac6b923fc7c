"""A file system below the share that does not answer: one guest waits, and the server ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsd.files.slowcalls import END
from harness.fuse_driver import Driver
from harness.mounts import command, mounted, wait_until
from protocol import fuse
from protocol.fuse import Opcode

from .test_sandbox_paths import ask

root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and sandboxes")
SLACK = 15.0  # seconds, on a busy machine


@contextmanager
def hung(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server of a FUSE file system at share/sub, with a file x in it."""
    below, point = tmp_path / "below", tmp_path / "share/sub"
    below.mkdir()
    point.mkdir(parents=True)
    (below / "x").touch()
    with mounted(below, point, "--no-agent", "--no-restore", f"--state-dir={tmp_path}") as mount:
        try:
            yield mount.process
        finally:
            mount.process.send_signal(signal.SIGCONT)


@root
@pytest.mark.parametrize("sandbox", ["namespace", "chroot"])
def test_others_are_served_and_the_server_ends(tmp_path: Path, sandbox: str) -> None:
    """Also with a file open there: to close that waits for an answer, whatever is killed."""
    with hung(tmp_path) as below:
        paths = [tmp_path / "a", tmp_path / "b"]
        server = subprocess.Popen(
            [command("fsd"), "virtiofs", f"--shared-dir={tmp_path / 'share'}",
             *(f"--socket-path={path}" for path in paths), f"--sandbox={sandbox}"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        with server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline().startswith(b"fsd: ready")
                one, other = (Driver(path) for path in paths)
                sub = ask(one, Opcode.LOOKUP, 1, b"sub\0")
                x = ask(one, Opcode.LOOKUP, sub, b"x\0")
                opened = ask(one, Opcode.OPEN, x, fuse.OPEN_IN.pack(os.O_RDWR, 0))
                file = other.create(b"file")
                below.send_signal(signal.SIGSTOP)
                fsync = fuse.FSYNC_IN.pack
                create = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o100600, 0, 0)
                for _ in range(6):
                    one.send(Opcode.LOOKUP, 1, b"sub\0")
                    one.send(Opcode.CREATE, 1, create + b"sub\0")
                    one.send(Opcode.GETATTR, x, fuse.GETATTR_IN.pack(0, 0))
                    one.send(Opcode.READ, x, fuse.READ_IN.pack(opened, 0, 100, 0, 0, 0))
                one.send(Opcode.FSYNC, x, fsync(opened, 0))
                other.send(Opcode.FSYNC, file.nodeid, fsync(file.fh, 0))
                assert other.receive() == 0
                assert ask(other, Opcode.LOOKUP, 1, b"file\0") == file.nodeid
                server.terminate()
                begun = time.monotonic()
                server.wait(END + SLACK)
                assert time.monotonic() - begun < END + SLACK
                for guest in (one, other):
                    guest.close()
            finally:
                below.send_signal(signal.SIGCONT)
                server.kill()


@root
@pytest.mark.parametrize("transport", ["devfuse", "libfuse"])
def test_a_mount(tmp_path: Path, transport: str) -> None:
    with hung(tmp_path) as below:
        (tmp_path / "share/f").write_text("beside")
        point = tmp_path / "mount"
        point.mkdir()
        state = f"--state-dir={tmp_path}"
        with mounted(tmp_path / "share", point, f"--transport={transport}", "--no-restore", state):
            assert (point / "sub/x").read_text() == ""
            below.send_signal(signal.SIGSTOP)
            stuck = subprocess.Popen(["cat", point / "sub/x"], stderr=subprocess.DEVNULL)
            read = subprocess.run(
                ["cat", point / "f"], timeout=60, capture_output=True, check=True
            ).stdout
            assert read == b"beside"
            assert stuck.wait(60) == 1  # an error in the end, as nobody waits for ever
            below.send_signal(signal.SIGCONT)
            wait_until(
                lambda: (
                    subprocess.run(["cat", point / "sub/x"], capture_output=True).returncode == 0
                ),
                60,
                "what answers again is not used again",
            )


@root
def test_the_mount_seen_through_itself(tmp_path: Path) -> None:
    """Looking at it would wait for the process that looks."""
    share, point = tmp_path / "share", tmp_path / "mount"
    (share / "inside").mkdir(parents=True)
    point.mkdir()
    with mounted(share, point, "--no-restore", f"--state-dir={tmp_path}"):
        subprocess.run(["mount", "--bind", point, share / "inside"], check=True)
        try:
            wait_until(
                lambda: (
                    b"symbolic links"
                    in subprocess.run(
                        ["ls", point / "inside/inside"], capture_output=True, timeout=60
                    ).stderr
                ),
                30,
                "its own mount is not refused",
            )
        finally:
            subprocess.run(["umount", "-l", share / "inside"], check=True)


HANGS = {
    "the thread of requests": """
import os, sys
from fsd.files import slowcalls
from fsd.files.slowcalls import Outcome, SlowCall, Work
from fsd.transports import tasks
import threading
tasks.END = 0.2
def wait(): os.read(os.pipe()[0], 1)
call = SlowCall("look at /mnt/dead (nfs4)", Work(wait))
threading.Thread(target=Outcome(call), daemon=True).start()
while not slowcalls.running(): pass
tasks.end_in_time()
print("ready", flush=True)
wait()
""",
    "the process inside": """
import os
from fsd.process import sandbox
sandbox._END = 0.2
sys_exit = sandbox.supervise(lambda fd: os.read(os.pipe()[0], 1) and 0, lambda: None)
""",
}


@pytest.mark.parametrize("which", HANGS)
def test_what_hangs_is_named(which: str) -> None:
    """The end comes all the same, by a thread or by the process outside."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS[which]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process:
        try:
            if "thread" in which:
                said, _ = process.communicate(timeout=SLACK)
                assert b"look at /mnt/dead (nfs4)" in said
                assert process.returncode == 1
            else:
                wait_until(lambda: children(process.pid), SLACK, "nothing was started")
                process.terminate()
                said, _ = process.communicate(timeout=SLACK)
                assert b"hung in a system call" in said
        finally:
            process.kill()


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()
