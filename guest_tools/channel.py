"""The guest's end of a channel: `.fsd/control` or `.fsd/session` in a mount, or a Unix socket."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from protocol import frames
from protocol.frames import FSD_DIR, FSD_NAME, Role

from .beneath import open_file, reach

_READ = 128 * 1024
_BUSY_WAIT = 2.0
"""Seconds to wait for an agent that is just exiting; after that it counts as running."""


class ChannelError(Exception):
    """Why there is no channel, in one line for the user."""


def open_hidden(root_fd: int) -> int:
    """An O_PATH descriptor of the hidden directory below a mount's root. Raises OSError: ENOENT if
    there is none. No other file system has its inode number.
    """
    try:
        fd = reach(root_fd, FSD_NAME, directory=True)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        raise
    if os.fstat(fd).st_ino != FSD_DIR:
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return fd


class FileChannel:
    """A hidden file of the mount. pread and pwrite: a waiting read must not hold f_pos."""

    def __init__(self, fsd_fd: int, name: str) -> None:
        deadline = time.monotonic() + _BUSY_WAIT
        while True:
            try:
                self._fd = open_file(fsd_fd, os.fsencode(name), os.O_RDWR)
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def fileno(self) -> int:
        """For poll."""
        return self._fd

    def close(self) -> None:
        """Leave."""
        os.close(self._fd)

    def send(self, data: bytes) -> None:
        """Write whole frames."""
        os.pwrite(self._fd, data, 0)

    def receive(self) -> bytes:
        """Wait for the next bytes without a limit. Raises ChannelError at the end.

        The server answers a read within its bound, quickly if bytes come soon. After an empty
        answer poll(2) sleeps without end; a signal ends it at once. Over virtiofs nothing could
        wake poll, so it does not sleep, and the reads continue.
        """
        ended = False  # POLLHUP: one last read, then the end
        while True:
            data = os.pread(self._fd, _READ, 0)
            if data:
                return data
            if ended:
                raise ChannelError("the server closed the channel")
            ended = any(events & select.POLLHUP for _, events in self._poll.poll())


class SocketChannel:
    """The server's Unix socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ChannelError(
                f"{path}: {error.strerror}; is a server started with --socket?"
            ) from None

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Write whole frames."""
        self._socket.sendall(data)

    def receive(self) -> bytes:
        """The next bytes. Raises ChannelError if the server closed the connection."""
        data = self._socket.recv(_READ)
        if not data:
            raise ChannelError("the server closed the channel")
        return data


class Client:
    """An observer's side of a channel: sends requests, and keeps events that arrive meanwhile."""

    def __init__(self, channel: FileChannel | SocketChannel, role: Role = Role.OBSERVER) -> None:
        self._channel = channel
        self._reader = frames.FrameReader()
        self._requests = 0
        self._events: deque[frames.Event] = deque()
        self.token: bytes | None = None  # by which another server knows us
        self._received = 0  # events since the token was given
        hello = frames.Hello(frames.VERSION, role, 0xFFF)
        try:
            channel.send(frames.encode(hello))
            for message in self._messages():
                if isinstance(message, frames.Welcome):
                    break
        except BaseException:
            channel.close()
            raise

    def keep(self) -> None:
        """Send Keep, so that the next server knows us; call before any other request."""
        self._keep(b"", 0)

    def reconnect_as(self, old: Client) -> bool:
        """Continue at another server as the observer that had ``old``. Returns whether the server
        knows it: then marks hold, and changes since then come as events.
        """
        self._events.extend(old._events)
        self._keep(old.token or b"", old._received)
        return self.token == old.token

    def _keep(self, token: bytes, received: int) -> None:
        self._requests += 1
        self._channel.send(frames.encode(frames.Keep(self._requests, received, token)))
        for message in self._messages():
            if isinstance(message, frames.Kept):
                self.token = message.token
                self._received = received if message.token == token else 0
                break

    def close(self) -> None:
        """End the session; the server drops our marks."""
        self._channel.close()

    def _messages(self) -> Iterator[frames.Message]:
        while True:
            for message in self._reader:
                self._received += isinstance(message, frames.Event)
                yield message
            self._reader.feed(self._channel.receive())

    def _ask(self, message: frames.Resolve | frames.Update) -> frames.Result:
        self._channel.send(frames.encode(message))
        for answer in self._messages():
            if isinstance(answer, frames.Event):
                self._events.append(answer)
            if isinstance(answer, frames.Result) and answer.request == message.request:
                if answer.errno:
                    raise OSError(answer.errno, os.strerror(answer.errno))
                return answer
        raise AssertionError("messages never end")

    def resolve(self, path: bytes) -> frames.Result:
        """The node of a path below the share's root. Raises OSError."""
        self._requests += 1
        return self._ask(frames.Resolve(self._requests, path))

    def update(self, nodeid: int, generation: int, mask: int) -> None:
        """fsnotify_update. Raises OSError."""
        self._requests += 1
        self._ask(frames.Update(self._requests, nodeid, generation, mask))

    def directories(self, node: frames.Result) -> list[bytes]:
        """Names of the directories in a directory. Raises OSError if it cannot be read."""
        self._requests += 1
        ask = frames.List(self._requests, node.nodeid, node.generation)
        self._channel.send(frames.encode(ask))
        names: list[bytes] = []
        number = 0
        for answer in self._messages():
            if isinstance(answer, frames.Event):
                self._events.append(answer)
            elif isinstance(answer, frames.Result) and answer.request == self._requests:
                number = answer.errno
            elif isinstance(answer, frames.Name):
                if not answer.more:
                    break
                names.append(answer.name)
        if number:
            raise OSError(number, os.strerror(number))
        return names

    def stats(self) -> dict[str, Any]:
        """The server's statistics."""
        self._channel.send(frames.encode(frames.StatsRequest(0)))
        text = b""
        for answer in self._messages():
            if isinstance(answer, frames.Stats):
                text += answer.json
                if not answer.more:
                    break
        state: dict[str, Any] = json.loads(text)
        return state

    def events(self) -> Iterator[frames.Event]:
        """Events as they arrive, without end."""
        while True:
            if self._events:  # also those that came while the caller asked something
                yield self._events.popleft()
                continue
            message = next(self._messages())
            if isinstance(message, frames.Event):
                yield message
