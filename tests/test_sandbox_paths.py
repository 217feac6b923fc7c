"""Inside the sandbox every absolute path is the guests': the server opens none, whatever it does.

One that is a FIFO would be waited for for ever; one with a text of theirs would be believed.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.fuse_driver import Driver
from protocol import frames, fuse
from protocol.fuse import Opcode
from protocol.masks import EVENTS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="shares another user's files")
ROOT = Path(__file__).parent.parent
TRAPS = (
    "proc/self/mountinfo", "proc/self/status", "proc/1/status", "etc/localtime", "etc/passwd",
    "proc/sys/vm/overcommit_memory", "sys/devices/system/cpu/online", "dev/null", "dev/log",
)  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--sandbox=chroot"], ["--syslog"]])
def test_no_path_is_opened(tmp_path: Path, options: list[str]) -> None:
    share, report, path = tmp_path / "share", tmp_path / "report", tmp_path / "socket"
    for name in TRAPS:
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(share / name)
    (share / "f").touch()
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "harness.audited_server", report,
             f"--shared-dir={share}", f"--socket-path={path}", *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    with closing(server):
        assert server.stdout is not None
        assert server.stdout.readline().startswith(b"fsd: ready")
        guest = Driver(path)
        file = ask(guest, Opcode.LOOKUP, 1, b"f\0")
        opened = ask(guest, Opcode.OPEN, file, fuse.OPEN_IN.pack(os.O_RDWR, 0))
        guest.send(Opcode.FSYNC, file, fuse.FSYNC_IN.pack(opened, 0))  # in a thread
        assert guest.receive() == 0
        control = hidden(guest)
        write(guest, control, frames.Hello(frames.VERSION, frames.Role.REPLAYER, int(EVENTS)))
        write(guest, control, frames.Update(0, 0, 0, int(EVENTS)), frames.ScanEnd(0, 1))
        assert read(guest, control)  # the welcome
        with (share / "f").open():  # how, is looked for in /proc where that may be
            assert read(guest, control)  # the order, once it is known
        guest.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    if "--syslog" not in options:
        assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert report.read_text() == ""


@contextmanager
def closing(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with process:
        try:
            yield
        finally:
            process.kill()


def ask(guest: Driver, opcode: Opcode, nodeid: int, body: bytes) -> int:
    """The first number of the answer."""
    guest.send(opcode, nodeid, body)
    assert guest.receive() == 0
    return int(struct.unpack_from("<Q", guest._answer, fuse.OUT_HEADER.size)[0])


def hidden(guest: Driver) -> tuple[int, int]:
    """`.fsd/control`, opened: its nodeid and handle."""
    node = ask(guest, Opcode.LOOKUP, ask(guest, Opcode.LOOKUP, 1, b".fsd\0"), b"control\0")
    return node, ask(guest, Opcode.OPEN, node, fuse.OPEN_IN.pack(os.O_RDWR, 0))


def write(guest: Driver, control: tuple[int, int], *messages: frames.Message) -> None:
    data = b"".join(map(frames.encode, messages))
    node, fh = control
    guest.send(Opcode.WRITE, node, fuse.WRITE_IN.pack(fh, 0, len(data), 0, 0, 0) + data)
    assert guest.receive() == 0


def read(guest: Driver, control: tuple[int, int]) -> bytes:
    """What the agent is to do; waits for something."""
    node, fh = control
    data = b""
    while not data:
        guest.send(Opcode.READ, node, fuse.READ_IN.pack(fh, 0, 4000, 0, 0, 0))
        assert guest.receive() == 0
        data = guest._answer[fuse.OUT_HEADER.size :]
    return data
