"""The fsd-guest command."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import signal
import sys
from typing import Any, NoReturn

from protocol import masks
from protocol.frames import ProtocolError, Role
from protocol.images import ImageError

from .agent.agent import Agent
from .beneath import open_file
from .channel import ChannelError, Client, FileChannel, SocketChannel, open_hidden
from .errors import NO_MOUNT, PASSING, Failure
from .marks import device_of, marks_in, notify_texts, pids, process_name
from .watch import Watch
from .watcher.commands import add_commands


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status (0 done, 1 failed, 2 wrong usage)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it was closed
            stream.reconfigure(errors="surrogateescape")  # paths are any bytes
    arguments = _parser().parse_args(argv)
    try:
        result: int = arguments.run(arguments)
        return result
    except (Failure, ChannelError, ImageError, ProtocolError, masks.MaskError) as error:
        print(f"fsd-guest: {error}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader is gone
    except OSError as error:
        print(
            f"fsd-guest: {error.filename or arguments.command}: {error.strerror}", file=sys.stderr
        )
    except KeyboardInterrupt:
        return 130
    return 1


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        print(f"fsd-guest: {message}; see '{self.prog} --help'", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fsd-guest", description="Guest side of fsd: makes inotify work on a shared directory."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    agent = commands.add_parser("agent", help="replay the host's events on a mount")
    agent.add_argument("mountpoint")
    agent.set_defaults(run=_agent)

    marks = commands.add_parser("marks", help="list all marks that programs hold on a mount")
    marks.add_argument("mountpoint")
    marks.add_argument("--json", action="store_true")
    marks.set_defaults(run=_marks)

    mark = commands.add_parser("mark", help="set a mark by hand, as the agent does")
    mark.add_argument("action", choices=("add", "modify", "remove"))
    mark.add_argument("path", help="in a mount; with --socket, relative to the share's root")
    mark.add_argument("--mask", help="events: create,delete,modify,… or all")
    mark.add_argument("--socket", help="the server's Unix socket instead of a mount")
    mark.set_defaults(run=_mark)

    watch = commands.add_parser(
        "watch", help="print events as the server sends them, without inotify"
    )
    watch.add_argument("paths", nargs="+", metavar="PATH")
    watch.add_argument(
        "-r", "--recursive", action="store_true", help="watch the directories below, too"
    )
    watch.add_argument("--mask", default="all", help="events (default: all)")
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument("--socket", help="the server's Unix socket instead of a mount")
    watch.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="with --socket: if the server ends, wait so long for another (default: 60; 0: do not)",
    )
    watch.set_defaults(run=_watch)
    add_commands(commands)
    return parser


def _agent(arguments: argparse.Namespace) -> int:
    return Agent(arguments.mountpoint).run()


# Marks


def _open_hidden(mountpoint: str) -> int:
    root = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_hidden(root)
    finally:
        os.close(root)


def _mount_of(mountpoint: str) -> dict[str, Any]:
    """The mount's part of the server's statistics. Raises Failure."""
    try:
        fsd = _open_hidden(mountpoint)
        try:
            fd = open_file(fsd, b"status", os.O_RDONLY)
        finally:
            os.close(fsd)
        with open(fd) as status:
            guests: list[dict[str, Any]] = json.load(status)["guests"]
            return next(guest for guest in guests if guest["kind"] == "mount")
    except OSError as error:
        reason = error.strerror
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            reason = NO_MOUNT
        raise Failure(f"{mountpoint}: {reason}") from None


def _marks(arguments: argparse.Namespace) -> int:
    mountpoint = os.path.abspath(arguments.mountpoint)
    guest = _mount_of(mountpoint)
    armed = {(mark["nodeid"], mark["generation"]): mark for mark in guest["armed"]}
    device = device_of(os.stat(mountpoint))
    rows = []
    unread = 0
    for pid in pids():
        try:
            texts = list(notify_texts(pid))
        except OSError as error:
            unread += error.errno in PASSING  # processes of other users are ignored
            continue
        unread += any(isinstance(text, OSError) and text.errno in PASSING for _, text in texts)
        marks = (
            mark for _, text in texts if isinstance(text, str) for mark in marks_in(text, device)
        )
        for mark in marks:
            known = armed.get((mark.node.nodeid, mark.node.generation))
            covered = known is not None and not set(masks.names(mark.mask)) - set(known["mask"])
            path = known["path"] if known is not None else None
            rows.append(
                {
                    "pid": pid,
                    "process": process_name(pid),
                    "wd": mark.wd,
                    "path": None if path is None else os.path.join(mountpoint, path).rstrip("/"),
                    "nodeid": mark.node.nodeid,
                    "mask": masks.names(mark.mask),
                    "armed": bool(covered and known is not None and known["watched"]),
                }
            )
    if unread:
        print(f"fsd-guest: {unread} processes could not be read", file=sys.stderr)
    if arguments.json:
        json.dump(rows, sys.stdout)
        print()
    else:
        _table(rows)
    return 0


def _table(rows: list[dict[str, Any]]) -> None:
    heads = ["PID", "PROCESS", "WD", "NODEID", "ARMED", "PATH", "MASK"]
    lines = [heads]
    for row in rows:
        mask = set(row["mask"])
        words = "all" if mask == set(masks.names(masks.EVENTS)) else ",".join(row["mask"])
        armed = "yes" if row["armed"] else "no"
        wd = "-" if row["wd"] < 0 else row["wd"]
        cells = [row["pid"], row["process"], wd, row["nodeid"], armed, row["path"] or "?", words]
        lines.append([str(cell) for cell in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


# The channel by hand


class _Share:
    """What paths are relative to: a mount's root, or the root of a socket's export."""

    def __init__(self, path: str, socket_path: str | None) -> None:
        self._path = path
        self._socket_path = socket_path
        self.root = "/" if socket_path else _mountpoint_of(path)

    def connect(self, role: Role) -> Client:
        """Open a session with the server."""
        if self._socket_path:
            return Client(SocketChannel(self._socket_path), role)
        try:
            fsd = _open_hidden(self.root)
        except OSError:
            raise Failure(f"{self._path}: not in an fsd mount, or in another user's") from None
        try:
            return Client(FileChannel(fsd, "session"), role)
        finally:
            os.close(fsd)

    def inner(self, path: str) -> bytes:
        """The path relative to the share's root."""
        if self.root == "/":
            return os.fsencode(path.lstrip("/"))
        return os.fsencode(os.path.relpath(os.path.abspath(path), self.root))


