"""`fsd virtiofs`: one export for virtual machines, a socket per guest, from start to clean exit."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import stat
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
import trio

from ..checkpoint.saver import Saver
from ..export import watchlimit
from ..export.ending import hand_over
from ..export.export import Export
from ..files.slowcalls import THREADS
from ..fuse.nodes import CACHE_MODES, Caching
from ..fuse.session import SessionOptions
from ..guests.mount import MountGuest
from ..linux import credentials
from ..linux.descriptors import share
from ..pacing.guard import Guard
from ..process import sandbox
from ..process.sandbox import NEEDED
from ..process.scheduling import spare_collections
from ..process.seccomp import Filter
from ..process.socketfile import SocketFile
from ..process.systemd import Manager, Store
from ..transports.polling import WINDOW
from ..transports.tasks import end_in_time
from ..transports.unix import from_fd, listen
from ..transports.virtiofs import GuestTransport, store_name
from .autosave import Snapshots
from .pump import Pump
from .start import StartError
from .takeover import EVERY, PATIENCE, ImageMemory, MemorySaver, open_export

log = structlog.get_logger()
FILES = 1_000_000
"""Descriptors that a server may have, unless the user gives a number."""
QUIET = 1.0
"""Seconds that a clean exit waits for agents to execute their orders."""


CACHES = tuple(CACHE_MODES)
"""Names of what guests may cache."""
BUSY_POLL = WINDOW
"""Default number of seconds to poll for the next request."""
TAG_BYTES = GuestTransport.TAG_BYTES
"""Length of a share's name in bytes."""


@dataclass(frozen=True)
class Offer:
    """What each guest is offered, in the words of the command line (SessionOptions has those of the
    code).
    """

    cache: str | None = None
    """One of CACHES; None: file data, until the next open."""
    posix_acl: bool = False
    xattr: bool = True
    locks: bool = True
    submounts: bool = False
    readdirplus: bool = True
    direct_io: bool = False

    def for_session(self) -> SessionOptions:
        """The same for a FUSE session."""
        return SessionOptions(
            caching=CACHE_MODES[self.cache] if self.cache else Caching(),
            posix_acl=self.posix_acl,
            xattr=self.xattr,
            locks=self.locks,
            submounts=self.submounts,
            readdirplus=self.readdirplus,
            direct_io=self.direct_io,
        )


@dataclass(frozen=True)
class Options:
    """The options of `fsd virtiofs`."""

    source: str
    socket_paths: tuple[str, ...] = ()
    fds: tuple[int, ...] = ()
    socket_group: str | None = None
    tag: str = ""
    offer: Offer = field(default_factory=Offer)
    read_only: bool = False
    file_handles: str = "prefer"
    sandbox: str = "namespace"
    seccomp: str = "refuse"
    capabilities: frozenset[str] = NEEDED
    file_limit: int | None = None
    threads: int = 0
    busy_poll: float = BUSY_POLL
    watch_limit: int | None = None
    overflow_after_loss: bool = False
    kept: Mapping[str, int] = field(default_factory=dict)
    """Descriptors that an earlier process has left with the service manager."""


class Source(NamedTuple):
    """Where a guest's VMM connects; ``path`` is None for an inherited descriptor."""

    name: str
    socket: socket.socket
    path: str | None = None


def run(options: Options) -> int:
    """Serve until a signal, or until every inherited connection is closed. Returns the exit status.
    Raises StartError.
    """
    _check(options)
    _limit_files(options.file_limit)
    with ExitStack() as cleanup:
        manager = Manager()
        store = Store(manager, options.kept)
        sources = _sources(options, store, cleanup)
        ready = _announcement(options, sources, manager)
        if options.sandbox == "none":
            return _inside(options, sources, store, ready)
        if options.sandbox == "namespace":
            try:
                sandbox.own_processes()
            except OSError as error:
                raise _no_namespaces(error) from None

        def inside(lifeline: int) -> int:
            def say_ready() -> None:
                with suppress(BrokenPipeError):  # the end has come before
                    os.write(lifeline, b"\0")

            try:
                return _inside(options, sources, store, say_ready, lifeline)
            except StartError as error:
                print(f"fsd: {error}", file=sys.stderr)
                return 1

        return sandbox.supervise(inside, ready)


