"""virtiofs: listens for a VMM on a vhost-user socket and runs a device for it.

One task reads the socket, and one more for each queue waits for its kicks. After a VMM has
disconnected, the next one can connect.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from time import perf_counter

import structlog
import trio

from protocol.vhostuser import Request, VhostUserError

from ..export.export import Export
from ..files.inode import Inode
from ..files.slowcalls import THREADS
from ..fuse.operations import Operations
from ..fuse.record import SessionRecord
from ..fuse.session import FuseSession, SessionOptions
from ..guests.guest import Guest
from ..guests.mount import MountGuest
from ..pacing.guard import Guard
from ..process.systemd import Store
from ..virtio.conversation import Conversation
from ..virtio.device import TAG_LENGTH, Device, DeviceError, Left, Session
from ..virtio.eventfds import Reader
from .loop import TrioLoop
from .messages import Messages
from .polling import WINDOW, BusyPolling
from .tasks import accept, forever
from .turns import Turns

log = structlog.get_logger()
BUDGET = 16
"""Requests of one queue before others, other guests and events get their turn (turns.py)."""
BARREN = 16
"""Kicks in a row without a request after which the next one has to wait. A VMM can make an endless
kick (EFD_SEMAPHORE); a guest's kernel sometimes kicks once too often, but not so often."""
BARREN_PAUSE = 0.002
"""Seconds: about 1 % of a processor for as long as that continues."""
FAULT_PAUSE, LONGEST_FAULT_PAUSE, FORGIVEN = 0.05, 2.0, 60.0
"""Seconds that a VMM waits before it may connect again after it has violated eventfds.py and
mapping.py twice in a row: longer each time, as each may have cost others 40 ms. After a minute
without a violation it counts as new."""
RECONNECT = 30.0
"""Seconds for which a guest's session waits for a VMM that may reconnect."""


class ExportSession:
    """The requests of one guest's kernel, from its start to the next: a guest of the export."""

    def __init__(self, export: Export, name: str, loop: TrioLoop, options: SessionOptions) -> None:
        self._export = export
        self.guest = export.add_mount_guest(name, record=options.kept)
        self.guest.transport = "virtiofs"
        self._operations = Operations(export, self.guest)
        self._session = FuseSession(self._operations, loop, options)
        self.nodes = self._session.nodes
        self.serve = self._session.serve
        self.serve_again = self._session.serve_again
        self.suspend = self._session.suspend
        self.leave = self._session.leave
        self.resume = self._session.resume

    def close(self) -> None:
        """The guest has disconnected; drop everything that it held."""
        self._operations.handles.keep_no_longer()  # the next session is kept in the same place
        self._session.close(self._closed)

    def _closed(self) -> None:
        with ExitStack() as steps:  # from the last to the first; each, whatever another raises
            steps.callback(self._export.remove_guest, self.guest)
            steps.callback(self._operations.close)
            steps.callback(self.nodes.end)


