"""`fsd mount`: one export at one mountpoint, its agent, its socket, from start to clean end."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyfuse3
import trio

from protocol.frames import FSD_NAME

from ..checkpoint.file import StateFile, state_directory, state_path
from ..checkpoint.saver import Saver, open_export
from ..export.export import Export
from ..fuse.operations import Operations
from ..fuse.session import SessionOptions
from ..guests.mount import MountGuest
from ..linux import credentials
from ..pacing.guard import Guard
from ..process.scheduling import shorten_turns, spare_collections
from ..transports.devfuse import DevfuseTransport
from ..transports.libfuse import LibfuseTransport
from ..transports.socket import SocketTransport
from ..transports.spin import SpinBeforeSleep
from ..transports.tasks import end_in_time
from . import deadmount
from .agent import AgentError, AgentProcess
from .autosave import Snapshots
from .pump import Pump

READY_TIMEOUT = 20.0
"""Seconds for the mount and the agent to come up, on a busy machine."""


class StartError(Exception):
    """Why a mount cannot be made, in one line for people."""


@dataclass(frozen=True)
class Options:
    """What `fsd mount` was asked for."""

    source: str
    mountpoint: str
    agent: bool = True
    socket: str | None = None
    allow_other: bool | None = None
    max_queued_events: int | None = None
    watch_limit: int | None = None
    overflow_after_loss: bool = False
    raw: bool = False
    restore: bool | None = None
    """None: where there is an image."""
    state_dir: str | None = None


def mend(options: Options) -> list[str]:
    """Take away what dead servers have left at the mountpoint, and say so. Raises StartError where
    that is somebody else's.
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


def check(options: Options) -> None:
    """Raises StartError for everything that can be seen before mounting."""
    if reason := credentials.cannot_change_identity():
        raise StartError(reason)
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
        if mountpoint.is_mount():
            raise StartError(f"mountpoint {mountpoint} is busy: something is mounted there")
        if any(mountpoint.iterdir()):
            raise StartError(f"mountpoint {mountpoint} is not empty")
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    inside = mountpoint.resolve().is_relative_to(source.resolve())
    if inside or source.resolve().is_relative_to(mountpoint.resolve()):
        raise StartError(
            f"source {source} and mountpoint {mountpoint} must not contain one another"
        )
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        raise StartError(
            f"/dev/fuse: {error.strerror}; load the fuse module or allow this user to open it"
        ) from None
    if os.geteuid() != 0 and not os.access(mountpoint, os.W_OK):
        raise StartError(f"mountpoint {mountpoint}: mounting needs permission to write to it")


def reductions(options: Options) -> list[str]:
    """What this mount will lack, a line each, to be said once at its start."""
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


class Serving(NamedTuple):
    """What a mount is served by: until it is gone, or ``stop`` is called."""

    run: Callable[[], Awaitable[None]]
    stop: Callable[[], None]
    close: Callable[[], None]


class Mounted:
    """A running mount. ``on_ready`` is called once it can be used."""

    def __init__(
        self, options: Options, on_ready: Callable[[], None], complain: Callable[[str], None]
    ) -> None:
        self._options = options
        self._on_ready = on_ready
        self._complain = complain
        directory = Path(options.state_dir) if options.state_dir else state_directory()
        self._state = StateFile(state_path(directory, options.source, options.mountpoint))
        self._agent: AgentProcess | None = None
        self._serves: Callable[[int], None]
        self._unmount: Callable[[], None] = pyfuse3.terminate

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
            export = self._open_export()
            cleanup.callback(export.close)
            saver = Saver(export, self._state)
            export.checkpoint = saver.save
            guest = export.add_mount_guest(options.mountpoint, is_local=True)
            self._serves = partial(_serves, export, guest)
            operations = Operations(export, guest)
            cleanup.callback(operations.close)
            if options.agent:
                self._agent = AgentProcess(options.mountpoint, operations.hidden.dismiss)
            transport = await self._bind(export, cleanup)
            mount = self._mount_raw(operations) if options.raw else self._mount(operations)
            cleanup.callback(mount.close)
            self._unmount = mount.stop
            trio.lowlevel.add_instrument(SpinBeforeSleep(lambda: guest.ledger.is_at_work))
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(Pump(export).run)
                    if transport is not None:
                        nursery.start_soon(transport.run)
                    nursery.start_soon(self._end_on, signals)
                    nursery.start_soon(self._come_up)
                    nursery.start_soon(Snapshots(saver).run)
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
                max_queued_events=options.max_queued_events,
                overflow_after_loss=options.overflow_after_loss,
            )

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

    def _mount(self, operations: Operations) -> Serving:
        mountpoint = self._options.mountpoint
        with tempfile.TemporaryFile() as said:
            try:
                with _stderr_in(said.fileno()):
                    transport = LibfuseTransport(operations, judged=self._judged)
                    pyfuse3.init(transport, mountpoint, self._fuse_options())
            except RuntimeError as error:
                said.seek(0)
                reason = os.fsdecode(said.read()).strip().rpartition("\n")[2] or error
                raise StartError(f"mounting on {mountpoint} failed: {reason}") from None
        operations.export.watcher.on_changed = LibfuseTransport.invalidate
        operations.guest.history.serve(LibfuseTransport.invalidate)
        return Serving(pyfuse3.main, pyfuse3.terminate, pyfuse3.close)

    def _mount_raw(self, operations: Operations) -> Serving:
        mountpoint = self._options.mountpoint
        options = SessionOptions(posix_acl=True, is_local=True)
        try:
            transport = DevfuseTransport(
                operations, self._options.source, mountpoint, options, for_all=self._for_all
            )
        except OSError as error:
            raise StartError(f"mounting on {mountpoint} failed: {error.strerror}") from None
        return Serving(transport.run, transport.stop, transport.close)

    @property
    def _for_all(self) -> bool:
        """Whether other users than the server's may use the mount."""
        asked = self._options.allow_other
        return asked if asked is not None else os.geteuid() == 0

    @property
    def _judged(self) -> bool:
        """Whether the kernel checks permissions: wherever the server does for others what it may
        do itself. For an ordinary user alone the host's file system judges better.
        """
        return self._for_all or os.geteuid() == 0

    def _fuse_options(self) -> set[str]:
        shown = re.sub(r"[^ -~]|[,\\]", "_", self._options.source)  # pyfuse3 takes ASCII alone
        options = {f"fsname={shown}", "subtype=fsd"}
        if self._judged:
            options.add("default_permissions")
        if self._for_all:
            options.add("allow_other")
        return options

    async def _end_on(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            end_in_time(self._take_away)
            with Guard("stopping the agent"):
                await self._stop_agent()
            self._unmount()

    def _take_away(self) -> None:
        """Leave no dead mount behind."""
        deadmount.unmount(self._options.mountpoint, timeout=0.3)

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


def _serves(export: Export, guest: MountGuest, device: int) -> None:
    """The mount is there, with that st_dev."""
    export.table.mounts.serves(device)
    guest.device = device


@contextmanager
def _stderr_in(fd: int) -> Iterator[None]:
    """libfuse and fusermount3 say why they fail on stderr only; in here that goes to ``fd``."""
    own = os.dup(2)
    try:
        os.dup2(fd, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _raise_file_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
