"""Descriptors in messages over Unix sockets: SCM_RIGHTS of unix(7).

Apart because each end has to agree with the kernel on sizes, and because Python's own
``socket.recv_fds`` ignores its flags: child processes would inherit what it receives.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Iterable, Sequence

MOST = 253
"""Descriptors that one message may have: SCM_MAX_FD of the kernel."""
Ancillary = list[tuple[int, int, "array.array[int]"]]


def ancillary(fds: Sequence[int]) -> Ancillary:
    """The argument of sendmsg(2) for these; none is sent without any."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def room(count: int) -> int:
    """The argument of recvmsg(2) for up to so many."""
    return socket.CMSG_SPACE(count * array.array("i").itemsize)


def received(messages: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what recvmsg(2) returned. The caller owns them."""
    fds = array.array("i")
    for level, kind, content in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return list(fds)


def receive(endpoint: socket.socket, size: int, count: int) -> tuple[bytes, list[int]]:
    """A message of up to ``size`` bytes and ``count`` descriptors, which the caller owns and which
    child processes do not inherit. Raises OSError.
    """
    data, messages, _, _ = endpoint.recvmsg(size, room(count), socket.MSG_CMSG_CLOEXEC)
    return data, received(messages)