def _check(options: Options) -> None:
    if reason := credentials.cannot_change_identity():
        raise StartError(reason)
    source = Path(options.source)
    try:
        if not source.is_dir():
            kind = "is not a directory" if source.exists() else "does not exist"
            raise StartError(f"shared directory {source} {kind}")
    except OSError as error:
        raise StartError(f"shared directory {source}: {error.strerror}") from None
    if not os.access(source, os.R_OK | os.X_OK):
        raise StartError(f"shared directory {source}: no permission to read it")
    if options.sandbox == "chroot" and os.geteuid() != 0:
        raise StartError("--sandbox=chroot needs root; use --sandbox=namespace or none")


def _limit_files(limit: int | None) -> None:
    if limit == 0:
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit is None:
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        wanted = min(FILES, most)
    else:
        wanted = limit
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (OSError, ValueError):
        if limit is not None:
            raise StartError(f"--rlimit-nofile={limit}: the limit is {hard}") from None
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# Sockets


def _sources(options: Options, store: Store, cleanup: ExitStack) -> list[Source]:
    sources: list[Source] = []
    for fd in options.fds:
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise StartError(f"--fd={fd} is not a socket")
            endpoint = from_fd(fd)
        except OSError as error:
            raise StartError(f"--fd={fd}: {error.strerror}") from None
        if endpoint.family != socket.AF_UNIX or endpoint.type != socket.SOCK_STREAM:
            raise StartError(f"--fd={fd} is not a Unix stream socket")
        cleanup.callback(endpoint.close)
        sources.append(Source(f"fd {fd}", endpoint))
    for path in options.socket_paths:
        kept = store.take(listener_name(path))
        if kept >= 0:
            sources.append(Source(path, socket.socket(fileno=kept), path))
            continue
        try:
            listener = listen(path, options.socket_group)
        except LookupError:
            raise StartError(f"--socket-group: there is no group {options.socket_group}") from None
        except OSError as error:
            raise StartError(f"socket {path}: {_why(error, path)}") from None
        cleanup.callback(listener.close)
        store.put(listener_name(path), listener.fileno())
        if not store.holds:  # else it stays for the next process
            cleanup.callback(SocketFile(path).remove)
        sources.append(Source(path, listener, path))
    return sources


def listener_name(path: str) -> str:
    """The store's name for the socket that listens at a path."""
    return f"listen-{store_name(path)}"


def _why(error: OSError, path: str) -> str:
    if "too long" in str(error):
        return "the path is too long, at most 107 bytes"
    reason = error.strerror or str(error)
    if os.path.exists(path) and "in use" in reason:
        return "another server listens there, or a file that is not a socket has this name"
    return reason


def _announcement(
    options: Options, sources: list[Source], manager: Manager
) -> Callable[[], object]:
    """The function to call once guests can connect; made before entering the sandbox."""
    names = ", ".join(source.name for source in sources)

    def ready() -> None:
        print(f"fsd: ready: {options.source} for virtual machines on {names}", flush=True)
        manager.notify("READY=1")

    return ready


# The process that guests reach


def _inside(
    options: Options,
    sources: list[Source],
    store: Store,
    ready: Callable[[], object],
    lifeline: int | None = None,
) -> int:
    """Runs in the sandbox; when the socket ``lifeline`` ends, the server stops."""
    os.umask(0)  # guests' kernels apply their callers' umask
    _take_turn(store)
    watch_limit = options.watch_limit or watchlimit.default_limit()  # seen from here only
    directory = enter(options)
    try:
        trio.run(partial(_serve, options, directory, watch_limit, sources, store, ready, lifeline))
    except OSError as error:
        raise StartError(f"{options.source}: {error.strerror or error}") from None
    return 0


def _take_turn(store: Store) -> None:
    """Wait until no earlier process serves the guests that this one takes over: a lock of fcntl(2)
    ends with its process, however that exits.
    """
    if not store.holds:
        return
    turn = store.take("turn")
    if turn < 0:
        turn = os.memfd_create("fsd-turn", os.MFD_CLOEXEC)
        store.put("turn", turn)
    fcntl.lockf(turn, fcntl.LOCK_EX)


