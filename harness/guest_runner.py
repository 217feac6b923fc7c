"""Runs in a guest, as its first process: starts the programs that harness/vm.py asks for.

One JSON object per line over a virtio port. From the host: {id, start: {argv, …}}, {id, stdin},
{id, signal}, {poweroff}; to the host: {ready}, {id, pid}, {id, out}, {id, err}, {id, exit}, {id,
failed}. Data is base64. Standard library only; imports nothing of the project.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from typing import Any

POWER_OFF = 0x4321FEDC  # linux/reboot.h
_CHUNK = 64 * 1024


class Runner:
    """The loop around one port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._open: dict[int, int] = {}  # outputs of a process that have not ended
        self._received = b""

    def run(self) -> None:
        """Until the machine is powered off."""
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._selector.register(wake, selectors.EVENT_READ, ("wake", 0))
        self._selector.register(self._port, selectors.EVENT_READ, ("port", 0))
        self._send({"ready": os.uname().release})
        while True:
            for key, _ in self._selector.select():
                kind, number = key.data
                if kind == "port":
                    self._receive()
                elif kind == "wake":
                    os.read(key.fd, _CHUNK)
                else:
                    self._forward(key.fd, kind, number)
            self._reap()

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._port, data) :]

    def _receive(self) -> None:
        self._received += os.read(self._port, _CHUNK)
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._handle(json.loads(line))

    def _handle(self, message: dict[str, Any]) -> None:
        if "poweroff" in message:
            ctypes.CDLL(None).reboot(ctypes.c_int(POWER_OFF))
        number = message["id"]
        if "start" in message:
            self._start(number, **message["start"])
            return
        process = self._processes.get(number)
        if process is None:
            return  # has ended by now
        if "signal" in message:
            process.send_signal(message["signal"])
        elif message["stdin"] is None:
            assert process.stdin is not None
            process.stdin.close()
        else:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(base64.b64decode(message["stdin"]))

    def _start(self, number: int, argv: list[str], **options: Any) -> None:
        try:
            process = subprocess.Popen(
                argv,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                **options,
            )
        except (OSError, ValueError) as error:
            self._send({"id": number, "failed": str(error)})
            return
        assert process.stdout is not None
        assert process.stderr is not None
        self._processes[number] = process
        self._open[number] = 2
        for kind, stream in (("out", process.stdout), ("err", process.stderr)):
            self._selector.register(stream.fileno(), selectors.EVENT_READ, (kind, number))
        self._send({"id": number, "pid": process.pid})

    def _forward(self, fd: int, kind: str, number: int) -> None:
        data = os.read(fd, _CHUNK)
        if data:
            self._send({"id": number, kind: base64.b64encode(data).decode()})
        else:
            self._selector.unregister(fd)
            self._open[number] -= 1

    def _reap(self) -> None:
        """Report which processes have ended, each after the last of its output."""
        for number, process in list(self._processes.items()):
            # A program that it left behind may hold the outputs; its own output is complete.
            if process.poll() is None or (self._open[number] and self._pending(process)):
                continue
            assert process.stdin is not None
            process.stdin.close()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                with suppress(KeyError):  # not there: it was read to its end
                    self._selector.unregister(stream)
                stream.close()
            del self._processes[number], self._open[number]
            self._send({"id": number, "exit": process.returncode})
        with suppress(ChildProcessError):
            while True:  # orphans come to the first process
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or any(p.pid == ended.si_pid for p in self._processes.values()):
                    break
                os.waitpid(ended.si_pid, 0)

    @staticmethod
    def _pending(process: subprocess.Popen[bytes]) -> bool:
        """Whether output waits to be read."""
        count = ctypes.c_int()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            fcntl.ioctl(stream.fileno(), termios.FIONREAD, count)
            if count.value:
                return True
        return False


if __name__ == "__main__":
    Runner(os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)).run()
