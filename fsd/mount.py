"""`fsd mount`: one export at one mountpoint, its agent, its socket, from start to clean end."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import structlog
import trio

from .export import Export
from .service import Service
from .transports.fuse import FuseDoor
from .transports.pump import Pump
from .transports.socket import SocketDoor
from .transports.spin import SpinBeforeSleep

log = structlog.get_logger()
AGENT_STABLE = 10.0
"""Seconds after which an agent counts as having worked; restarts of one that keeps dying come
0, 1, 3, 7 and then always this many seconds apart."""
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


def check(options: Options) -> None:
    """Raises StartError for everything that can be seen before mounting."""
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
        raise StartError(f"source {source} and mountpoint {mountpoint} contain one another")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        raise StartError(
            f"/dev/fuse: {error.strerror}; load the fuse module or allow this user to open it"
        ) from None
    if os.geteuid() != 0 and not os.access(mountpoint, os.W_OK):
        raise StartError(
            f"mountpoint {mountpoint}: no permission to write to it, which mounting asks"
        )


def reductions() -> str | None:
    """What an ordinary user's mount lacks, in one line."""
    if os.geteuid() == 0:
        return None
    return (
        "not root: only your own processes can use and watch this mount, hosts' IN_DELETE_SELF of "
        "directories may come late, and umount needs -z while the agent runs"
    )


class Mounted:
    """A running mount. ``on_ready`` is called once it can be used."""

    def __init__(self, options: Options, on_ready: Callable[[], None]) -> None:
        self._options = options
        self._on_ready = on_ready
        self._stopping = False
        self._agent: trio.Process | None = None
        self._nudge: Callable[[], None] | None = None

    async def run(self) -> None:
        """Mount, serve until a signal or an unmount, clean up. Raises StartError."""
        options = self._options
        _raise_file_limit()
        try:
            export = Export(
                options.source,
                watch_limit=options.watch_limit,
                max_queued_events=options.max_queued_events,
            )
        except OSError as error:
            where = error.filename or options.source
            raise StartError(f"{where}: {error.strerror}") from None
        guest = export.add_replayer(options.mountpoint)
        service = Service(export, guest)
        self._nudge = service.hidden.dismiss
        os.umask(0)  # the guest's kernel applies its callers' umask
        door = SocketDoor(export, options.socket) if options.socket else None
        if door is not None:
            try:
                await door.bind()
            except OSError as error:
                raise StartError(f"socket {options.socket}: {error.strerror}") from None
        try:
            pyfuse3.init(FuseDoor(service), options.mountpoint, self._fuse_options())
        except RuntimeError as error:
            raise StartError(f"mounting on {options.mountpoint} failed: {error}") from None
        export.watcher.on_changed = FuseDoor.invalidate
        trio.lowlevel.add_instrument(SpinBeforeSleep(lambda: guest.ledger.is_at_work))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Pump(export).run)
                if door is not None:
                    nursery.start_soon(door.run)
                nursery.start_soon(self._signals, nursery)
                nursery.start_soon(self._come_up, guest)
                await pyfuse3.main()
                self._stopping = True
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._stop_agent()
            pyfuse3.close()
            service.close()
            export.close()

    def _fuse_options(self) -> set[str]:
        # Not pyfuse3's own default_permissions where the server is an ordinary user: the kernel
        # would judge by mode bits what the host's file system judges better.
        options = {f"fsname={self._options.source.replace(',', '_')}", "subtype=fsd"}
        root = os.geteuid() == 0
        if root:
            options.add("default_permissions")
        if self._options.allow_other if self._options.allow_other is not None else root:
            options.add("allow_other")
        return options

    async def _signals(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if not self._stopping:
                    self._stopping = True
                    await self._stop_agent()
                    pyfuse3.terminate()

    # The agent

    async def _come_up(self, guest: object) -> None:
        mountpoint = self._options.mountpoint
        with trio.fail_after(READY_TIMEOUT):
            await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
        if not self._options.agent:
            self._on_ready()
            return
        restarts = 0
        while True:
            begun = trio.current_time()
            status = await self._run_agent(self._on_ready if not restarts else _nothing)
            if status == 0:  # it was told to go, or saw the mount go
                return
            restarts = 1 if trio.current_time() - begun > AGENT_STABLE else restarts + 1
            log.warning("agent ended, starting another", status=status)
            await trio.sleep(min(AGENT_STABLE, 2.0 ** (restarts - 1) - 1))

    async def _run_agent(self, on_ready: Callable[[], None]) -> int | None:
        command = [sys.executable, "-m", "guest_tools", "agent", "--ready-fd", "1"]
        self._agent = await trio.lowlevel.open_process(
            [*command, self._options.mountpoint],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            process_group=0,  # a Ctrl-C is for the server, which then ends the agent
            cwd="/",
        )
        process = self._agent
        assert process.stdout is not None
        ready = await process.stdout.receive_some(64)
        if ready:
            on_ready()
        elif on_ready is not _nothing:
            await process.wait()
            raise StartError(f"the agent did not start (exit status {process.returncode})")
        await process.wait()
        return process.returncode

    async def _stop_agent(self) -> None:
        process, self._agent = self._agent, None
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        if self._nudge is not None:
            self._nudge()  # a waiting read is answered, so that the signal is handled now
        with trio.move_on_after(3):
            await process.wait()
            return
        process.kill()


def _nothing() -> None:
    """Ready was told already."""


def _raise_file_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
