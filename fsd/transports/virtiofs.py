"""virtiofs: listens for a VMM on a vhost-user socket and runs a device for it.

A task reads the socket, one more waits for the kicks of each queue. When a VMM has gone, the next
one is waited for.
"""

from __future__ import annotations

import array
import grp
import os
import socket
from collections.abc import Callable
from contextlib import suppress

import structlog
import trio

from protocol.vhostuser import MAX_FDS, RequestReader, VhostUserError

from ..export import Export
from ..fusesession import FuseSession, SessionOptions
from ..service import Service
from ..virtio.device import Device, DeviceError, Session
from .loop import TrioLoop
from .socket import unlink_stale

log = structlog.get_logger()
BUDGET = 16
"""Requests of one queue before others, other guests and events get their turn: under 1 ms."""
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


def listen(path: str, group: str | None = None) -> socket.socket:
    """A listening socket at ``path``, for its owner only, or for ``group`` too. Raises OSError,
    LookupError where there is no such group.
    """
    gid = -1 if group is None else grp.getgrnam(group).gr_gid
    unlink_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177 if group is None else 0o117)
    try:
        listener.bind(path)
        if group is not None:
            os.chown(path, -1, gid)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old)
    return listener


def from_fd(fd: int) -> socket.socket:
    """The socket that a service manager or a VMM has left open for this process: one that
    listens, or the connection itself. Raises OSError.
    """
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


async def serve(
    source: socket.socket,
    export: Export,
    *,
    name: str,
    tag: str = "",
    request_queues: int = 1,
    options: SessionOptions | None = None,
) -> None:
    """Serve an export's guests: the VMMs that connect to ``source``, one after the other, until
    cancelled; or the one that ``source`` is connected to, until it has gone. Takes the socket.

    ``name`` is the guest's for people, ``tag`` the share's for VMMs that ask the device for it.
    """

    def new_session(loop: TrioLoop) -> Session:
        return ExportSession(export, name, loop, options)

    await serve_sessions(source, new_session, name=name, tag=tag, request_queues=request_queues)


class ExportSession:
    """The requests of one guest's kernel, from its start to the next: a guest of the export."""

    def __init__(
        self, export: Export, name: str, loop: TrioLoop, options: SessionOptions | None
    ) -> None:
        self._export = export
        self._guest = export.add_replayer(name)
        self._service = Service(export, self._guest)
        self._session = FuseSession(self._service, loop, options)
        self.serve = self._session.serve

    def close(self) -> None:
        """The guest has gone, and all that it held with it."""
        self._session.close()
        self._service.close()
        self._export.remove_guest(self._guest)


async def serve_sessions(
    source: socket.socket,
    new_session: Callable[[TrioLoop], Session],
    *,
    name: str,
    tag: str = "",
    request_queues: int = 1,
) -> None:
    """As ``serve``, whatever answers the requests."""
    with source:
        source.setblocking(False)
        listens = source.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        endpoint = trio.socket.from_stdlib_socket(source)
        while True:
            connection = (await endpoint.accept())[0] if listens else endpoint
            log.info("VMM connected", share=name)
            with connection:
                try:
                    await _Connection(connection, new_session, name, tag, request_queues).run()
                except* Exception:  # whatever it is, it is one VMM's
                    log.exception("virtiofs device failed", share=name)
            log.info("VMM has gone", share=name)
            if not listens:
                return


class _Connection:
    """One VMM."""

    def __init__(
        self,
        connection: trio.socket.SocketType,
        new_session: Callable[[TrioLoop], Session],
        name: str,
        tag: str,
        request_queues: int,
    ) -> None:
        self._socket = connection
        self._new_session = new_session
        self._name = name
        self._tag = tag
        self._request_queues = request_queues
        self._waiting: dict[int, trio.CancelScope] = {}

    async def run(self) -> None:
        """Until it has gone."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            loop = TrioLoop(nursery)
            self._device = Device(
                lambda: self._new_session(loop),
                on_start=self._on_start,
                on_stop=self._on_stop,
                tag=self._tag,
                request_queues=self._request_queues,
            )
            try:
                await self._converse()
            except (VhostUserError, DeviceError) as error:
                log.error("VMM dropped", share=self._name, error=str(error))
            except ConnectionError:
                pass
            finally:
                self._device.close()
                nursery.cancel_scope.cancel()

    async def _converse(self) -> None:
        reader = RequestReader()
        try:
            while True:
                data, fds = await self._receive(reader.wanted)
                if not data:
                    return
                request = reader.receive(data, fds)
                if request is not None:
                    answer = self._device.handle(request)
                    while answer:
                        answer = answer[await self._socket.send(answer) :]
        finally:
            for fd in reader.take_fds():
                os.close(fd)

    async def _receive(self, size: int) -> tuple[bytes, tuple[int, ...]]:
        data, ancillary, flags, _ = await self._socket.recvmsg(
            size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise VhostUserError("more descriptors than a message may have")
        return data, tuple(fds)

    # Queues

    def _on_start(self, index: int) -> None:
        scope = self._waiting[index] = trio.CancelScope()
        kick = self._device.rings[index].kick
        self._nursery.start_soon(self._run_queue, index, kick, scope)

    def _on_stop(self, index: int) -> None:
        trio.lowlevel.notify_closing(self._device.rings[index].kick)
        self._waiting.pop(index).cancel()

    async def _run_queue(self, index: int, kick: int, scope: trio.CancelScope) -> None:
        with scope, suppress(trio.ClosedResourceError):
            while True:
                # First without a kick: it may have been read before the queue was stopped.
                while self._device.process(index, BUDGET):
                    await trio.lowlevel.checkpoint()
                if scope.cancel_called:
                    return  # the descriptor may be closed
                await trio.lowlevel.wait_readable(kick)
                with suppress(BlockingIOError):
                    os.read(kick, 8)
