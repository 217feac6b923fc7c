"""A guest's end of the channel: frames in, frames out. Sans-IO; doors move the bytes.

The same session runs over `.fsd/control` (the replayer), `.fsd/session` and the Unix socket.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import deque
from collections.abc import Callable

import structlog

from protocol import frames
from protocol.frames import Role
from protocol.handles import NodeKey
from protocol.masks import EVENTS

from .export import Export
from .guests import HandMarks, Observer
from .inodes import Inode
from .replayer import ReplayGuest
from .resuming import new_token
from .stats import snapshot

log = structlog.get_logger()
BATCH = 256
"""Messages a read: enough to make the round trip of a read small beside the orders' own."""
RESOLVED_LIMIT = 1_048_576
"""Nodes that one session may hold by Resolve: as many as it may mark."""
REPLIES_LIMIT = 262_144
"""Answers that a peer may leave unread: the directories of a large List."""
_STATS_PART = 32 * 1024


class Session:
    """One channel. ``replayer`` is the mount's guest where this is its control channel; ``via``
    that of the mount in which it was opened, None where that was not in a mount.

    ``receive`` raises frames.ProtocolError on what is no frame; the door then closes the session.
    """

    def __init__(
        self,
        export: Export,
        name: str,
        pid: int,
        replayer: ReplayGuest | None = None,
        via: ReplayGuest | None = None,
    ) -> None:
        self._export = export
        self._name = name
        self._pid = pid
        self._replayer = replayer
        self._via = via
        self._reader = frames.FrameReader()
        self._replies: deque[frames.Message] = deque()
        self._unsent = b""
        self._resolved: list[Inode] = []
        self.guest: ReplayGuest | Observer | HandMarks | None = None
        self.said_bye = False
        self._closed = False
        self.wake: Callable[[], None] = lambda: None  # there is something to read
        self.let_go: Callable[[], None] = lambda: None  # answer waiting reads with nothing

    def close(self) -> None:
        """The peer is gone. An observer's marks go with it, unless the server goes and it may come
        back to another; the mount's wait for a new agent.
        """
        stays = self._export.is_stopping and not self.said_bye
        self._closed = self.said_bye = True
        self._replies.clear()
        guest, self.guest = self.guest, None
        if isinstance(guest, ReplayGuest):
            self._export.arming.scan_abort(guest)
            guest.disconnect()
            guest.wake = _asleep
        elif isinstance(guest, Observer) and not (stays and guest.token):
            self._export.remove_guest(guest)
        for inode in self._resolved:
            self._export.table.unpin(inode)
        self._resolved.clear()

    # In

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer and do what they ask."""
        if self._closed:
            raise frames.ProtocolError("the session has ended")
        self._reader.feed(data)
        for message in self._reader:
            self._handle(message)
            if len(self._replies) > REPLIES_LIMIT:
                raise frames.ProtocolError(f"more than {REPLIES_LIMIT} answers wait to be read")
        if self._replies:
            self.wake()
        self._export.watcher.on_arrival()

    def _handle(self, message: frames.Message) -> None:
        if isinstance(message, frames.Hello):
            self._hello(message)
        elif isinstance(message, frames.StatsRequest):
            self._stats(message.request)
        elif isinstance(message, frames.Bye):
            self.said_bye = True
            self.wake()
        elif self.guest is None:
            raise frames.ProtocolError(f"{type(message).__name__} before Hello")
        elif isinstance(message, frames.Update):
            self._update(message)
        elif isinstance(message, frames.Resolve):
            self._resolve(message)
        elif isinstance(message, frames.Keep) and isinstance(self.guest, Observer):
            self._keep(self.guest, message)
        elif isinstance(message, frames.List):
            self._list(message)
        elif isinstance(self.guest, ReplayGuest):
            self._replayer_message(self.guest, message)
        else:
            raise frames.ProtocolError(f"{type(message).__name__} is not for an observer")

    def _hello(self, hello: frames.Hello) -> None:
        roles = (Role.OBSERVER, Role.BY_HAND) if self._replayer is None else (Role.REPLAYER,)
        if hello.version != frames.VERSION or hello.role not in roles or self.guest is not None:
            raise frames.ProtocolError(
                f"hello of version {hello.version}, role {hello.role}: this channel speaks "
                f"version {frames.VERSION}, role {' or '.join(str(int(role)) for role in roles)}"
            )
        if self._replayer is not None:
            self._replayer.connect(self._pid, hello)
            self.guest = self._replayer
        elif hello.role == Role.BY_HAND:
            self.guest = self._export.hand_marks()
        else:
            self.guest = self._export.add_observer(self._name)
            self.guest.events = EVENTS & hello.events
            self.guest.via = self._via
        self.guest.wake = self._woken
        welcome = frames.Welcome(frames.VERSION, self.guest.number, int(self.guest.events))
        self._replies.append(welcome)

    def _keep(self, guest: Observer, message: frames.Keep) -> None:
        known = self._export.come_back(message.token, message.received)
        if known is None:
            guest.keep(new_token())
        else:
            known.name, known.via, known.wake = self._name, self._via, self._woken
            self._export.remove_guest(guest)
            self.guest = guest = known
        self._replies.append(frames.Kept(message.request, guest.token))

    def _woken(self) -> None:
        self.wake()

    def _update(self, update: frames.Update) -> None:
        assert self.guest is not None
        key = NodeKey(update.nodeid, update.generation)
        if isinstance(self.guest, ReplayGuest) and not update.request:
            self._export.arming.scan_update(self.guest, key, update.mask)
            return
        try:
            self._export.update(self.guest, key, update.mask)
        except (OSError, ValueError) as error:
            self._refuse(update.request, key, error)
        else:
            if update.request:
                self._replies.append(frames.Result(update.request, 0, *key, 0))

    def _refuse(self, request: int, key: NodeKey, error: Exception) -> None:
        number = getattr(error, "errno", None) or errno.EIO
        self._replies.append(frames.Result(request, number, *key, 0))

    def _resolve(self, message: frames.Resolve) -> None:
        export = self._export
        try:
            if len(self._resolved) >= RESOLVED_LIMIT:
                raise OSError(errno.ENOSPC, "too many nodes")
            if b"\0" in message.path:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            names: list[bytes] = []
            for name in message.path.split(b"/"):
                if name == b"..":
                    del names[-1:]
                elif name not in (b"", b"."):
                    names.append(name)
            inode = export.table.walk(names)
        except OSError as error:
            self._refuse(message.request, NodeKey(0, 0), error)
            return
        export.table.pin(inode)
        self._resolved.append(inode)
        result = frames.Result(message.request, 0, *inode.key, inode.kind)
        self._replies.append(result)

    def _list(self, message: frames.List) -> None:
        try:
            inode = self._export.table.find(NodeKey(message.nodeid, message.generation))
        except OSError:
            names = []
        else:
            try:
                listed = self._export.read_directory(inode)
            except OSError as error:
                self._refuse(message.request, inode.key, error)
                listed = {}
            names = [name for name, known in listed.items() if stat.S_ISDIR(known.kind)]
        self._replies.extend(frames.Name(message.request, 1, name) for name in names)
        self._replies.append(frames.Name(message.request, 0, b""))

    def _replayer_message(self, guest: ReplayGuest, message: frames.Message) -> None:
        arming = self._export.arming
        if isinstance(message, frames.ScanEnd):
            for key, error in arming.scan_end(guest, message.hint, full=bool(message.full)):
                self._refuse(0, key, error)
        elif isinstance(message, frames.Ack):
            event = guest.acknowledge(message.seq, message.errno)
            if event is not None:
                log.debug("replay failed", replayed=event, errno=errno.errorcode.get(message.errno))
        else:
            raise frames.ProtocolError(f"{type(message).__name__} is for guests, not from them")

    def _stats(self, request: int) -> None:
        text = json.dumps(snapshot(self._export, self._via)).encode()
        parts = [text[i : i + _STATS_PART] for i in range(0, len(text), _STATS_PART)]
        for index, part in enumerate(parts):
            self._replies.append(frames.Stats(request, int(index < len(parts) - 1), part))

    # Out

    @property
    def has_outgoing(self) -> bool:
        """Whether ``outgoing`` would return bytes."""
        if self._unsent or self._replies:
            return True
        guest = self.guest
        return (isinstance(guest, ReplayGuest) and guest.has_outgoing) or (
            isinstance(guest, Observer) and guest.depth > 0
        )

    def asked(self) -> None:
        """The peer asks, and waits where there is nothing."""
        if isinstance(self.guest, ReplayGuest):
            self.guest.asked()

    def outgoing(self, size: int) -> bytes:
        """Up to ``size`` bytes for the peer. From a replayer, asking means that all orders it was
        given are executed.
        """
        guest = self.guest
        if not self._unsent:
            messages = [*self._replies]
            self._replies.clear()
            if guest is not None:
                messages += guest.take(BATCH)
            self._unsent = b"".join(map(frames.encode, messages))
            if guest is not None and guest.missing and not guest.depth:
                self._export.catch_up(guest)
                self._export.watcher.on_arrival()  # for the planning of what is told
        data, self._unsent = self._unsent[:size], self._unsent[size:]
        return data


def _asleep() -> None:
    """Nobody waits for the mount's events while its agent is away."""
