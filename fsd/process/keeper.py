"""The keeper: holds descriptors for a server without systemd, and restarts the server when it
exits. It speaks the service manager's side of systemd.py.

Small and apart because it must outlive every server: it does not interpret what it holds.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import structlog

from ..linux import fdpassing
from .socketfile import SocketFile
from .systemd import Manager

log = structlog.get_logger()
KEEPER = "FSD_KEEPER"
"""Environment variable of a server that has a keeper."""
_FIRST = 3  # SD_LISTEN_FDS_START
_LONGEST = 64 * 1024
STOP_TIMEOUT = 10.0
"""Seconds for a server to exit before it is killed."""
LIVED = 5.0
"""Seconds after its start after which an exit no longer counts as an early one."""
DEATHS = 5
"""Early exits in a row; then restarting is pointless."""
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class Keeper:
    """Runs ``command`` with the given sockets, again and again. SIGTERM, SIGINT and SIGHUP end
    both. SIGUSR2 replaces the server by the installed version. ``paths``: where the server listens,
    by the names under which it stores its listeners; they are removed at the end.
    """

    def __init__(
        self, command: Sequence[str], sockets: Sequence[int], paths: Mapping[str, str]
    ) -> None:
        self._command = command
        self._sockets = sockets
        self._paths = paths
        self._files: dict[str, SocketFile] = {}  # at these paths, bound by the server
        self._held: list[tuple[str, int]] = []
        self._manager = Manager()
        self._child = 0
        self._started = self._end_by = 0.0
        self._young = 0  # deaths in a row
        self._is_ready = self._is_ending = self._is_asked = False

    def run(self) -> int:
        """Run until a signal, or until the server exits normally. Returns the exit status."""
        # VMMs' descriptors are held here, too: those of one guest must not displace another's.
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with ExitStack() as cleanup:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="fsd-keep-"))
            self._endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            cleanup.enter_context(self._endpoint)
            self._endpoint.bind(os.path.join(folder, "notify"))
            self._endpoint.setblocking(False)
            cleanup.callback(self._drop_all)
            wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            cleanup.callback(os.close, wake)
            cleanup.callback(os.close, woken)
            for number in (*_ENDING, signal.SIGUSR2, signal.SIGCHLD):
                signal.signal(number, self._on_signal)
            signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
            self._start()
            while True:
                wait = self._end_by - time.monotonic() if self._end_by else None
                select.select([self._endpoint.fileno(), wake], [], [], wait and max(wait, 0.0))
                with suppress(BlockingIOError):
                    os.read(wake, 512)
                self._receive()
                if self._end_by and time.monotonic() >= self._end_by:
                    os.kill(self._child, signal.SIGKILL)
                    self._end_by = 0.0
                pid, status = os.waitpid(self._child, os.WNOHANG)
                if pid:
                    self._receive()
                    code = os.waitstatus_to_exitcode(status)
                    if not self._should_restart(code):
                        return 0 if self._is_ending and self._is_asked else abs(code)
                    self._start()

    def _on_signal(self, number: int, _frame: object) -> None:
        if number in _ENDING:
            self._is_ending = True
        if number != signal.SIGCHLD and self._child:
            self._is_asked = True
            with suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)
            self._end_by = time.monotonic() + STOP_TIMEOUT

    def _should_restart(self, code: int) -> bool:
        """Whether to start another server after one that exited so."""
        if self._is_ending or not (self._is_ready and (code or self._is_asked)):
            return False
        if time.monotonic() - self._started > LIVED or self._is_asked:
            self._young = 0
        self._young += 1
        log.warning("the server exited, starting it again", status=code)
        return self._young <= DEATHS

    # Messages from the server

    def _receive(self) -> None:
        while True:
            try:
                data, fds = fdpassing.receive(self._endpoint, _LONGEST, fdpassing.MOST)
            except BlockingIOError:
                return
            lines = (line.partition("=") for line in data.decode(errors="replace").splitlines())
            self._obey({name: value for name, _, value in lines}, fds)

    def _obey(self, fields: Mapping[str, str], fds: Sequence[int]) -> None:
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            self._held += ((name, fd) for fd in fds)
            self._note_file(name)
        else:
            for fd in fds:
                os.close(fd)
        if fields.get("FDSTOREREMOVE") == "1":
            for held in [held for held in self._held if held[0] == name]:
                self._held.remove(held)
                os.close(held[1])
        if fields.get("STOPPING") == "1":
            self._is_asked = True
        if fields.get("READY") == "1" and not self._is_ready:
            self._is_ready = True
            self._manager.notify("READY=1")

    def _note_file(self, name: str) -> None:
        """The first server has bound this socket before any guest could connect, so it is the
        server's own.
        """
        if name in self._paths and name not in self._files and not self._is_ready:
            with suppress(OSError):
                self._files[name] = SocketFile(self._paths[name])

    def _drop_all(self) -> None:
        """At the end no guest can reconnect. The stored data comes from guests' VMMs, too: it is
        not interpreted.
        """
        for file in self._files.values():
            file.remove()
        for _, fd in self._held:
            os.close(fd)

    # The server

    def _start(self) -> None:
        self._is_asked, self._end_by = False, 0.0
        self._started = time.monotonic()
        names = [*("" for _ in self._sockets), *(name for name, _ in self._held)]
        fds = [*self._sockets, *(fd for _, fd in self._held)]
        environment = {
            **os.environ,
            KEEPER: "1",
            "NOTIFY_SOCKET": self._endpoint.getsockname(),
            "FDSTORE": str(1 << 16),
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        sys.stdout.flush()
        self._child = os.fork()
        if not self._child:
            try:
                _become(self._command, fds, environment)
            except BaseException as error:  # noqa: BLE001 - the child ends here
                print(f"fsd: {self._command[0]}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(127)


def _become(command: Sequence[str], fds: Sequence[int], environment: dict[str, str]) -> None:
    """Execute a command with these descriptors, numbered from 3."""
    signal.set_wakeup_fd(-1)
    for number in (*_ENDING, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    behind = _FIRST + len(fds)
    for place, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, behind) for fd in fds]):
        os.dup2(fd, _FIRST + place)
    os.execve(command[0], [*command], {**environment, "LISTEN_PID": str(os.getpid())})
