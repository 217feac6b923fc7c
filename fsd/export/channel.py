"""The server's end of a channel: frames in, frames out. Sans-IO; transports move the bytes.

The same channel runs over `.fsd/control` (the replayer), `.fsd/session` and the Unix socket.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import deque
from collections.abc import Callable
from contextlib import closing

import structlog

from protocol import frames
from protocol.frames import Role
from protocol.handles import NodeKey
from protocol.masks import EVENTS

from ..files.inode import Inode
from ..guests.guest import MARKS_LIMIT, Guest, HandMarks, Observer, new_token
from ..guests.mount import MountGuest
from ..pacing.chores import Job, Pause, begin
from .export import Export
from .stats import snapshot

log = structlog.get_logger()
BATCH = 256
"""Messages per read: enough to make the round trip of a read small compared with the orders'
own."""
RESOLVED_LIMIT = MARKS_LIMIT
"""Nodes that one channel may hold by Resolve: as many as it may mark."""
PENDING_LIMIT = 1 << 20
"""Bytes of frames that may wait to be handled while another write is answered: as many as one write
has. Beyond it writes wait."""
ANSWERS_LIMIT = 256 * 1024
"""Bytes of answers that a peer may leave unread. Its next frame waits until it reads them."""
_STATS_PART = 32 * 1024


class Channel:
    """One channel. ``replayer``: the mount guest whose control channel this is. ``via``: the guest
    of the mount in which it was opened, None for a socket.

    ``receive`` raises frames.ProtocolError for invalid frames; the transport then closes the
    channel.
    """

    def __init__(
        self,
        export: Export,
        name: str,
        pid: int,
        replayer: MountGuest | None = None,
        via: MountGuest | None = None,
    ) -> None:
        self._export = export
        self._name = name
        self._pid = pid
        self._replayer = replayer
        self._via = via
        self._reader = frames.FrameReader()
        self._job: Job[None] | None = None  # handles what was received
        self._background: Job[None] | None = None  # the same, as a chore
        self._is_stalled = False  # by answers that are not read
        self._answers: deque[bytes] = deque()
        self._answers_size = 0
        self._unsent = memoryview(b"")
        self._resolved: dict[Inode, None] = {}
        self._writers: list[Callable[[], None]] = []
        self.guest: MountGuest | Observer | HandMarks | None = None
        self.said_bye = False
        self._closed = False
        self.wake: Callable[[], None] = lambda: None  # there is something to read
        self.dismiss_readers: Callable[[], None] = lambda: None  # answer waiting reads with nothing

    def close(self) -> None:
        """The peer is gone. An observer's marks end with it, unless the server exits and the
        observer may reconnect to another; a mount's marks stay for a new agent.
        """
        stays = self._export.is_stopping and not self.said_bye
        self._closed = self.said_bye = True
        self._answers.clear()
        for job in (self._background, self._job):
            if job is not None:
                job.close()
        self._background = None
        self._let_write()
        guest, self.guest = self.guest, None
        if isinstance(guest, MountGuest):
            self._export.arming.scan_abort(guest)
            guest.disconnect()
            guest.wake = _no_reader
        elif isinstance(guest, Observer) and not (stays and guest.token):
            self._export.remove_guest(guest)
        self._export.chores.do(self._owner, self._unpinning(self._resolved))
        self._resolved = {}

    def _unpinning(self, inodes: dict[Inode, None]) -> Job[None]:
        for inode in inodes:
            self._export.table.unpin(inode)
            yield None

    @property
    def _owner(self) -> object:
        """With which it shares its turns: all channels of a guest have the same."""
        return self._via or self._export.interest

    # In

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer and carry them out: some now, the rest in turns of the export's
        chores. Raises ProtocolError; in a later turn, that ends the channel.
        """
        if self._closed:
            raise frames.ProtocolError("the channel has ended")
        self._reader.feed(data)
        if self._job is None:
            self._job = job = self._handling()
            if not begin(job):
                self._background = self._continuing(job)
                self._export.chores.add(self._owner, self._background)
        self._export.on_work()

    @property
    def is_full(self) -> bool:
        """Whether the answer to a write waits (``when_taken``): too much is still to be handled."""
        return self._reader.pending > PENDING_LIMIT

    def when_taken(self, call: Callable[[], None]) -> None:
        """Call once when there is room for another write, or the channel has ended."""
        self._writers.append(call)

    def _let_write(self) -> None:
        writers, self._writers = self._writers, []
        for call in writers:
            call()

    def _handling(self) -> Job[None]:
        """Handle the frames that were received, in order."""
        try:
            for message in self._reader:
                yield from self._handle(message)
                yield from self._unless_unread()
                if self._writers and not self.is_full:
                    self._let_write()
        finally:
            self._job = None

    def _continuing(self, job: Job[None]) -> Job[None]:
        """The rest of it, after the peer is gone: an invalid frame ends the channel."""
        try:
            yield from job
        except ValueError as error:
            log.warning("bad frame from guest", error=str(error), channel=self._name)
            self._background = None  # this very job
            self.close()
            self.wake()

    def _unless_unread(self) -> Job[None]:
        """A step is done. If the peer reads no answers, wait until it does."""
        yield None
        while self._answers_size >= ANSWERS_LIMIT:
            self._is_stalled = True
            yield Pause.UNTIL_ADDED

    def _answer(self, message: frames.Message) -> None:
        data = frames.encode(message)
        self._answers.append(data)
        self._answers_size += len(data)
        if len(self._answers) == 1:
            self.wake()

    def _handle(self, message: frames.Message) -> Job[None]:
        if isinstance(message, frames.Hello):
            self._hello(message)
        elif isinstance(message, frames.StatsRequest):
            yield from self._stats(message.request)
        elif isinstance(message, frames.Bye):
            self.said_bye = True
            self.wake()
        elif self.guest is None:
            raise frames.ProtocolError(f"{type(message).__name__} before Hello")
        elif isinstance(message, frames.Update):
            yield from self._update(self.guest, message)
        elif isinstance(message, frames.Resolve):
            yield from self._resolve(message)
        elif isinstance(message, frames.Keep) and isinstance(self.guest, Observer):
            self._keep(self.guest, message)
        elif isinstance(message, frames.List):
            yield from self._list(message)
        elif isinstance(self.guest, MountGuest):
            yield from self._replayer_message(self.guest, message)
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
            self.guest = self._export.hand_marks(self._via)
        else:
            self.guest = self._export.add_observer(self._name)
            self.guest.events = EVENTS & hello.events
            self.guest.join(self._via)
        self.guest.wake = self._woken
        welcome = frames.Welcome(frames.VERSION, self.guest.number, int(self.guest.events))
        self._answer(welcome)

    def _keep(self, guest: Observer, message: frames.Keep) -> None:
        known = self._export.reconnect(message.token, message.received)
        if known is None:
            guest.keep(new_token())
        else:
            known.name, known.wake = self._name, self._woken
            known.join(self._via)
            self._export.remove_guest(guest)
            self.guest = guest = known
        self._answer(frames.Kept(message.request, guest.token))

    def _woken(self) -> None:
        self.wake()

    def _update(self, guest: Guest, update: frames.Update) -> Job[None]:
        key = NodeKey(update.nodeid, update.generation)
        if isinstance(guest, MountGuest) and not update.request:
            self._export.arming.scan_update(guest, key, update.mask)
            return
        try:
            inode = self._export.update(guest, key, update.mask)
            while self._export.is_arming(inode):
                yield Pause.LATER
            if inode is None and update.mask:
                self._export.watches.check(None)
        except (OSError, ValueError) as error:
            self._refuse(update.request, key, error)
        else:
            if update.request:
                self._answer(frames.Result(update.request, 0, *key, 0))

    def _refuse(self, request: int, key: NodeKey, error: Exception) -> None:
        number = getattr(error, "errno", None) or errno.EIO
        self._answer(frames.Result(request, number, *key, 0))

    def _resolve(self, message: frames.Resolve) -> Job[None]:
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
            inode = yield from self._walking(names)
        except OSError as error:
            self._refuse(message.request, NodeKey(0, 0), error)
            return
        if inode in self._resolved:
            self._export.table.unpin(inode)
        self._resolved[inode] = None
        self._answer(frames.Result(message.request, 0, *inode.key, inode.kind))

    def _walking(self, names: list[bytes]) -> Job[Inode]:
        """The inode at the end of a path, pinned. Like InodeTable.walk."""
        table = self._export.table
        inode, dir_fd = table.root, os.dup(table.reach.root_fd)
        table.pin(inode)
        try:
            for name in names:
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)
                os.close(dir_fd)
                dir_fd = fd
                above, (inode, _) = inode, table.intern(fd, inode, name)
                table.pin(inode)
                table.unpin(above)
                yield None
        except BaseException:
            table.unpin(inode)
            raise
        finally:
            os.close(dir_fd)
        return inode

    def _list(self, message: frames.List) -> Job[None]:
        try:
            inode = self._export.table.find(NodeKey(message.nodeid, message.generation))
        except OSError:
            pass
        else:
            try:
                with closing(self._export.reader.names_in(inode)) as parts:
                    for names in parts:
                        for name, known in names.items():
                            if stat.S_ISDIR(known.kind):
                                self._answer(frames.Name(message.request, 1, name))
                        yield from self._unless_unread()
            except OSError as error:
                self._refuse(message.request, inode.key, error)
        self._answer(frames.Name(message.request, 0, b""))

    def _replayer_message(self, guest: MountGuest, message: frames.Message) -> Job[None]:
        arming = self._export.arming
        if isinstance(message, frames.ScanEnd):
            guest.makes_lone_closes = bool(message.flags & frames.Scan.LONE_CLOSE)
            guest.keeps_created = bool(message.flags & frames.Scan.CREATE_OPEN)
            is_full = bool(message.flags & frames.Scan.FULL)
            scan = arming.scan_ending(guest, message.hint, full=is_full)
            for key, error in (yield from scan):
                self._refuse(0, key, error)
        elif isinstance(message, frames.Calls):
            guest.sees_marks(True)
            arming.traced.called(guest, message)
        elif isinstance(message, frames.Ack):
            event = guest.acknowledge(message.seq, message.errno)
            if event is not None:
                log.debug("replay failed", replayed=event, errno=errno.errorcode.get(message.errno))
                self._export.recovery.repeat(guest, event)
        else:
            raise frames.ProtocolError(f"{type(message).__name__} is for guests, not from them")

    def _stats(self, request: int) -> Job[None]:
        text = json.dumps(snapshot(self._export, self._via)).encode()
        parts = [text[i : i + _STATS_PART] for i in range(0, len(text), _STATS_PART)]
        for index, part in enumerate(parts):
            self._answer(frames.Stats(request, int(index < len(parts) - 1), part))
            yield from self._unless_unread()

    # Out

    @property
    def has_outgoing(self) -> bool:
        """Whether ``outgoing`` would return bytes."""
        if self._unsent or self._answers:
            return True
        guest = self.guest
        return (isinstance(guest, MountGuest) and guest.has_outgoing) or (
            isinstance(guest, Observer) and guest.depth > 0
        )

    def asked(self) -> None:
        """The peer asks, and waits if there is nothing."""
        if isinstance(self.guest, MountGuest):
            self.guest.asked()

    def outgoing(self, size: int) -> bytes:
        """Up to ``size`` bytes for the peer. A replayer's question means that all its orders are
        executed.
        """
        guest = self.guest
        if not self._unsent:
            data = list(self._answers)
            self._answers.clear()
            self._answers_size = 0
            if guest is not None:
                data += map(frames.encode, guest.take(BATCH))
            self._unsent = memoryview(b"".join(data))
            if guest is not None and guest.missing and not guest.depth:
                self._export.recovery.catch_up(guest)
                self._export.on_work()  # so that events get planned
            if self._is_stalled and self._background is not None:
                self._is_stalled = False
                self._export.chores.add(self._owner, self._background)
                self._export.on_work()
        part, self._unsent = self._unsent[:size], self._unsent[size:]
        return bytes(part)


def _no_reader() -> None:
    """No request waits for the mount's events while its agent is away."""