class VirtiofsTransport:
    """A socket, and the guest that connects there. ``new_session`` makes the object that answers
    requests, ``busy_poll`` is the window of BusyPolling in seconds; ``threads`` may wait for disks.
    """

    def __init__(
        self,
        new_session: Callable[[TrioLoop], Session],
        *,
        name: str,
        tag: str = "",
        request_queues: int = 1,
        store: Store | None = None,
        busy_poll: float = WINDOW,
        threads: int = THREADS,
    ) -> None:
        self.new_session = partial(new_session, loop := TrioLoop(threads=threads))
        self.loop = loop
        self.name = name
        self.tag = tag
        self.request_queues = request_queues
        self.busy_poll = busy_poll
        self.conversation = Conversation(store, store_name(name)) if store is not None else None
        self.is_leaving = False
        self.known = self.conversation.resume() if self.conversation is not None else None
        """The VMM of an earlier process, and its messages."""
        self.session: Session | None = None
        """The session of that VMM."""
        self._left: Left | None = None
        self._connection: _Connection | None = None
        self._faults = 0  # of VMMs, one after the other

    def leave(self) -> None:
        """Stop serving without ending anything: the next process continues."""
        self.is_leaving = True
        if self._connection is not None:
            self._connection.suspend()

    async def serve(self, source: socket.socket) -> None:
        """Serve the VMMs that connect to ``source``, one after the other, until cancelled; or the
        one that ``source`` is connected to, until it disconnects. Takes the socket.
        """
        with source:
            source.setblocking(False)
            listens = source.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            endpoint = trio.socket.from_stdlib_socket(source)
            if self.known is not None:
                known, said = self.known
                known.setblocking(False)
                log.info("continuing with a VMM", share=self.name)
                with Guard("serving a VMM", share=self.name):
                    await self._serve(trio.socket.from_stdlib_socket(known), said)
                if not listens:
                    return

            async def step() -> None:
                with await self._next(endpoint) if listens else endpoint as connection:
                    if self.conversation is not None:
                        self.conversation.begin(connection.fileno())
                    log.info("VMM connected", share=self.name)
                    await self._serve(connection, [])

            if listens:
                await forever("serving a VMM", step, share=self.name)
            else:
                with Guard("serving a VMM", share=self.name):
                    await step()

    async def _next(self, endpoint: trio.socket.SocketType) -> trio.socket.SocketType:
        """The next connection. The last VMM's session waits for it, up to a limit."""
        if self._left is not None:
            with trio.move_on_after(RECONNECT):
                return await accept(endpoint, share=self.name)
            left, self._left = self._left, None
            left.session.close()
        return await accept(endpoint, share=self.name)

    async def _serve(self, connection: trio.socket.SocketType, said: list[Request]) -> None:
        with connection:
            left, self._left = self._left, None
            self._connection = served = _Connection(connection, self, left)
            try:
                await served.run(said)
            except* Exception:  # whatever it is, it is one VMM's
                log.exception("virtiofs device failed", share=self.name)
            finally:
                self._connection = None
            served.end()
            self._left = served.left
        if self.conversation is not None:
            self.conversation.end()
        log.info("VMM disconnected", share=self.name)
        await _close_elsewhere(served.messages.unclosed)
        await self._pause(served)

    async def _pause(self, served: _Connection) -> None:
        """Delay a VMM that repeatedly makes the server wait."""
        if served.is_broken or served.messages.is_broken:
            self._faults += 1
            await trio.sleep(min(FAULT_PAUSE * (2**self._faults - 2), LONGEST_FAULT_PAUSE))
        elif trio.current_time() - served.begun > FORGIVEN:
            self._faults = 0


class GuestTransport(VirtiofsTransport):
    """A share's socket for one guest. ``name`` is the guest's name for people, ``tag`` the share's
    for VMMs that ask the device for it. ``store`` holds the state of an earlier process, and takes
    that of this one. Needs ``export`` before a VMM connects.
    """

    TAG_BYTES = TAG_LENGTH
    """Bytes of ``tag``."""
    export: Export

    def __init__(
        self,
        *,
        name: str,
        tag: str,
        options: SessionOptions,
        store: Store | None = None,
        busy_poll: float = WINDOW,
        threads: int = THREADS,
    ) -> None:
        self.kept: SessionRecord | None = None
        if store is not None and store.holds:
            self.kept = SessionRecord(store, store_name(name))
            options = replace(options, kept=self.kept)
        self._options = options
        self._present: ExportSession | None = None
        super().__init__(
            self._new_session, name=name, tag=tag, store=store, busy_poll=busy_poll, threads=threads
        )
        if self.kept is not None and self.known is None:
            self.kept.clear()
            self.kept.taken()

    def _new_session(self, loop: TrioLoop) -> ExportSession:
        loop.turn = self.export.turn
        self._present = ExportSession(self.export, self.name, loop, self._options)
        return self._present

    def resume(self, restore: Callable[[MountGuest], object], inodes: Mapping[int, Inode]) -> None:
        """Continue with the guest of an earlier process: ``restore`` restores its own state,
        ``inodes`` maps the nodeids that it had to the share's inodes. Raises ValueError if the
        state is inconsistent.
        """
        session = self._new_session(self.loop)
        restore(session.guest)
        session.resume(inodes)
        self.session = session

    @property
    def guests(self) -> dict[Guest, dict[int, int]]:
        """The guest, if there is one now, and what its kernel holds."""
        session = self._present
        if session is None or session.guest not in self.export.guests:
            return {}
        return {session.guest: session.nodes.saved()}

    def leave(self) -> None:
        """Stop serving: the next process continues, and gets the open files."""
        super().leave()
        if self._present is not None and self.guests:
            self._present.leave()


def store_name(name: str) -> str:
    """The store's form of a guest's name: short, and in characters that systemd accepts."""
    return f"{zlib.crc32(os.fsencode(name)):08x}"


