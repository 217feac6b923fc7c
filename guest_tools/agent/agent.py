"""The agent process: its channel to the server, its life, and the replaying thread.

Apart from the scanner, which finds the marks, and the replayer, which makes the calls.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from protocol import frames

from .. import kernel
from ..beneath import open_file
from ..channel import ChannelError, FileChannel, open_hidden
from ..errors import NO_MOUNT, PASSING
from ..marks import device_of, mount_ids, pids
from . import descriptors, loneclose
from .markcalls import MarkCalls
from .replayer import Replayer
from .scanner import Scanner, calls_at

FAILED = 1
"""Exit status of an agent that should be restarted. 0: the mount is gone."""
_GONE = (errno.ENOTCONN, errno.ENODEV, errno.ECONNABORTED)
"""Errors of the mount after its server has exited for good."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals upon which the agent cleans up and exits."""
_PATIENCE = 1.0
"""Seconds for the server to answer our Bye."""


class Agent:
    """One mount's agent. Raises ChannelError if the channel cannot be opened."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = os.path.abspath(mountpoint)
        self._shares = descriptors.raise_limit()
        try:
            self._root_fd, self._is_private = self._open_root()
            self._device = device_of(os.fstat(self._root_fd))
            self._connect()
        except OSError as error:
            raise ChannelError(self._explain(error)) from None
        except (ValueError, LookupError, TypeError):
            raise ChannelError(f"{self._mountpoint}: its .fsd/status is not from fsd") from None
        self._sending = threading.Lock()
        calls = self._trace_calls() if self._keeps_names else None
        self._is_traced = calls is not None
        self._scanner = Scanner(
            self._device,
            self._send,
            self._still_mounted,
            exits=self._shares.exits,
            calls=calls,
            blind=self._keeps_names and calls is None and not self._takes_calls,
            lone_closes=loneclose.is_possible(),
        )
        self._ender = threading.Thread(target=self._end_on_signal, name="ender", daemon=True)
        self._ended = False
        self._refusals = {0}  # errnos that need not be shown (again)

    def _connect(self) -> None:
        if self._is_private and os.fstatvfs(self._root_fd).f_flag & os.ST_RDONLY:
            with suppress(OSError):  # then opening the channel fails with an error
                kernel.make_writable(self._root_fd)
        fsd_fd = open_hidden(self._root_fd)
        try:
            self._channel = FileChannel(fsd_fd, "control")
            self._read_status(fsd_fd)
        finally:
            os.close(fsd_fd)
        self._replayer = Replayer(
            os.dup(self._root_fd),
            self._open_mountpoint,
            self._channel.fileno(),
            self._shares.opened,
            is_copy=self._is_private,
        )
        self._reader = frames.FrameReader()

    def _read_status(self, fsd_fd: int) -> None:
        """Whether this kernel keeps names of the mount, so that a look-up may cause no request;
        whether the server takes Calls; and its thread, 0 if it runs elsewhere.
        """
        with open(open_file(fsd_fd, b"status", os.O_RDONLY)) as file:
            status = json.load(file)
        guests = [guest for guest in status["guests"] if guest["kind"] == "mount"]
        self._keeps_names = any(guest.get("keeps_names") for guest in guests)
        self._takes_calls = any(guest.get("takes_calls") for guest in guests)
        self._server = int(status["pid"])

    def _trace_calls(self) -> MarkCalls | None:
        try:
            return MarkCalls(self._server)
        except OSError as error:
            if not self._takes_calls:  # else the server lets the kernel keep no names then
                _say(
                    f"cannot trace the calls that set marks: {error.strerror}; marks on names "
                    "that the kernel has cached may be found up to 30 s late"
                )
            return None

    def _reconnect(self) -> None:
        """Reconnect to the next server, which does not know this channel."""
        with self._sending:
            replayer, channel = self._replayer, self._channel
            self._connect()
            with suppress(OSError):  # as the old server's end makes it
                replayer.close()
            with suppress(OSError):
                channel.close()
            self._hello()
        self._scanner.expect_new_server()

    def _hello(self) -> None:
        data = frames.encode(frames.Hello(frames.VERSION, frames.Role.REPLAYER, 0xFFF))
        if self._is_traced and self._takes_calls:
            data += frames.encode(calls_at(time.monotonic()))
        self._channel.send(data)

    def _send(self, data: bytes) -> None:
        """Send a frame of the scanner. If the server is gone, the reading thread notices, too."""
        with self._sending:
            try:
                self._channel.send(data)
            except OSError as error:
                if error.errno not in (errno.ECONNRESET, *_GONE):
                    raise

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EBUSY:
            return f"{self._mountpoint}: another agent is connected; one is enough"
        if error.errno == errno.ENOENT and os.path.isdir(self._mountpoint):
            return f"{self._mountpoint} is {NO_MOUNT}"
        return f"{self._mountpoint}: {error.strerror}"

    def _open_root(self) -> tuple[int, bool]:
        """The mount's root, and whether it is the root of a private copy. On a copy umount finds
        the mount idle, nothing is mounted, and replaying may write where users of the mount may
        not.
        """
        try:
            return kernel.clone_mount(self._mountpoint), True
        except OSError as error:
            if error.errno in PASSING:
                raise
        return os.open(self._mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), False

    def _open_mountpoint(self) -> int:
        """The root as users of the mount have it. Raises OSError if something else is mounted
        there, or if users may not write.
        """
        fd = os.open(self._mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        same = os.path.samestat(os.fstat(fd), os.fstat(self._root_fd))
        if not same or os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            os.close(fd)
            number = errno.EROFS if same else errno.ESTALE
            raise OSError(number, os.strerror(number), self._mountpoint)
        return fd

    def _still_mounted(self) -> bool:
        device = self._device.sdev
        try:
            return bool(mount_ids(device >> 20, device & 0xFFFFF))
        except OSError:  # it could not be read
            return True

    def run(self) -> int:
        """Serve until the mount is gone; prints a line when ready. Returns the exit status 0, upon
        which the agent need not be restarted.
        """
        os.chdir("/")
        os.umask(0)
        threading.excepthook = _end_of_a_thread
        self._hello()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        self._ender.start()
        self._scanner.scan(pids(), full=True)
        self._scanner.start()
        print(f"fsd-guest: ready: {self._mountpoint}", flush=True)
        is_reset = False
        try:
            while True:
                try:
                    if is_reset:
                        self._reconnect()
                    is_reset = False
                    self._serve()
                except ConnectionResetError:
                    is_reset = True
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return 0
        except ChannelError:
            # The program that ends us may close the channel at the same time: the signal makes the
            # difference.
            self._ender.join(None if self._ended else _PATIENCE)
            raise
        finally:
            self._scanner.end()
            self._replayer.close()

    def _serve(self) -> None:
        """Serve until an error. Raises ConnectionResetError if the server was restarted."""
        while True:
            self._reader.feed(self._channel.receive())
            messages = list(self._reader)
            hints: dict[int, list[int]] = {}
            for message in messages:
                if isinstance(message, frames.Hint):
                    hints.setdefault(message.hint, []).append(message.pid)
            for number, threads in hints.items():
                self._scanner.hints(number, threads)
            self._replayer.visibly = self._scanner.knows_fanotify
            self._replayer.batch_begins(messages)
            for message in messages:
                self._handle(message)
            self._replayer.batch_done()

    def _end_on_signal(self) -> None:
        """A thread: a signal handler would not run before the server has answered our read."""
        number = signal.sigwait(_ENDING)
        self._ended = True
        # The server then answers our read; a server that hangs blocks this thread only.
        bye = threading.Thread(target=self._say_bye, daemon=True)
        bye.start()
        bye.join(_PATIENCE)
        self._scanner.end()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        os.kill(os.getpid(), number)

    def _say_bye(self) -> None:
        with suppress(OSError):
            self._channel.send(frames.encode(frames.Bye()))

    def _handle(self, message: frames.Message) -> None:
        if isinstance(message, frames.Order):
            self._scanner.orders_came()
            failure = self._replayer.execute(message)
            if failure or message.op == frames.Op.LONE_CLOSE:
                self._channel.send(frames.encode(frames.Ack(message.seq, failure)))
        elif isinstance(message, frames.Result) and message.errno not in self._refusals:
            number = message.errno if message.errno in errno.errorcode else errno.EIO
            if number in self._refusals:
                return
            self._refusals.add(number)
            _say(
                f"mark on node {message.nodeid} refused: {os.strerror(number)}; "
                "further ones of this kind are not shown, see fsd-guest marks"
            )


def _end_of_a_thread(what: threading.ExceptHookArgs) -> None:
    """Exit with a message: without that thread the agent would only seem to work. The program that
    supervises the agent restarts it, and it reads everything again.
    """
    name = what.thread.name if what.thread is not None else "?"
    reason = f"{what.exc_type.__name__}: {what.exc_value}"
    _say(f"the agent exits and has to be restarted: its thread '{name}' failed: {reason}")
    os._exit(FAILED)


def _say(text: str) -> None:
    """Print a line on stderr, if that is possible."""
    with suppress(OSError, ValueError):
        print(f"fsd-guest: {text}", file=sys.stderr, flush=True)
