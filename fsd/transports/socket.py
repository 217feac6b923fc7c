"""The Unix socket: guests without a mount (tools, tests, simulated guests).

Mode 0600, and the peer's uid is checked: the server's own user or root.
"""

from __future__ import annotations

import os
import socket
import struct

import structlog
import trio

from protocol.frames import ProtocolError

from ..export.channel import Channel
from ..export.export import Export
from ..pacing.guard import Guard
from ..process.socketfile import SocketFile
from .tasks import accept, forever
from .unix import unlink_stale

log = structlog.get_logger()
_READ = 64 * 1024
CHANNELS_LIMIT = 1024
"""Sessions at a time: more are refused, so that descriptors are left for files."""


class SocketTransport:
    """Listens at ``path``; owns the socket file."""

    def __init__(self, export: Export, path: str) -> None:
        self._export = export
        self.path = path
        self._channels = 0
        self._file: SocketFile | None = None
        self._listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    async def bind(self) -> None:
        """Create the socket file. Raises OSError."""
        unlink_stale(self.path)
        old = os.umask(0o177)
        try:
            await self._listener.bind(self.path)
        finally:
            os.umask(old)
        self._file = SocketFile(self.path)
        self._listener.listen(128)

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self._listener.close()
        if self._file is not None:
            self._file.remove()
            self._file = None

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:

            async def step() -> None:
                nursery.start_soon(self._serve, await accept(self._listener, socket=self.path))

            await forever("accepting a channel", step)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        with Guard("a socket channel"):
            await self._channel(connection)

    async def _channel(self, connection: trio.socket.SocketType) -> None:
        pid, uid, _gid = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        stream = trio.SocketStream(connection)
        async with stream:
            if uid not in (0, os.geteuid()) or self._channels >= CHANNELS_LIMIT:
                log.warning("socket channel refused", pid=pid, uid=uid, channels=self._channels)
                return
            self._channels += 1
            channel = Channel(self._export, f"socket channel of process {pid}", pid)
            try:
                async with trio.open_nursery() as nursery:
                    wake = trio.Event()

                    def on_wake() -> None:
                        wake.set()

                    async def send() -> None:
                        nonlocal wake
                        while True:
                            while channel.has_outgoing:
                                await stream.send_all(channel.outgoing(_READ))
                            if channel.said_bye:
                                break
                            wake = trio.Event()
                            if not channel.has_outgoing:
                                await wake.wait()
                        nursery.cancel_scope.cancel()

                    channel.wake = on_wake
                    nursery.start_soon(send)
                    async for data in stream:
                        channel.receive(bytes(data))
                        if channel.is_full:
                            taken = trio.Event()
                            channel.when_taken(taken.set)
                            await taken.wait()
                    nursery.cancel_scope.cancel()
            except* (ProtocolError, ValueError) as errors:
                log.warning("bad frame on socket", pid=pid, error=str(errors.exceptions[0]))
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            except* Exception:
                log.exception("socket channel failed", pid=pid)
            finally:
                self._channels -= 1
                channel.close()
