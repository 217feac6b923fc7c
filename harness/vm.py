"""Real guests for tests: Debian's stock kernel in QEMU, with vhost-user-fs devices.

A guest boots in about two seconds, and runs programs for the test. Every wait has a bound. QEMU
ends with the block and with the test's process, whatever happens.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import shutil
import signal as signals
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.guest_image import PORT, image, overlay

QEMU = "qemu-system-x86_64"
C_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
BOOT_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
MEMORY = 512  # MiB
MEMFD = "memory-backend-memfd"
Command = str | Sequence[str | os.PathLike[str]]


class GuestError(AssertionError):
    """The guest did not do what a test relies on."""


@dataclass(frozen=True)
class Done:
    """A program that has ended in the guest. A negative status is the signal that ended it."""

    status: int
    stdout: str
    stderr: str


class GuestProcess:
    """A program in a guest."""

    def __init__(self, guest: Guest, number: int, command: Command) -> None:
        self._guest = guest
        self._number = number
        self._command = command
        self._changed = threading.Condition()
        self._outputs = {"out": bytearray(), "err": bytearray()}
        self._lines_read = 0
        self.pid = 0
        self.status: int | None = None
        self._failed: str | None = None

    def __repr__(self) -> str:
        return f"{self._command!r} in {self._guest}"

    def receive(self, message: dict[str, Any]) -> None:
        """Handle a message about it."""
        with self._changed:
            for name, output in self._outputs.items():
                if name in message:
                    output += base64.b64decode(message[name])
            self.pid = message.get("pid", self.pid)
            self.status = message.get("exit", self.status)
            self._failed = message.get("failed", self._failed)
            self._changed.notify_all()

    def _wait_for(self, condition: Any, timeout: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._failed, timeout)
            problem = self._failed or (None if condition() else f"not within {timeout} s: {what}")
        if problem is not None:
            raise GuestError(f"{self}: {problem}; stdout {self.stdout!r}, stderr {self.stderr!r}")

    @property
    def stdout(self) -> str:
        """Its output so far."""
        return os.fsdecode(bytes(self._outputs["out"]))

    @property
    def stderr(self) -> str:
        """Its error output so far."""
        return os.fsdecode(bytes(self._outputs["err"]))

    def started(self, timeout: float = 10) -> None:
        """Wait until it runs."""
        self._wait_for(lambda: self.pid, timeout, "a start")

    def wait(self, timeout: float = 30) -> Done:
        """Wait for its end."""
        self._wait_for(lambda: self.status is not None, timeout, "its end")
        assert self.status is not None
        return Done(self.status, self.stdout, self.stderr)

    def wait_output(self, text: str, timeout: float = 10, of: str = "out") -> None:
        """Wait until it has written ``text``."""
        wanted, output = os.fsencode(text), self._outputs[of]
        self._wait_for(lambda: wanted in output, timeout, f"{text!r} on std{of}")

    def line(self, timeout: float = 10) -> str:
        """The next line that it writes to stdout."""
        output = self._outputs["out"]
        self._wait_for(
            lambda: output.count(b"\n") > self._lines_read or self.status is not None,
            timeout,
            "another line",
        )
        lines = self.stdout.split("\n")[:-1]
        if len(lines) <= self._lines_read:
            raise GuestError(f"{self} ended, and wrote no more lines; stderr {self.stderr!r}")
        self._lines_read += 1
        return lines[self._lines_read - 1]

    def write(self, data: bytes | None) -> None:
        """Give it input; None ends the input."""
        text = None if data is None else base64.b64encode(data).decode()
        self._guest.send({"id": self._number, "stdin": text})

    def signal(self, number: int = signals.SIGTERM) -> None:
        """Send it a signal, if it still exists."""
        self._guest.send({"id": self._number, "signal": int(number)})


class Guest:
    """A running machine. ``release`` is its kernel's."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], port: socket.socket, monitor: Path
    ) -> None:
        self._name = name
        self.process = process
        self._port = port
        self._monitor = monitor
        self._numbers = itertools.count(1)
        self._processes: dict[int, GuestProcess] = {}
        self._ready = threading.Event()
        self.release = ""
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"port of {name}", daemon=True)
        self._reader.start()

    def __repr__(self) -> str:
        return f"guest {self._name}"

    def wait_ready(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Wait until it accepts commands."""
        if not self._ready.wait(timeout) or not self.release:
            ended = self.process.poll()
            state = "is not ready" if ended is None else f"ended (QEMU's exit code {ended})"
            raise GuestError(f"{self} {state} after a wait of at most {timeout} s")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to its runner."""
        with self._sending:
            try:
                self._port.sendall(json.dumps(message).encode() + b"\n")
            except OSError as error:
                raise GuestError(f"{self} takes no commands: {error}") from None

    def _read(self) -> None:
        with suppress(OSError), self._port.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "ready" in message:
                    self.release = message["ready"]
                    self._ready.set()
                else:
                    self._processes[message["id"]].receive(message)
        self._ready.set()  # nothing comes any more
        for process in list(self._processes.values()):
            if process.status is None:
                process.receive({"failed": "the guest has gone"})

    def start(self, command: Command, **options: Any) -> GuestProcess:
        """Start a program (a string is run by the shell). Options: those of subprocess.Popen with
        plain values, such as cwd, env, user, group, extra_groups, umask.
        """
        if isinstance(command, str):
            argv = ["sh", "-c", command]
        else:
            argv = [os.fspath(word) for word in command]
        number = next(self._numbers)
        process = self._processes[number] = GuestProcess(self, number, command)
        self.send({"id": number, "start": {"argv": argv, **options}})
        process.started()
        return process

    def run(
        self, command: Command, *, timeout: float = 30, check: bool = True, **options: Any
    ) -> Done:
        """Run a program to its end. With ``check``, its status must be 0."""
        process = self.start(command, **options)
        process.write(None)
        try:
            done = process.wait(timeout)
        except GuestError:
            with suppress(GuestError):
                process.signal(signals.SIGKILL)
            raise
        if check and done.status:
            raise GuestError(f"{process}: status {done.status}, {done.stdout!r}, {done.stderr!r}")
        return done

    def python(self, code: str, *arguments: str, timeout: float = 30, **options: Any) -> str:
        """The output of a Python program."""
        return self.run(["python3", "-c", code, *arguments], timeout=timeout, **options).stdout

    def mount(self, tag: str, directory: str = "/mnt", options: str = "") -> None:
        """Mount a share."""
        more = f"-o {shlex.quote(options)} " if options else ""
        where = shlex.quote(directory)
        self.run(f"mkdir -p {where} && mount -t virtiofs {more}{shlex.quote(tag)} {where}")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A command of QEMU's monitor, and what it returns."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
            monitor.settimeout(STOP_TIMEOUT)
            monitor.connect(os.fspath(self._monitor))
            with monitor.makefile("rwb") as lines:
                for name, options in (("qmp_capabilities", {}), (command, arguments)):
                    message = {"execute": name, "arguments": options}
                    lines.write(json.dumps(message).encode() + b"\n")
                    lines.flush()
                    answer: dict[str, Any] = {}
                    while not answer.keys() & {"return", "error"}:  # events, the greeting
                        answer = json.loads(lines.readline())
                    if "error" in answer:
                        raise GuestError(f"{self}: {name}: {answer['error']}")
        return answer["return"]

    def reset(self) -> None:
        """Reset it as the button does; all its programs are gone."""
        self._ready.clear()
        self.qmp("set-action", reboot="reset")
        self.qmp("system_reset")
        self.wait_ready()
        for process in self._processes.values():
            if process.status is None:
                process.receive({"failed": "the guest was reset"})

    def power_off(self) -> None:
        """Power it off; check that QEMU exits normally."""
        self.send({"poweroff": True})
        code = self.process.wait(STOP_TIMEOUT)
        if code:
            raise GuestError(f"{self}: QEMU ended with exit code {code}")

    def close(self) -> None:
        """End QEMU, in whatever state it is."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT)
        self._port.close()
        self._reader.join(STOP_TIMEOUT)


@contextmanager
def guest(
    shares: Mapping[str, Path],
    *,
    name: str = "vm",
    memory: int = MEMORY,
    machine: str = "pc",
    queues: int = 1,
    backend: str = MEMFD,
) -> Iterator[Guest]:
    """A guest with a device for each share: tag -> socket of its vhost-user server.

    ``memory`` in MiB; ``queues``: each device's for requests; ``backend``: QEMU's object that has
    the memory.
    """
    made = image()
    with tempfile.TemporaryDirectory(prefix="fsd-vm-") as scratch:
        folder = Path(scratch)
        console = folder / "console"
        with (folder / "initramfs").open("wb") as archive:
            with made.initramfs.open("rb") as base:
                shutil.copyfileobj(base, archive, 1 << 20)
            archive.write(overlay())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.fspath(folder / "port"))
            listener.listen(1)
            listener.settimeout(BOOT_TIMEOUT)
            process = subprocess.Popen(
                _command(folder, made.kernel, shares, memory, machine, queues, backend),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                port = _accept(listener, process)
            except BaseException:
                process.kill()
                process.communicate(timeout=STOP_TIMEOUT)
                raise
        vm = Guest(name, process, port, folder / "monitor")
        try:
            vm.wait_ready()
            yield vm
        except BaseException as error:
            vm.close()
            text = console.read_text(errors="replace")[-8000:]
            error.add_note(f"--- console of {vm}:\n{text}")
            assert process.stderr is not None
            error.add_note(f"--- stderr of QEMU:\n{process.stderr.read().decode()}")
            raise
        finally:
            vm.close()
            assert process.stderr is not None
            process.stderr.close()


def _accept(listener: socket.socket, process: subprocess.Popen[bytes]) -> socket.socket:
    """QEMU's connection for the port; GuestError with its output if it exits before."""
    listener.settimeout(0.2)
    for _ in range(int(BOOT_TIMEOUT / 0.2)):
        with suppress(TimeoutError):
            port, _ = listener.accept()
            port.settimeout(None)
            return port
        if process.poll() is not None:
            break
    assert process.stderr is not None
    process.kill()
    raise GuestError(f"QEMU did not start: {process.stderr.read().decode().strip()}")


def _command(
    folder: Path,
    kernel: Path,
    shares: Mapping[str, Path],
    memory: int,
    machine: str,
    queues: int,
    backend: str,
) -> list[str]:
    command = ["setpriv", "--pdeathsig", "KILL", QEMU, "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-no-reboot", "-accel", "tcg", "-smp", "1"]
    command += ["-machine", f"{machine},memory-backend=mem", "-m", f"{memory}M"]
    command += ["-object", f"{backend},id=mem,size={memory}M,share=on"]
    command += ["-kernel", os.fspath(kernel), "-initrd", os.fspath(folder / "initramfs")]
    words = "console=ttyS0 quiet cryptomgr.notests mitigations=off panic=-1 reboot=t"
    command += ["-append", words, "-serial", f"file:{folder / 'console'}"]
    command += ["-qmp", f"unix:{folder / 'monitor'},server=on,wait=off"]
    command += ["-device", "virtio-serial-pci"]
    command += ["-chardev", f"socket,id=port,path={folder / 'port'}"]
    command += ["-device", f"virtserialport,chardev=port,name={PORT}"]
    for index, (tag, path) in enumerate(shares.items()):
        command += ["-chardev", f"socket,id=fs{index},path={path}"]
        device = f"vhost-user-fs-pci,chardev=fs{index},tag={tag},num-request-queues={queues}"
        command += ["-device", device]
    return command


@contextmanager
def c_virtiofsd(source: Path, *options: str) -> Iterator[Path]:
    """Debian's virtiofsd in C, serving ``source``: for comparison. Yields its socket."""
    with tempfile.TemporaryDirectory(prefix="fsd-vm-") as scratch:
        path, log = Path(scratch, "socket"), Path(scratch, "log")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener, log.open("wb") as stderr:
            listener.bind(os.fspath(path))
            listener.listen(1)
            command = [
                os.fspath(C_VIRTIOFSD),
                f"--fd={listener.fileno()}",
                "-o",
                f"source={source}",
            ]
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command, *options],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[listener.fileno()],
            )
            try:
                yield path
            except BaseException as error:
                error.add_note(f"--- stderr of virtiofsd:\n{log.read_text(errors='replace')}")
                raise
            finally:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(STOP_TIMEOUT)
