"""`fsd mount`: one export at one mountpoint, its agent, its socket, from start to clean exit."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from protocol.frames import FSD_NAME

from ..checkpoint.file import StateFile, state_directory, state_path
from ..checkpoint.saver import Saver, open_export
from ..export.export import Export
from ..fuse.operations import Operations
from ..guests.mount import MountGuest
from ..linux import credentials, mounting, syscalls
from ..linux.queuelimit import require_queue
from ..pacing.guard import Guard
from ..process.scheduling import shorten_turns, spare_collections
from ..transports import fusermount
from ..transports.devfuse import DevfuseTransport
from ..transports.mounting import MountError, MountTransport, Place, UnavailableError
from ..transports.polling import LOCAL_WINDOW
from ..transports.socket import SocketTransport
from ..transports.tasks import end_in_time
from . import deadmount
from .agent import AgentError, AgentProcess
from .autosave import Snapshots
from .pump import Pump
from .start import StartError

__all__ = [
    "BUSY_POLL", "CACHES", "PASSTHROUGH", "TRANSPORTS", "Options", "Place", "StartError", "check",
    "clear_dead_mounts", "reductions", "serve",
]  # fmt: skip

log = structlog.get_logger()
TRANSPORTS = ("auto", "devfuse", "libfuse")
CACHES = ("coherent", "never")
"""What the kernel may keep: what the host has not changed, or nothing."""
PASSTHROUGH = ("auto", "off")
"""Whether the kernel moves file data itself: where it can and may, or never."""
BUSY_POLL = LOCAL_WINDOW
READY_TIMEOUT = 20.0
"""Seconds for the mount and the agent to become ready, on a busy machine."""


@dataclass(frozen=True)
class Options:
    """The options of `fsd mount`."""

    source: str
    mountpoint: str
    agent: bool = True
    socket: str | None = None
    allow_other: bool | None = None
    max_queued_events: int | None = None
    watch_limit: int | None = None
    overflow_after_loss: bool = False
    transport: str = "auto"
    """One of TRANSPORTS; auto: devfuse, or libfuse if that is not available."""
    cache: str | None = None
    """One of CACHES; None: coherent, or never if the transport is libfuse."""
    passthrough: str = "off"
    """One of PASSTHROUGH."""
    busy_poll: float = BUSY_POLL
    """Seconds after an answer for which to poll for the next request; 0 never polls."""
    restore: bool | None = None
    """None: if there is an image."""
    state_dir: str | None = None

    @property
    def for_all(self) -> bool:
        """Whether other users than the server's may use the mount."""
        return self.allow_other if self.allow_other is not None else os.geteuid() == 0


def clear_dead_mounts(options: Options) -> list[str]:
    """Unmount what this user's dead servers have left at the mountpoint; returns lines that say so.
    Raises StartError if it belongs to another user.
    """
    mountpoint = options.mountpoint
    try:
        if deadmount.take_away(mountpoint):
            return [f"mountpoint {mountpoint}: its server had died; unmounted it"]
    except (OSError, subprocess.TimeoutExpired):
        raise StartError(
            f"mountpoint {mountpoint} is not connected: the server of the mount there has died; "
            f"unmount it first (fusermount3 -u {mountpoint}, or umount as root)"
        ) from None
    return []


def check(options: Options) -> Place:
    """Returns where to mount. Raises StartError for every fault that can be seen before
    mounting.
    """
    if reason := credentials.cannot_change_identity():
        raise StartError(reason)
    if options.cache == "coherent" and options.transport == "libfuse":
        raise StartError("--cache=coherent needs --transport=devfuse")
    source, mountpoint = Path(options.source), Path(options.mountpoint)
    try:
        if not source.is_dir():
            kind = "is not a directory" if source.exists() else "does not exist"
            raise StartError(f"source {source} {kind}")
        if not os.access(source, os.R_OK | os.X_OK):
            raise StartError(f"source {source}: no permission to read it")
        if not mountpoint.is_dir():
            kind = "is not a directory" if mountpoint.exists() else "does not exist"
            raise StartError(f"mountpoint {mountpoint} {kind}; create it first")
        # From here on it is this directory, whatever the path leads to: others may write there.
        fd = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    try:
        _check_mountpoint(source, mountpoint, fd)
    except OSError as error:
        os.close(fd)
        raise StartError(f"mountpoint {mountpoint}: {error.strerror}") from None
    except StartError:
        os.close(fd)
        raise
    return Place(options.source, options.mountpoint, fd, options.for_all)


