"""The /dev/fuse transport: its requests are read from the descriptor itself, without libfuse.

The same session as the virtiofs transport's, on this machine: as root by mount(2), as an ordinary
user by fusermount3.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from contextlib import suppress

import structlog
import trio

from ..cache.coherent import CoherentCache
from ..cache.notifier import Notifier
from ..fuse.operations import Operations
from ..fuse.request import MAX_WRITE
from ..fuse.session import FuseSession, SessionOptions
from ..linux import mounting
from ..pacing.guard import PAUSE, Guard
from . import fusermount
from .loop import TrioLoop
from .mounting import MountError, Place
from .polling import LOCAL_WINDOW, BusyPolling

log = structlog.get_logger()
_BUFFER = MAX_WRITE + 4096
"""Bytes of the longest request, and of the longest reply: the data and room for its headers."""
_BURST = 16
"""Requests answered before other tasks get their turn."""
_EVENTS = 1 << 15
"""Bytes of the host's events that are handled in one go: about 5 ms."""
_SETTLING = 0.005
"""Seconds between looks whether the kernel has acted on the notifications."""
_KIND = "fsd"
"""The subtype of the mount: its type is fuse.fsd."""
_Buffers = list[tuple[memoryview, memoryview]]


class DevfuseTransport:
    """One mount."""

    name = "devfuse"

    def __init__(
        self,
        operations: Operations,
        place: Place,
        *,
        coherent: bool = False,
        passthrough: bool = False,
        busy_poll: float = LOCAL_WINDOW,
    ) -> None:
        """``coherent``: the kernel keeps what the host has not changed. ``passthrough``: it moves
        file data itself where it can. ``busy_poll``: the window of BusyPolling in seconds.
        """
        self._busy_poll = busy_poll
        self._operations = operations
        self._place = place
        self._scope = trio.CancelScope()
        self._gone = False
        self._is_users = False
        self._buffers: _Buffers = []
        self.fd = self._mount()
        self._token: trio.lowlevel.TrioToken | None = None
        self._notifier = Notifier(self.fd, self._settled) if coherent else None
        self._options = SessionOptions(
            posix_acl=place.is_judged,
            is_judged=place.is_judged,
            is_local=True,
            notify=self._notify,
            notifier=self._notifier,
            device=self.fd if passthrough and not self._is_users else -1,
        )
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def _mount(self) -> int:
        place = self._place
        if os.geteuid() == 0:
            try:
                return _mount_as_root(place, os.stat(self._operations.export.source).st_mode)
            except PermissionError:  # root of a user namespace, or one without capabilities
                log.debug("mount(2) is not permitted", instead=fusermount.PROGRAM)
            except OSError as error:
                raise MountError(error.strerror or str(error)) from None
        self._is_users = True
        fd = fusermount.mount(place, _KIND)
        os.set_blocking(fd, False)
        return fd

    def close(self) -> None:
        """Unmount, unless that has happened, and end the connection."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        if self._is_users:
            os.close(fd)  # first: fusermount3 may look at the mount, and nothing would answer
        try:
            if not self._gone:
                with suppress(OSError, MountError):
                    fusermount.unmount(self._place)
        finally:
            if not self._is_users:
                os.close(fd)

    def stop(self) -> None:
        """Make ``run`` return. Not while the kernel acts on a notification: it may need answers."""
        if self._notifier is not None:
            self._notifier.close()
            if not self._notifier.is_idle:
                trio.lowlevel.spawn_system_task(self._stop_soon)
                return
        self._scope.cancel()

    async def _stop_soon(self) -> None:
        await trio.sleep(_SETTLING)
        self.stop()

    async def run(self) -> None:
        """Serve until the mount is gone, or ``stop``."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                loop = TrioLoop(nursery, turn=self._operations.export.turn)
                session = FuseSession(self._operations, loop, self._options)
                if session.cache is not None:
                    self._token = trio.lowlevel.current_trio_token()
                    nursery.start_soon(self._take_back, session.cache)
                if session.backing is not None and session.backing.files is not None:
                    nursery.start_soon(self._take_in, session.backing.files.fd)
                try:
                    await self._serve(session, loop)
                finally:
                    session.end()
                    nursery.cancel_scope.cancel()

    async def _serve(self, session: FuseSession, loop: TrioLoop) -> None:
        polling = BusyPolling(self._busy_poll)
        while not self._gone:
            with Guard("serving requests") as guard:
                while self._burst(session):
                    await trio.lowlevel.checkpoint()
                # A thread that has done its work could not say so meanwhile.
                if not loop.threads and await polling.finds(self._is_there):
                    continue
                await trio.lowlevel.wait_readable(self.fd)
                polling.slept()
            if guard.failed:
                await trio.sleep(PAUSE)

    async def _take_back(self, cache: CoherentCache) -> None:
        while True:
            await trio.lowlevel.wait_readable(cache.fd)
            with Guard("taking back what the host has changed") as guard:
                cache.read(_EVENTS)
            await trio.lowlevel.checkpoint()
            if guard.failed:
                await trio.sleep(PAUSE)

    async def _take_in(self, fd: int) -> None:
        """What others do with files that the kernel uses itself, should it be seen late."""
        watcher = self._operations.export.watcher
        while True:
            await trio.lowlevel.wait_readable(fd)
            with Guard("reading what others do with open files") as guard:
                watcher.drain()
            await trio.lowlevel.checkpoint()
            if guard.failed:
                await trio.sleep(PAUSE)

    def _settled(self) -> None:
        """In the notifier's thread."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake_agent, idempotent=True)

    def _wake_agent(self) -> None:
        guest = self._operations.guest
        if guest.has_outgoing:  # else it would be woken for nothing at many writes
            guest.wake()

    def _is_there(self) -> bool:
        return bool(self._poll.poll(0))

    def _burst(self, session: FuseSession) -> bool:
        """Answer waiting requests for a while; returns whether there may be more."""
        buffers = self._buffers
        for _ in range(_BURST):
            request, reply = buffers.pop() if buffers else _new_buffers()
            try:
                size = os.readv(self.fd, [request])
            except OSError as error:
                buffers.append((request, reply))
                if error.errno in (errno.ENOENT, errno.EINTR):  # withdrawn meanwhile
                    continue
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    self._gone = True
                elif error.errno != errno.EAGAIN:
                    raise
                return False
            session.serve([request[:size]], [reply], self._done(request, reply))
            if not self._is_there():  # costs less than a read that fails
                return False
        return True

    def _notify(self, message: bytes) -> None:
        with suppress(OSError):  # the file is closed, or the mount is gone
            os.write(self.fd, message)

    def _done(self, request: memoryview, reply: memoryview) -> Callable[[int], None]:
        def done(size: int) -> None:
            self._buffers.append((request, reply))
            if size:
                os.write(self.fd, reply[:size])

        return done


def _mount_as_root(place: Place, mode: int) -> int:
    """mount(2); returns the descriptor of the connection. Raises OSError."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # No name is in here: a source may have commas.
        data = f"fd={fd},rootmode={mode:o},user_id={os.geteuid()},group_id={os.getegid()}"
        data += ",default_permissions" * place.is_judged + ",allow_other" * place.for_all
        flags = mounting.MS_NOSUID | mounting.MS_NODEV
        mounting.mount(place.source, place.fd, f"fuse.{_KIND}", flags, data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _new_buffers() -> tuple[memoryview, memoryview]:
    return memoryview(bytearray(_BUFFER)), memoryview(bytearray(_BUFFER))
