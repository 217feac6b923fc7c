"""The commands fsd-guest checkpoint, show and restore.

Apart from the other commands because they need protobuf, which is imported when one of them runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Failure

EVENTS_VARIABLE = "FSD_EVENTS"
"""Environment variable with the saved events: NUMBER:DESCRIPTOR,…, a memfd for each instance."""


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the three commands to the parser of ``fsd-guest``."""
    save = commands.add_parser(
        "checkpoint", help="save a process's inotify, fanotify and epoll state"
    )
    save.add_argument("--pid", type=int, required=True)
    save.add_argument("--take-events", action="store_true", help="take the queued events from the "
                      "process, which must be stopped, and save them")  # fmt: skip
    save.add_argument("--search", action="append", default=[], metavar="DIR", help="search "
                      "there for watched files whose path is unknown")  # fmt: skip
    save.add_argument("directory", metavar="DIR", help="new or empty")
    save.set_defaults(run=_checkpoint)

    show = commands.add_parser("show", help="print a checkpoint")
    show.add_argument("directory", metavar="DIR")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=_show)

    restore = commands.add_parser("restore", help="run a command with a checkpoint's descriptors")
    restore.add_argument(
        "--strict", action="store_true", help="do not run the command if anything is missing"
    )
    restore.add_argument("--overflow", choices=("auto", "always", "never"), default="auto",
                         help="when instances start with IN_Q_OVERFLOW: where something is lost "
                         "(auto), always, never")  # fmt: skip
    restore.add_argument("directory", metavar="DIR")
    restore.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ARGUMENT…")
    restore.set_defaults(run=_restore)


@contextmanager
def _protobuf() -> Iterator[None]:
    """For the import of modules that need protobuf."""
    try:
        yield
    except ImportError as error:
        raise Failure(
            f"{error}: checkpoints need the package protobuf (pip install protobuf, or use "
            "fsd-guest.pyz, which contains it)"
        ) from None


def _say(line: str) -> None:
    print(f"fsd-guest: {line}", file=sys.stderr)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from .checkpoint import checkpoint

    with _protobuf():
        from . import images
    images.check_free(arguments.directory)  # before events are taken
    state = checkpoint(
        arguments.pid, take_events=arguments.take_events, search=arguments.search, warn=_say
    )
    images.write(arguments.directory, state)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from .show import as_json, as_text

    with _protobuf():
        from . import images
    state = images.read(arguments.directory)
    if arguments.json:
        json.dump(as_json(state), sys.stdout)
        print()
    else:
        for line in as_text(state):
            print(line)
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    from .restore import Restorer
    from .state import Inotify

    with _protobuf():
        from . import images
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not words:
        raise Failure("restore: the command is missing; fsd-guest restore DIR -- COMMAND…")
    state = images.read(arguments.directory)
    restorer = Restorer(state, arguments.overflow)
    restorer.restore()
    for problem in restorer.problems:
        _say(problem)
    _say(
        f"restored {restorer.watches} watches and {restorer.entries} epoll entries; "
        f"{len(restorer.problems)} problems"
    )
    if restorer.problems and arguments.strict:
        return 1
    variable = []
    for file in state.files:
        if isinstance(file, Inotify) and file.queue.events:
            memory = restorer.park(os.memfd_create("events"))
            os.write(memory, file.queue.events)
            os.lseek(memory, 0, os.SEEK_SET)
            os.set_inheritable(memory, True)
            variable += [f"{fd}:{memory}" for fd in state.fds(file.id)]
    os.environ.pop(EVENTS_VARIABLE, None)
    if variable:
        os.environ[EVENTS_VARIABLE] = ",".join(variable)
    stderr = restorer.park(os.dup(2))  # which may be one of the state's numbers
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a command may not
        signal.signal(number, signal.SIG_DFL)
    restorer.place()
    try:
        os.execvp(words[0], words)
    except OSError as error:
        os.write(stderr, f"fsd-guest: {words[0]}: {error.strerror}\n".encode(errors="replace"))
        return 127
