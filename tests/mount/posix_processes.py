"""POSIX cases on two processes at one file: pipes, sockets, locks, executables."""

import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

from tests.mount.posix_support import (
    Child,
    case,
    fails,
    in_child,
    mkdir,
    opened,
    turns,
    write,
)

F_OFD_GETLK, F_OFD_SETLK = 36, 37


@case()
def fifo_between_processes(d: Path) -> None:
    os.mkfifo(d / "p")
    payload = bytes(range(256)) * 1000

    def writer() -> None:
        with opened(d / "p", os.O_WRONLY) as fd:
            view = memoryview(payload)
            while view:
                view = view[os.write(fd, view) :]

    child = Child(writer)
    with open(d / "p", "rb") as reader:
        assert reader.read() == payload
    child.join()
    assert (d / "p").stat().st_size == 0


@case()
def socket_between_processes(d: Path) -> None:
    with opened(d) as fd, socket.socket(socket.AF_UNIX) as listener:
        address = f"/proc/self/fd/{fd}/s"
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(30)

        def client() -> None:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(address)
                peer.sendall(b"hello")
                assert peer.recv(100) == b"hello to you"

        child = Child(client)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b"hello"
            connection.sendall(b"hello to you")
        child.join()
        with fails(errno.EADDRINUSE), socket.socket(socket.AF_UNIX) as second:
            second.bind(address)
        (d / "s").unlink()
        with socket.socket(socket.AF_UNIX) as peer, fails(errno.ENOENT):
            peer.connect(address)


@case()
def lock_flock(d: Path) -> None:
    f = write(d / "f")
    with turns() as step, opened(f, os.O_RDWR) as fd:

        def other() -> None:
            with opened(f, os.O_RDWR) as mine:
                with fails(errno.EWOULDBLOCK):
                    fcntl.flock(mine, fcntl.LOCK_SH | fcntl.LOCK_NB)
                step.done("child")
                fcntl.flock(mine, fcntl.LOCK_EX)  # sleeps until the parent lets go
                assert os.pread(mine, 10, 0) == b"released"

        fcntl.flock(fd, fcntl.LOCK_EX)
        child = Child(other)
        step.wait("child")
        os.write(fd, b"released")
        fcntl.flock(fd, fcntl.LOCK_UN)
        child.join()
        fcntl.flock(fd, fcntl.LOCK_SH)

        def shares() -> None:
            with opened(f) as mine:
                fcntl.flock(mine, fcntl.LOCK_SH | fcntl.LOCK_NB)
                with fails(errno.EWOULDBLOCK):
                    fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)

        in_child(shares)


@case()
def lock_fcntl(d: Path) -> None:
    f = write(d / "f", bytes(100))
    with opened(f, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
        fcntl.lockf(fd, fcntl.LOCK_SH, 10, 50)
        owner = os.getpid()

        def other() -> None:
            with opened(f, os.O_RDWR) as mine:
                with fails(errno.EAGAIN, errno.EACCES):
                    fcntl.lockf(mine, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 9)
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 10)
                fcntl.lockf(mine, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 50)
                held = (fcntl.F_WRLCK, 0, 10, owner)
                assert _conflict(mine, fcntl.F_GETLK, fcntl.F_WRLCK) == held

        in_child(other)
        with opened(f):
            pass  # POSIX: closing any descriptor of the file drops this process's locks

        def free() -> None:
            with opened(f, os.O_RDWR) as mine:
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)

        in_child(free)


@case()
def lock_of_an_open_file_description(d: Path) -> None:
    f = write(d / "f", bytes(100))
    with opened(f, os.O_RDWR) as one, opened(f, os.O_RDWR) as two:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 10, 0)
        fcntl.fcntl(one, F_OFD_SETLK, lock)
        with fails(errno.EAGAIN):
            fcntl.fcntl(two, F_OFD_SETLK, lock)
        assert _conflict(two, F_OFD_GETLK, fcntl.F_WRLCK) == (fcntl.F_WRLCK, 0, 10, -1)
        with opened(f):
            pass  # these locks do not care
        with fails(errno.EAGAIN):
            fcntl.fcntl(two, F_OFD_SETLK, lock)


def _conflict(fd: int, command: int, kind: int) -> tuple[int, int, int, int]:
    """The lock in the way of one on the whole file: type, start, length, pid."""
    question = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    found, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, command, question))
    return found, start, length, pid


@case()
def exec_binary_and_script(d: Path) -> None:
    binary = d / "cat"  # a busybox is what it is called
    shutil.copy(shutil.which("cat") or "/bin/cat", binary)
    binary.chmod(0o755)
    write(d / "data", b"content")
    done = subprocess.run([binary, d / "data"], capture_output=True, timeout=30, check=True)
    assert done.stdout == b"content"
    write(d / "script", b'#!/bin/sh\necho "$1"\n', 0o755)
    done = subprocess.run([d / "script", "said"], capture_output=True, timeout=30, check=True)
    assert done.stdout == b"said\n"


@case()
def exec_busy(d: Path) -> None:
    binary = d / "cat"
    shutil.copy(shutil.which("cat") or "/bin/cat", binary)
    binary.chmod(0o755)
    with subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"x")
        running.stdin.flush()
        assert running.stdout.read(1) == b"x"
        with fails(errno.ETXTBSY):
            os.open(binary, os.O_WRONLY)
        binary.unlink()  # removing it is fine
        running.stdin.write(b"y")
        running.stdin.close()
        assert running.stdout.read() == b"y"
    assert running.returncode == 0


@case()
def file_made_and_removed_by_another_process(d: Path) -> None:
    with turns() as step:

        def other() -> None:
            write(d / "f", b"one")
            step.done("child")
            step.wait("parent")
            (d / "f").rename(mkdir(d / "sub") / "g")
            step.done("child")
            step.wait("parent")
            shutil.rmtree(d / "sub")
            step.done("child")

        assert not (d / "f").exists()
        child = Child(other)
        step.wait("child")
        assert (d / "f").read_bytes() == b"one"
        step.done("parent")
        step.wait("child")
        assert not (d / "f").exists()
        assert (d / "sub" / "g").read_bytes() == b"one"
        step.done("parent")
        step.wait("child")
        child.join()
        assert os.listdir(d) == []