def _check_mountpoint(source: Path, mountpoint: Path, fd: int) -> None:
    if mountpoint.is_mount():
        raise StartError(f"mountpoint {mountpoint} is busy: something is mounted there")
    if os.listdir(syscalls.fd_path(fd)):
        raise StartError(f"mountpoint {mountpoint} is not empty")
    shared, place = source.resolve(), Path(os.fsdecode(syscalls.shown_path(fd)))
    if place.is_relative_to(shared) or shared.is_relative_to(place):
        raise StartError(
            f"source {source} and mountpoint {mountpoint} must not contain one another"
        )
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise StartError(
            f"/dev/fuse: {error.strerror}; load the fuse module or allow this user to open it"
        ) from None
    if os.geteuid() != 0 and not os.access(syscalls.fd_path(fd), os.W_OK):
        raise StartError(f"mountpoint {mountpoint}: mounting needs permission to write to it")


def reductions(options: Options) -> list[str]:
    """What this mount will lack, a line each, printed once at its start."""
    lines = []
    if os.geteuid() != 0:
        lines.append(
            "not root: only your own processes can use and watch this mount; programs on the host "
            "may get IN_DELETE_SELF of directories late; umount needs -z while the agent runs"
        )
    if os.path.lexists(os.path.join(os.fsencode(options.source), FSD_NAME)):
        lines.append(
            f"source {options.source} has an entry named .fsd, which cannot be reached through the "
            "mount: the mount's hidden directory has that name; rename the entry to share it"
        )
    return lines


