"""Records the vhost-user messages that are still in effect, so that the next process can replay
them to its device.

Messages are in a journal, each with the names of its descriptors in the store; a message replaces
an earlier one about the same thing.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator

import structlog

from protocol.vhostuser import (
    INDEX_MASK,
    U64,
    Region,
    Request,
    RequestReader,
    Type,
    VringAddr,
    VringState,
    encode_request,
)

from ..process.journal import Journal, JournalError
from ..process.systemd import Store
from .device import OWN_INFLIGHT
from .inflight import InflightMemory

log = structlog.get_logger()
_TABLE, _ADD, _REMOVE = Type.SET_MEM_TABLE, Type.ADD_MEM_REG, Type.REM_MEM_REG
_SAYS = frozenset({
    Type.SET_FEATURES, Type.SET_PROTOCOL_FEATURES, _TABLE, _ADD, _REMOVE, Type.SET_VRING_NUM,
    Type.SET_VRING_ADDR, Type.SET_VRING_BASE, Type.SET_VRING_KICK, Type.SET_VRING_CALL,
    Type.SET_VRING_ERR, Type.SET_VRING_ENABLE, Type.SET_STATUS, Type.SET_INFLIGHT_FD,
})  # fmt: skip
"""Messages that set something."""
_CONNECTION = 0
"""Kind of the record that identifies the connection."""


class Conversation:
    """The messages of one guest. ``name`` begins the names of its descriptors in the store."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._journal: Journal | None = None
        self._names: dict[tuple[int, int], list[str]] = {}
        self._files: dict[tuple[int, int], str] = {}  # of regular files: device, inode -> name
        self._numbers = itertools.count()

    # State of an earlier process

    def resume(self) -> tuple[socket.socket, list[Request]] | None:
        """The connection and its messages; None if there is none to continue with."""
        fd = self._store.take(f"{self._name}-talk")
        if fd < 0:
            return None
        connection = -1
        requests: list[Request] = []
        taken: list[tuple[str, int]] = []
        try:
            self._journal = Journal(fd)
            for key, record in self._journal.records.items():
                said = json.loads(record.value)
                self._names[key] = said["fds"]
                fds = tuple(self._take(name, taken) for name in said["fds"])
                if key[0] == _CONNECTION:
                    (connection,) = fds
                else:
                    requests.append(_request(bytes.fromhex(said["message"]), fds))
            self._journal.records.clear()
            if connection < 0:
                raise LookupError("there is no connection")
        except (JournalError, ValueError, LookupError, OSError) as error:
            log.error("cannot take over a guest's device", share=self._name, error=str(error))
            for _, fd in taken:
                os.close(fd)
            self.end()
            return None
        requests.sort(key=lambda request: request.type not in (_TABLE, _ADD, _REMOVE))
        return socket.socket(fileno=connection), requests

    def _take(self, name: str, taken: list[tuple[str, int]]) -> int:
        known = dict(taken).get(name)
        fd = self._store.take(name) if known is None else os.dup(known)
        if fd < 0:
            raise LookupError(f"{name} is not in the store")
        taken.append((name, fd))
        self._numbers = itertools.count(max(int(name.rpartition("-")[2]) + 1, next(self._numbers)))
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            self._files[status.st_dev, status.st_ino] = name
        return fd

    # Recording

    @property
    def holds(self) -> bool:
        """Whether any of it outlives this process."""
        return self._journal is not None

    def begin(self, connection: int) -> None:
        """Another front-end has connected."""
        self.end()
        if self._store.holds:
            self._journal = Journal()
            self._store.put(f"{self._name}-talk", self._journal.fd)
            self._keep((_CONNECTION, 0), b"", (connection,))

    def end(self) -> None:
        """The front-end has disconnected."""
        for key in list(self._names):
            self._drop(key)
        if self._journal is not None:
            self._store.drop(f"{self._name}-talk")
            self._journal.close()
            self._journal = None
        self._store.sweep(f"{self._name}-")

    def said(self, request: Request) -> None:
        """The device has carried out a message."""
        if self._journal is None:
            return
        undone = list(_undone(request, list(self._names)))
        for key in undone:
            self._drop(key)
        own = request.type == OWN_INFLIGHT and request.fds
        if (own or request.type in _SAYS) and not (undone and request.type == _REMOVE):
            message = encode_request(request.type, request.payload)
            self._keep(_key(request), message, request.fds)

    def began(self, memory: InflightMemory) -> None:
        """The device records requests under way there, in memory of its own."""
        self.said(Request(OWN_INFLIGHT, 1, memory.layout, (memory.fd,)))

    def stopped(self, index: int, position: int) -> None:
        """A queue was stopped at that position."""
        self.said(Request(Type.SET_VRING_BASE, 1, VringState(index, position), ()))

    def _keep(self, key: tuple[int, int], message: bytes, fds: tuple[int, ...]) -> None:
        assert self._journal is not None
        old = self._names.pop(key, [])
        self._names[key] = names = [self._stored(fd) for fd in fds]
        said = {"message": message.hex(), "fds": names}
        self._journal.put(*key, json.dumps(said).encode())
        self._release(old)

    def _stored(self, fd: int) -> str:
        """The name of a descriptor in the store."""
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        # Of descriptors that are one open file, as those of several regions, systemd takes one.
        name = self._files.get(identity) if stat.S_ISREG(status.st_mode) else None
        if name is None:
            name = f"{self._name}-{next(self._numbers)}"
            self._store.put(name, fd)
            if stat.S_ISREG(status.st_mode):
                self._files[identity] = name
        return name

    def _drop(self, key: tuple[int, int]) -> None:
        if self._journal is not None:
            self._journal.remove(*key)
        self._release(self._names.pop(key, []))

    def _release(self, names: list[str]) -> None:
        """Drop descriptors that no message uses any more."""
        for name in set(names).difference(*self._names.values()):
            self._store.drop(name)
            self._files = {key: held for key, held in self._files.items() if held != name}


def _key(request: Request) -> tuple[int, int]:
    """What a message is about: its type, and which queue or region."""
    payload, number = request.payload, 0
    if request.type in (Type.SET_VRING_KICK, Type.SET_VRING_CALL, Type.SET_VRING_ERR):
        assert isinstance(payload, U64)
        number = payload.value & INDEX_MASK
    elif isinstance(payload, (VringState, VringAddr)):
        number = payload.queue
    elif isinstance(payload, Region):
        number = payload.guest_addr
    return int(request.type), number


def _undone(request: Request, keys: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What a message makes invalid."""
    kind, number = _key(request)
    if kind == _TABLE:
        yield from (key for key in keys if key[0] in (_ADD, _REMOVE))
    elif kind == _REMOVE and (_ADD, number) in keys:
        yield _ADD, number
    elif kind == Type.GET_VRING_BASE:
        yield Type.SET_VRING_KICK, number
    elif kind == Type.RESET_DEVICE or request[:3:2] == (Type.SET_STATUS, U64(0)):
        yield from (key for key in keys if key[0] in (Type.SET_VRING_ENABLE, Type.SET_VRING_BASE))


def _request(message: bytes, fds: tuple[int, ...]) -> Request:
    """A recorded message. Raises VhostUserError."""
    reader = RequestReader()
    header = message[: reader.wanted]
    own = int.from_bytes(header[:4], sys.byteorder) == OWN_INFLIGHT  # no front-end sends these
    reader.receive(header, () if own else fds)
    request = reader.receive(message[len(header) :])
    assert request is not None
    return request._replace(fds=fds)
