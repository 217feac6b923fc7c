"""The agent: publishes what a mount's programs watch, and re-enacts the host's events on it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from contextlib import suppress

from protocol import frames

from . import kernel
from .channel import ChannelError, FileChannel
from .markcalls import MarkCalls
from .marks import device_of, mount_ids, pids
from .replayer import Replayer
from .scanner import Scanner

_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end it, when nothing is left behind."""
_PATIENCE = 1.0
"""Seconds for the server to take our leave."""


class Agent:
    """One mount's agent. Raises ChannelError where it cannot take the channel."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = os.path.abspath(mountpoint)
        try:
            status = os.stat(self._mountpoint)
            self._device = device_of(status)
            self._st_dev = status.st_dev
            self._connect()
        except OSError as error:
            raise ChannelError(self._explain(error)) from None
        self._sending = threading.Lock()
        calls = _trace_calls() if self._keeps_names else None
        self._scanner = Scanner(
            self._device,
            self._send,
            self._still_mounted,
            calls=calls,
            blind=self._keeps_names and calls is None,
        )
        self._ender = threading.Thread(target=self._end_on_signal, name="ender", daemon=True)
        self._ended = False
        self._refusals = {0}  # errnos that need not be shown (again)

    def _connect(self) -> None:
        root_fd = self._open_root()
        fsd_fd = os.open(".fsd", os.O_PATH | os.O_DIRECTORY, dir_fd=root_fd)
        try:
            self._channel = FileChannel(fsd_fd, "control")
            self._keeps_names = _keeps_names(fsd_fd)
        finally:
            os.close(fsd_fd)
        self._replayer = Replayer(root_fd, self._open_mountpoint, self._channel.fileno())
        self._reader = frames.FrameReader()

    def _come_back(self) -> None:
        """To the server that has come after ours: it knows nothing of this channel."""
        with self._sending:
            replayer, channel = self._replayer, self._channel
            self._connect()
            with suppress(OSError):  # as the old server's end makes it
                replayer.close()
            with suppress(OSError):
                channel.close()
            self._hello()
        self._scanner.anew()

    def _hello(self) -> None:
        hello = frames.Hello(frames.VERSION, frames.Role.REPLAYER, 0xFFF)
        self._channel.send(frames.encode(hello))

    def _send(self, data: bytes) -> None:
        """The scanner's frames. A server that has gone need not be told."""
        with self._sending, suppress(ConnectionResetError):
            self._channel.send(data)

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EBUSY:
            return f"{self._mountpoint}: another agent is connected; one is enough"
        if error.errno == errno.ENOENT and os.path.isdir(self._mountpoint):
            return f"{self._mountpoint} is no mount of fsd (or of another user)"
        return f"{self._mountpoint}: {error.strerror}"

    def _open_root(self) -> int:
        """The mount's root; a private copy where that is allowed, so that umount finds it idle.
        What replaying writes goes through it, also where users of the mount may not write.
        """
        try:
            root_fd = kernel.clone_mount(self._mountpoint)
        except OSError:
            return os.open(self._mountpoint, os.O_PATH | os.O_DIRECTORY)
        if os.fstatvfs(root_fd).f_flag & os.ST_RDONLY:
            with suppress(OSError):  # then opening the channel fails, and says so
                kernel.make_writable(root_fd)
        return root_fd

    def _open_mountpoint(self) -> int:
        """The root as users of the mount have it. Raises OSError where something else is there, or
        where they may not write.
        """
        fd = os.open(self._mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        same = os.fstat(fd).st_dev == self._st_dev
        if not same or os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            os.close(fd)
            number = errno.EROFS if same else errno.ESTALE
            raise OSError(number, os.strerror(number), self._mountpoint)
        return fd

    def _still_mounted(self) -> bool:
        device = self._device.sdev
        return bool(mount_ids(device >> 20, device & 0xFFFFF))

    def run(self) -> int:
        """Serve until the mount goes; prints a line when it is ready. Returns 0, the exit status
        that says so: whoever started the agent need not start another.
        """
        os.chdir("/")
        os.umask(0)
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
                        self._come_back()
                    is_reset = False
                    self._serve()
                except ConnectionResetError:
                    is_reset = True
        except OSError as error:
            gone = error.errno in (errno.ENOTCONN, errno.ENODEV, errno.ECONNABORTED)
            if not gone:
                raise
            return 0
        except ChannelError:
            if self._ended:
                self._ender.join()
            raise
        finally:
            self._scanner.end()
            self._replayer.close()

    def _serve(self) -> None:
        """Until an error. Raises ConnectionResetError where the server was started again."""
        while True:
            self._reader.feed(self._channel.receive())
            self._replayer.visibly = self._scanner.knows_fanotify
            for message in self._reader:
                self._handle(message)
            self._replayer.batch_done()

    def _end_on_signal(self) -> None:
        """A thread: a signal's handler would not run before the server has answered our read."""
        number = signal.sigwait(_ENDING)
        self._ended = True
        # The server answers our read upon it; one that does not go on keeps this thread alone.
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
            if failure:
                self._channel.send(frames.encode(frames.Ack(message.seq, failure)))
        elif isinstance(message, frames.Hint):
            self._scanner.hint(message.hint, message.pid)
        elif isinstance(message, frames.Result) and message.errno not in self._refusals:
            self._refusals.add(message.errno)
            reason = os.strerror(message.errno)
            print(
                f"fsd-guest: mark on node {message.nodeid} refused: {reason}; "
                "more of the same are not shown, see fsd-guest marks",
                file=sys.stderr,
            )


def _keeps_names(fsd_fd: int) -> bool:
    """Whether this kernel keeps names of the mount, so that a look-up may make no request."""
    fd = os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fsd_fd)
    with open(fd) as status:
        guests = json.load(status)["guests"]
    return any(guest["kind"] == "mount" and guest.get("keeps_names") for guest in guests)


def _trace_calls() -> MarkCalls | None:
    try:
        return MarkCalls()
    except OSError as error:
        print(
            f"fsd-guest: no trace of the calls that set marks: {error.strerror}; marks on names "
            "that the kernel has kept may be found up to 30 s late",
            file=sys.stderr,
        )
        return None
