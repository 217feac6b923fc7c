"""The vhost-user messages of one VMM: from its socket, and the answers.

Apart because of the order: a process that ends, at whatever place, leaves a message to the next one
that takes over the connection, or has carried it out.
"""

from __future__ import annotations

import os
import socket
import sys

import trio

from protocol.vhostuser import (
    HEADER_SIZE,
    MAX_FDS,
    Request,
    RequestReader,
    Type,
    VhostUserError,
    descriptors_of,
    name_of,
    size_of,
)

from ..linux import fdpassing, syscalls
from ..virtio.eventfds import is_eventfd
from ..virtio.mapping import is_memory

_ADD_REGION = int(Type.ADD_MEM_REG).to_bytes(4, sys.byteorder)
"""Begins the message that cannot be carried out twice."""
ANSWER_WAIT = 1.0
"""Seconds in which a VMM must make room for an answer: its socket has room for hundreds."""


class Messages:
    """The messages of one connection."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._socket = connection
        self.is_broken = False
        """Whether a descriptor came that nothing can be done with."""
        self.unclosed: list[int] = []
        """Descriptors whose close(2) may wait, as on a file system in user space."""

    async def next(self) -> tuple[Request, int] | None:
        """The VMM's next message, and how many bytes of it are still in the socket; None if it has
        disconnected. Raises VhostUserError, OSError.

        A message stays there until it was carried out: a process that ends before leaves all of it
        to the next one. Not what cannot be done twice, and what was not sent at once.
        """
        reader = RequestReader()
        request = None
        try:
            begun = await self._socket.recv(HEADER_SIZE, socket.MSG_PEEK)
            if size := size_of(begun):
                data = await self._socket.recv(size, socket.MSG_PEEK)
                count = descriptors_of(data) if len(data) == size else None
                if count is not None and not data.startswith(_ADD_REGION):
                    # Not without need: the kernel adds those of later messages.
                    fds = (await self._receive(size, socket.MSG_PEEK))[1] if count else ()
                    request = reader.receive(data[:HEADER_SIZE], fds)
                    request = request or reader.receive(data[HEADER_SIZE:])
                    assert request is not None
                    return request, size
            while request is None:
                data, fds = await self._receive(reader.wanted)
                if not data:
                    return None
                request = reader.receive(data, fds)
            return request, 0
        finally:
            for fd in reader.take_fds():
                os.close(fd)

    async def finish(
        self, request: Request, unread: int, answer: bytes, answer_fds: tuple[int, ...]
    ) -> None:
        """Read the bytes of a message that was carried out, then answer it: a process that is
        killed between these two leaves the VMM without the answer. In the other order it would get
        two. Raises VhostUserError, OSError.
        """
        with trio.move_on_after(ANSWER_WAIT, shield=True) as scope:
            if unread:
                _, fds = await self._receive(unread)
                for fd in fds:
                    os.close(fd)
                if len(fds) != len(request.fds):
                    raise VhostUserError(f"{name_of(request.type)}: {len(fds)} descriptors")
            if answer_fds:
                rights = fdpassing.ancillary(answer_fds)
                answer = answer[await self._socket.sendmsg([answer], rights) :]
            while answer:
                answer = answer[await self._socket.send(answer) :]
        if scope.cancelled_caught:
            raise VhostUserError("answers are not read")

    async def _receive(self, size: int, peek: int = 0) -> tuple[bytes, tuple[int, ...]]:
        data, ancillary, flags, _ = await self._socket.recvmsg(
            size, fdpassing.room(MAX_FDS), socket.MSG_CMSG_CLOEXEC | peek
        )
        fds = fdpassing.received(ancillary)
        wrong = ""
        if flags & socket.MSG_CTRUNC:
            wrong = "more descriptors than a message may have"
        for fd in fds:
            if not is_eventfd(fd) and not is_memory(fd):
                name = os.readlink(syscalls.fd_path(fd))
                wrong = f"a descriptor of {name}, which is no eventfd, and no memory: use a memfd "
                wrong += "or a file on tmpfs or hugetlbfs"
        if wrong:
            self.unclosed += fds
            self.is_broken = True
            if peek:  # what stays in the socket is closed with it, here
                await self._receive(size)
            raise VhostUserError(wrong)
        return data, tuple(fds)