def enter(options: Options) -> str:
    """Enter the sandbox; returns the shared directory's path in it. Raises StartError."""
    directory = os.path.realpath(options.source)
    filtering = None
    if options.seccomp != "none":
        try:
            filtering = Filter(options.seccomp)
        except OSError as error:
            raise StartError(
                f"system calls cannot be filtered: {error}; install libseccomp2 or use "
                "--seccomp=none"
            ) from None
    try:
        if options.sandbox == "namespace":
            sandbox.isolate(directory, read_only=options.read_only)
        elif options.sandbox == "chroot":
            sandbox.confine(directory)
    except OSError as error:
        raise _no_namespaces(error) from None
    keep = set(options.capabilities)
    if options.file_handles != "never":
        keep.add("DAC_READ_SEARCH")
    try:
        sandbox.drop_capabilities(keep)
        if filtering is not None:
            filtering.install()
    except OSError as error:
        raise StartError(f"privileges cannot be dropped: {error.strerror}") from None
    return directory if options.sandbox == "none" else "/"


def _no_namespaces(error: OSError) -> StartError:
    return StartError(
        f"the sandbox cannot be made: {error.strerror}; if a container forbids it, "
        "use --sandbox=chroot or none"
    )


async def _serve(
    options: Options,
    directory: str,
    watch_limit: int | None,
    sources: list[Source],
    store: Store,
    ready: Callable[[], object],
    lifeline: int | None,
) -> None:
    memory = ImageMemory(store)
    pump, snapshots = Pump(), Snapshots(every=EVERY, patience=PATIENCE)

    def make() -> Export:
        export = Export(
            directory,
            read_only=options.read_only,
            watch_limit=watch_limit,
            overflow_after_loss=options.overflow_after_loss,
            on_work=pump.wake,
            on_change=snapshots.wake,
            on_name=memory.note_name if store.holds else None,
        )
        export.source = options.source
        export.descriptors = share(len(sources))
        if options.file_handles == "mandatory" and not export.table.reach.by_handle:
            export.close()
            raise StartError(
                f"{options.source}: its file system or this user's rights allow no file handles, "
                "which --inode-file-handles=mandatory requires"
            )
        return export

    transports = [
        GuestTransport(
            name=name,
            tag=options.tag,
            options=options.offer.for_session(),
            store=store,
            busy_poll=options.busy_poll,
            threads=options.threads or THREADS,
        )
        for name, *_ in sources
    ]
    export = open_export(make, memory, store, transports)
    store.sweep()
    saver = MemorySaver(
        export, memory, lambda: dict(ChainMap(*(transport.guests for transport in transports)))
    )
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def end() -> None:
                end_in_time()
                if store.holds:
                    with Guard("leaving guests to the next process"):
                        store.stopping()
                        await _leave(transports, saver, memory, store)
                nursery.cancel_scope.cancel()

            async def end_on_signal() -> None:
                async for _ in signals:
                    await end()

            async def end_with_outside(fd: int) -> None:
                await trio.lowlevel.wait_readable(fd)
                await end()

            nursery.start_soon(pump.run, export)
            nursery.start_soon(end_on_signal)
            if lifeline is not None:
                nursery.start_soon(end_with_outside, lifeline)
            if store.holds:
                nursery.start_soon(snapshots.run, saver)
            async with trio.open_nursery() as guests:
                for transport, source in zip(transports, sources, strict=True):
                    guests.start_soon(transport.serve, source.socket)
                spare_collections()
                ready()
            nursery.cancel_scope.cancel()  # no guest can come any more
    if not store.holds:
        export.close()


async def _leave(
    transports: list[GuestTransport], saver: Saver, memory: ImageMemory, store: Store
) -> None:
    """Prepare for the next process, which continues with the guests."""
    export = saver.export
    export.is_stopping = True
    asked = export.arming.asked()
    with trio.move_on_after(QUIET):  # until agents have reported the marks that were just set
        while export.arming.awaits(asked):  # noqa: ASYNC110 - rare
            await trio.sleep(0.002)
    guests = [guest for guest in export.guests if isinstance(guest, MountGuest)]
    for guest in guests:
        guest.is_paused = True
    with trio.move_on_after(QUIET):  # until agents have executed their orders
        while any(guest.pid and len(guest.ledger) for guest in guests):  # noqa: ASYNC110 - rare
            await trio.sleep(0.002)
    for transport in transports:
        transport.leave()
    inotify = hand_over(export, QUIET)
    saver.take()()
    if inotify >= 0:
        store.put("inotify", inotify)
        memory.mark(last=True)