class Mounted:
    """A running mount. ``on_ready`` is called once it can be used."""

    def __init__(
        self,
        options: Options,
        place: Place,
        on_ready: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        self._options = options
        self._place = place
        self._on_ready = on_ready
        self._complain = complain
        directory = Path(options.state_dir) if options.state_dir else state_directory()
        self._state = StateFile(state_path(directory, options.source, options.mountpoint))
        self._pump = Pump()
        self._snapshots = Snapshots()
        self._agent: AgentProcess | None = None
        self._export: Export
        self._guest: MountGuest
        self._mount: MountTransport

    async def run(self) -> None:
        """Mount, serve until a signal or an unmount, clean up. Raises StartError."""
        options = self._options
        _raise_file_limit()
        credentials.obey_limits_of_disks()
        shorten_turns()
        os.umask(0)  # the guest's kernel applies its callers' umask
        with (
            trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
            ExitStack() as cleanup,
        ):
            cleanup.callback(os.close, self._place.fd)
            self._export = export = self._open_export()
            cleanup.callback(export.close)
            saver = Saver(export, self._state)
            self._guest = guest = export.add_mount_guest(options.mountpoint, is_local=True)
            operations = Operations(export, guest, checkpoint=saver.save)
            cleanup.callback(operations.close)
            if options.agent:
                self._agent = AgentProcess(options.mountpoint, operations.hidden.dismiss)
            transport = await self._bind(export, cleanup)
            self._mount = mount = self._make_mount(operations)
            cleanup.callback(mount.close)
            guest.transport = mount.name
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump.run, export)
                    if transport is not None:
                        nursery.start_soon(transport.run)
                    nursery.start_soon(self._end_on, signals)
                    nursery.start_soon(self._come_up)
                    nursery.start_soon(self._snapshots.run, saver)
                    await mount.run()
                    export.is_stopping = True
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop_agent()
            try:
                saver.save()
            except OSError as error:
                self._complain(f"image {self._state.path} cannot be written: {error.strerror}")

    def _open_export(self) -> Export:
        options = self._options

        def make() -> Export:
            return Export(
                options.source,
                watch_limit=options.watch_limit,
                overflow_after_loss=options.overflow_after_loss,
                on_work=self._pump.wake,
                on_change=self._snapshots.wake,
            )

        try:
            require_queue(options.max_queued_events or 0)
        except OSError as error:
            raise StartError(f"{error.strerror}") from None
        try:
            return open_export(make, self._state, self._complain, restore=options.restore)
        except OSError as error:
            where = error.filename or options.source
            raise StartError(
                f"{where}: {error.strerror or error}"
            ) from None  # pyinotify's has none

    async def _bind(self, export: Export, cleanup: ExitStack) -> SocketTransport | None:
        if not self._options.socket:
            return None
        transport = SocketTransport(export, self._options.socket)
        cleanup.callback(transport.close)
        try:
            await transport.bind()
        except OSError as error:
            raise StartError(f"socket {transport.path}: {error.strerror}") from None
        return transport

    def _make_mount(self, operations: Operations) -> MountTransport:
        """Mount by the requested transport. Raises StartError."""
        asked, cache = self._options.transport, self._options.cache
        try:
            if asked != "libfuse":
                try:
                    return DevfuseTransport(
                        operations,
                        self._place,
                        coherent=cache != "never",
                        passthrough=self._options.passthrough == "auto",
                        busy_poll=self._options.busy_poll,
                    )
                except UnavailableError as error:
                    if asked == "devfuse" or cache == "coherent":
                        raise
                    log.warning("transport devfuse cannot be had, using libfuse", reason=str(error))
            # Only here: it may not be installed, and takes its time.
            from ..transports.libfuse import LibfuseTransport

            return LibfuseTransport(operations, self._place)
        except (MountError, ImportError) as error:
            mountpoint = self._options.mountpoint
            raise StartError(f"mounting on {mountpoint} failed: {error}") from None

    def _serves(self, device: int) -> None:
        """The mountpoint's path leads to a file system with that st_dev. Raises StartError if that
        is not this mount: the agent would work there.
        """
        mount = mounting.mounted_on(self._place.fd)
        if mount is None or mount.device != device:
            raise StartError(f"{self._options.mountpoint} is another directory than before")
        self._export.table.mounts.serves(device)
        self._guest.device = device

    async def _end_on(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            end_in_time(self._take_away)
            # No order is sent any more, so no request waits for one; else its program got EINTR.
            self._guest.is_paused = True
            self._guest.history.check()
            with Guard("stopping the agent"):
                await self._stop_agent()
            self._mount.stop()

    def _take_away(self) -> None:
        """Leave no dead mount behind."""
        fusermount.unmount(self._place, timeout=0.3)

    async def _stop_agent(self) -> None:
        if self._agent is not None:
            await self._agent.stop()

    async def _come_up(self) -> None:
        mountpoint = self._options.mountpoint
        with trio.move_on_after(READY_TIMEOUT) as starting:

            def ready() -> None:
                starting.deadline = math.inf
                spare_collections()
                self._on_ready()

            try:
                own = await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
                self._serves(own.st_dev)
                if self._agent is None:
                    ready()
                else:
                    await self._agent.run(ready)
            except OSError as error:
                raise StartError(f"{mountpoint}: {error.strerror}") from None
            except AgentError as error:
                raise StartError(str(error)) from None
        if starting.cancelled_caught:
            raise StartError(f"{mountpoint} is not ready after {READY_TIMEOUT:.0f} s")


def serve(
    options: Options,
    place: Place,
    on_ready: Callable[[], None],
    complain: Callable[[str], None],
) -> None:
    """Run a mount from start to end. Raises StartError."""
    try:
        trio.run(Mounted(options, place, on_ready, complain).run, strict_exception_groups=True)
    except* StartError as errors:
        raise _first(errors) from None


def _first(group: BaseExceptionGroup[StartError]) -> StartError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StartError)
    return error


def _raise_file_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