def _mountpoint_of(path: str) -> str:
    path = os.path.abspath(path)
    if not os.path.lexists(path):
        raise Failure(f"{path}: {os.strerror(errno.ENOENT)}")
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _mark(arguments: argparse.Namespace) -> int:
    action, path = arguments.action, arguments.path
    if action != "remove" and not arguments.mask:
        raise Failure(f"mark {action}: --mask is missing; give for example --mask create,delete")
    mask = 0 if action == "remove" else int(masks.parse(arguments.mask))
    share = _Share(path, arguments.socket)
    client = share.connect(Role.BY_HAND)
    try:
        node = client.resolve(share.inner(path))
        guests = client.stats()["guests"]
        marks = [m for g in guests if g["kind"] == "by hand" for m in g["armed"]]
        known = next((m for m in marks if m["nodeid"] == node.nodeid), None)
        if action != "add" and known is None:
            raise Failure(f"mark {action} {path}: no mark was set by hand here; add one first")
        if action == "add" and known is not None:
            mask |= int(masks.parse(",".join(known["mask"])))
        client.update(node.nodeid, node.generation, mask)
    except OSError as error:
        raise Failure(f"mark {action} {path}: {error.strerror}") from None
    finally:
        client.close()
    print(f"{path} (nodeid {node.nodeid}): {masks.describe(mask)}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    mask = int(masks.parse(arguments.mask))
    share = _Share(arguments.paths[0], arguments.socket)

    def connect() -> Client:
        return share.connect(Role.OBSERVER)

    watch = Watch(connect, share.inner, mask, recursive=arguments.recursive)
    if arguments.socket and arguments.wait > 0:
        watch.keep(arguments.wait)
    for path in arguments.paths:
        try:
            watch.add(path)
        except OSError as error:
            raise Failure(f"watch {path}: {error.strerror}") from None
    # Python's own handler would not end a call that starts to wait right after the signal.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("watches established", file=sys.stderr, flush=True)
    for where, event in watch.events():
        name = os.fsdecode(event.name)
        words = masks.names(event.mask)
        if arguments.json:
            row = {"path": where, "name": name, "mask": words, "cookie": event.cookie}
            print(json.dumps(row), flush=True)
        else:
            print(f"{where}{'/' if name else ''} {','.join(words).upper()} {name}", flush=True)
    return 0