async def _close_elsewhere(fds: list[int]) -> None:
    """Close them in a thread: while that waits, the VMM cannot reconnect with others."""

    def close() -> None:
        while fds:
            os.close(fds.pop())

    if fds:
        await trio.to_thread.run_sync(
            close, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )


class _Connection:
    """One VMM."""

    def __init__(
        self, connection: trio.socket.SocketType, transport: VirtiofsTransport, left: Left | None
    ) -> None:
        self.messages = Messages(connection)
        self._transport = transport
        self.left = left
        """the state left by the previous connection, later by this one"""
        self._turns = Turns()
        self.begun = trio.current_time()
        self.is_broken = self._has_ended = False
        self._kicks = Reader()
        self._waiting: dict[int, trio.CancelScope] = {}

    def suspend(self) -> None:
        """Serve nothing any more."""
        self._device.suspend()

    async def run(self, said: list[Request]) -> None:
        """Run until the VMM disconnects. ``said``: its messages to an earlier process."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            transport = self._transport
            transport.loop.nursery = nursery
            self._device = Device(
                transport.new_session,
                on_start=self._on_start,
                on_stop=self._on_stop,
                tag=transport.tag,
                request_queues=transport.request_queues,
                listener=transport.conversation,
                left=self.left,
                on_broken=self._on_broken,
            )
            self.left = None
            try:
                if said:
                    session, transport.session = transport.session, None
                    self._device.resume(said, session or transport.new_session())
                await self._converse()
            except (VhostUserError, DeviceError) as error:
                log.error("VMM dropped", share=transport.name, error=str(error))
            except ConnectionError:
                pass
            except trio.Cancelled:
                # If the server exits, for whatever reason, and another continues, that one finds
                # everything as it is now, as after SIGKILL. Else ``end`` is called once all tasks
                # have ended.
                is_kept = transport.conversation is not None and transport.conversation.holds
                if not is_kept:
                    self.end()
                raise
            except BaseException:
                self.end()
                raise
            self.end()
            nursery.cancel_scope.cancel()

    def end(self) -> None:
        """The VMM has disconnected, and nothing more is done for it."""
        if not self._transport.is_leaving and not self._has_ended:
            self._has_ended = True
            self.left = self._device.leave()

    async def _converse(self) -> None:
        messages = self.messages
        while (message := await messages.next()) is not None:
            request, unread = message
            answer = self._device.handle(request)
            await messages.finish(request, unread, answer, self._device.reply_fds)

    # Queues

    def _on_start(self, index: int) -> None:
        scope = self._waiting[index] = trio.CancelScope()
        kick = self._device.rings[index].kick
        self._nursery.start_soon(self._run_queue, index, kick, scope)

    def _on_stop(self, index: int) -> None:
        trio.lowlevel.notify_closing(self._device.rings[index].kick)
        self._waiting.pop(index).cancel()

    def _on_broken(self, why: str) -> None:
        def drop() -> None:
            log.error("VMM dropped", share=self._transport.name, error=why)
            self._nursery.cancel_scope.cancel()

        if not self.is_broken:
            self.is_broken = True
            self._transport.loop.soon(drop)

    def _process(self, index: int) -> bool:
        """Serve a queue for a turn; whether to continue with it in the next."""
        turns = self._turns
        if turns.left <= 0:
            return True
        begun = perf_counter()
        more = self._device.process(index, BUDGET, begun + turns.left)
        turns.left -= perf_counter() - begun
        return more

    async def _run_queue(self, index: int, kick: int, scope: trio.CancelScope) -> None:
        ring = self._device.rings[index]
        polling = BusyPolling(
            self._transport.busy_poll if index else 0.0
        )  # no program waits for a FORGET
        position = barren = 0

        def is_there() -> bool:
            return ring.has_more

        with scope, suppress(trio.ClosedResourceError):
            while True:
                # First without a kick: it may have been read before the queue was stopped.
                while self._process(index):
                    await self._turns.others()
                if scope.cancel_called:
                    return  # the descriptor may be closed
                # A thread that has done its work could not say so meanwhile.
                if not self._transport.loop.threads and await polling.finds(is_there, ring.moved):
                    continue
                before, position = position, ring.queue.position if ring.queue is not None else 0
                barren = barren + 1 if position == before else 0
                if barren > BARREN:
                    await trio.sleep(BARREN_PAUSE)
                await trio.lowlevel.wait_readable(kick)
                if self._waiting.get(index) is not scope:
                    return  # stopped since the kick: another file may have its number
                self._kicks.drain(kick)
                polling.slept()
