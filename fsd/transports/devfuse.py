"""The /dev/fuse transport: a mount(2) of our own, its requests read from the descriptor. Root only.

The same session as the virtiofs transport's, on this machine and without libfuse.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog
import trio

from ..fuse.operations import Operations
from ..fuse.request import MAX_WRITE
from ..fuse.session import FuseSession, SessionOptions
from ..pacing.guard import PAUSE, Guard
from .loop import TrioLoop

log = structlog.get_logger()
_BUFFER = MAX_WRITE + 4096
"""Bytes of the longest request, and of the longest reply: the data and room for its headers."""
_BURST = 16
"""Requests answered before other tasks get their turn."""
_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


class DevfuseTransport:
    """One mount, ``for_all`` users or for root's processes alone. Raises OSError where it cannot be
    made.
    """

    def __init__(
        self,
        operations: Operations,
        source: str,
        mountpoint: str,
        options: SessionOptions,
        *,
        for_all: bool = True,
    ) -> None:
        self._operations = operations
        self._options = options
        self._mountpoint = mountpoint
        self._scope = trio.CancelScope()
        self._gone = False
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        rootmode = Path(operations.export.source).stat().st_mode
        data = f"fd={self.fd},rootmode={rootmode:o},user_id=0,group_id=0"
        data += ",default_permissions" + ",allow_other" * for_all
        arguments = (source.encode(), mountpoint.encode(), b"fuse.fsd")
        flags = _MS_NOSUID | _MS_NODEV
        try:
            _check(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode()), mountpoint)
        except OSError:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Take the mount away, if it is there, and end the connection."""
        if not self._gone:
            _libc.umount2(self._mountpoint.encode(), _MNT_DETACH)
        os.close(self.fd)

    def stop(self) -> None:
        """Make ``run`` return."""
        self._scope.cancel()

    async def run(self) -> None:
        """Serve until the mount is gone, or ``stop``."""
        with self._scope:
            await self._run()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            options = replace(self._options, notify=self._notify)
            loop = TrioLoop(nursery, turn=self._operations.export.turn)
            session = FuseSession(self._operations, loop, options)
            try:
                await self._serve(session)
            finally:
                session.close()
                nursery.cancel_scope.cancel()

    async def _serve(self, session: FuseSession) -> None:
        buffers: list[tuple[memoryview, memoryview]] = []
        while not self._gone:
            with Guard("serving requests") as guard:
                await self._burst(session, buffers)
            if guard.failed:
                await trio.sleep(PAUSE)

    async def _burst(
        self, session: FuseSession, buffers: list[tuple[memoryview, memoryview]]
    ) -> None:
        await trio.lowlevel.wait_readable(self.fd)
        for _ in range(_BURST):
            request, reply = buffers.pop() if buffers else _new_buffers()
            try:
                size = os.readv(self.fd, [request])
            except BlockingIOError:
                buffers.append((request, reply))
                break
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):  # withdrawn meanwhile
                    buffers.append((request, reply))
                    continue
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    self._gone = True
                    return
                raise
            done = self._done(buffers, request, reply)
            session.serve([request[:size]], [reply], done)

    def _notify(self, message: bytes) -> None:
        with suppress(OSError):  # the file is closed by now, or the mount is gone
            os.write(self.fd, message)

    def _done(
        self, buffers: list[tuple[memoryview, memoryview]], request: memoryview, reply: memoryview
    ) -> Callable[[int], None]:
        def done(size: int) -> None:
            buffers.append((request, reply))
            if size:
                os.write(self.fd, reply[:size])

        return done


def _new_buffers() -> tuple[memoryview, memoryview]:
    return memoryview(bytearray(_BUFFER)), memoryview(bytearray(_BUFFER))
