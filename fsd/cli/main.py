"""The fsd command."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..process import systemd
from ..process.daemon import Daemon
from ..process.logs import log_to_stderr
from ..servers import deadmount
from ..servers.mount import (
    BUSY_POLL,
    CACHES,
    PASSTHROUGH,
    TRANSPORTS,
    Options,
    Place,
    check,
    clear_dead_mounts,
    reductions,
    serve,
)
from ..servers.start import StartError
from .errors import run_command
from .status import render
from .virtiofs import virtiofs

_POSITIVE = click.IntRange(1, 2**31 - 1)  # what the kernel takes


def main() -> None:
    """Entry point of `fsd`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed
            stream.reconfigure(errors="surrogateescape")  # paths are any bytes
    run_command(cli)


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fsd", prog_name="fsd")
def cli() -> None:
    """Shared directories whose guests' inotify works."""


cli.add_command(virtiofs)


def _path(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Refuse an empty path, which would be the working directory."""
    if path == "":
        raise click.BadParameter("the path is empty", ctx, parameter)
    return path


@cli.command()
@click.argument("source", callback=_path)
@click.argument("mountpoint", callback=_path)
@click.option(
    "--daemon", is_flag=True, help="Run in the background; return once the mount is ready."
)
@click.option(
    "--no-agent", is_flag=True, help="Start no agent; watching programs then get no host events."
)
@click.option(
    "--socket",
    "socket_path",
    callback=_path,
    help="Listen on this Unix socket for guests without a mount.",
)
@click.option(
    "--max-queued-events",
    type=_POSITIVE,
    help="Start only if the host queues that many inotify events (fs.inotify.max_queued_events).",
)
@click.option(
    "--max-watches",
    type=_POSITIVE,
    help="Use at most this many host watches (default: 3/4 of the host's limit).",
)
@click.option(
    "--overflow-after-loss",
    is_flag=True,
    help="Send observers (fsd-guest watch) IN_Q_OVERFLOW even if a comparison recovers the loss.",
)
@click.option(
    "--allow-other/--no-allow-other",
    default=None,
    help="Let other users use the mount (default: if root mounts it).",
)
@click.option(
    "--restore/--no-restore",
    default=None,
    help="Restore the state of this mount's last server (default: if it left an image).",
)
@click.option(
    "--state-dir", callback=_path, help="Directory of the images (default: /var/lib/fsd, or XDG's)."
)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default="auto",
    show_default=True,
    help="What carries the requests: /dev/fuse itself, or libfuse; auto prefers the former.",
)
@click.option(
    "--cache",
    type=click.Choice(CACHES),
    help="What the kernel keeps of names, attributes and data: what the host has not changed, or "
    "nothing (default: coherent; with --transport=libfuse, never).",
)
@click.option(
    "--passthrough",
    type=click.Choice(PASSTHROUGH),
    default="off",
    show_default=True,
    help="Let the kernel move file data itself, past the server, where it can (root, Linux 6.9).",
)
@click.option(
    "--busy-poll",
    type=click.FloatRange(0, 10_000),
    default=BUSY_POLL * 1e6,
    show_default=True,
    metavar="MICROSECONDS",
    help="Poll this long for the next request before sleeping; 0 saves processor time. "
    "Only with --transport=devfuse.",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning"
)
def mount(
    source: str,
    mountpoint: str,
    daemon: bool,
    no_agent: bool,
    socket_path: str | None,
    max_queued_events: int | None,
    max_watches: int | None,
    overflow_after_loss: bool,
    allow_other: bool | None,
    transport: str,
    cache: str | None,
    passthrough: str,
    busy_poll: float,
    restore: bool | None,
    state_dir: str | None,
    log_level: str,
) -> None:
    """Share SOURCE at MOUNTPOINT; inotify there reports what changes in SOURCE."""
    log_to_stderr(log_level)
    options = Options(
        source=os.path.abspath(source),
        mountpoint=os.path.abspath(mountpoint),
        agent=not no_agent,
        socket=os.path.abspath(socket_path) if socket_path else None,
        allow_other=allow_other,
        max_queued_events=max_queued_events,
        watch_limit=max_watches,
        overflow_after_loss=overflow_after_loss,
        transport=transport,
        cache=cache,
        passthrough=passthrough,
        busy_poll=busy_poll / 1e6,
        restore=restore,
        state_dir=os.path.abspath(state_dir) if state_dir else None,
    )
    behind = Daemon() if daemon else None
    try:
        for line in clear_dead_mounts(options):
            _complain(line)
        place = check(options)
        if behind is not None:
            behind.detach()
        _run(options, place, f"fsd: ready: {source} on {mountpoint}", behind)
    except StartError as error:
        if behind is not None:
            behind.failed(str(error))
        raise click.ClickException(str(error)) from None


def _run(options: Options, place: Place, line: str, behind: Daemon | None) -> None:
    notify = systemd.Manager().notify

    def ready() -> None:
        for reduced in reductions(options):
            print(f"fsd: {reduced}", file=sys.stderr)
        print(line, flush=True)
        notify("READY=1")
        if behind is not None:
            behind.ready()

    serve(options, place, ready, _complain)


def _complain(line: str) -> None:
    print(f"fsd: {line}", file=sys.stderr, flush=True)


@cli.command()
@click.argument("mountpoint", callback=_path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def checkpoint(mountpoint: str, as_json: bool) -> None:
    """Save the state of the server of MOUNTPOINT now.

    The next `fsd mount` of the same source at the same mountpoint restores it: files keep their
    nodes, and guests get what has changed since. A server also saves its state when it ends, and
    every few seconds while there is a guest that can reconnect.
    """
    path = os.path.abspath(mountpoint)
    try:
        done = json.loads(Path(path, ".fsd", "checkpoint").read_text())
    except OSError as error:
        raise click.ClickException(f"{path}: {_reason(error)}") from None
    if as_json:
        print(json.dumps(done))
    else:
        print(
            f"{done['path']}: {done['inodes']} inodes, {done['watches']} watches, "
            f"{done['guests']} guests, {done['bytes']} bytes in {done['seconds']} s"
        )


def _reason(error: OSError) -> str:
    """Why a file of a mount's .fsd cannot be read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "not an fsd mount, or another user's"
    if error.errno == errno.ENOTCONN:
        return "the server of this mount has died; run fsd mount again"
    return str(error.strerror)


@cli.command()
@click.argument("mountpoint", required=False, callback=_path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the state of one mount, or of all mounts."""
    here = [mount.path for mount in deadmount.mounts()]
    paths = [os.path.abspath(mountpoint)] if mountpoint else here
    states: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            states[path] = json.loads(Path(path, ".fsd", "status").read_text())
        except OSError as error:
            if mountpoint:
                raise click.ClickException(f"{path}: {_reason(error)}") from None
    if as_json:
        print(json.dumps(states[paths[0]] if mountpoint else states))
    elif not states:
        print("fsd: nothing is mounted")
    else:
        for path, state in states.items():
            render(path, state)


if __name__ == "__main__":
    main()
