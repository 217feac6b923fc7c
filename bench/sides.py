"""The sides of ``bench local``: a directory served by fsd in each way, by others, by nobody.

Apart from the rows, which run on all sides alike. fsd's ways are read from `fsd mount --help`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.mounts import command, mounted, session_of

from .others import bindfs, passthrough_hp, passthrough_hp_of_trixie, passthrough_ll, served_by

Processes = Callable[[], list[int]]
"""The processes that serve a side: an agent that is restarted is another one."""


@dataclass(frozen=True)
class Side:
    """``serve`` mounts a source at a mountpoint for the block; None is the source itself."""

    name: str
    about: str
    serve: Callable[[Path, Path], AbstractContextManager[Processes]] | None

    @property
    def is_fsd(self) -> bool:
        """Whether the goals are this side's."""
        return self.name.startswith("fsd")


NATIVE, LL, HP, HP_PASSTHROUGH = "native", "ll", "hp", "hp-passthrough"
"""The sides that others are compared with."""


def sides() -> tuple[list[Side], list[str]]:
    """All that this machine has, and notes on what is missing."""
    found, notes = [Side(NATIVE, "the directory itself", None), *_fsd()], []
    for side, program in OTHERS:
        if shutil.which(program):
            found.append(side)
        else:
            notes.append(f"{side.name}: not measured, {program} is not installed")
    return found, notes


def _fsd() -> list[Side]:
    shown = subprocess.run(
        [command("fsd"), "mount", "--help"], capture_output=True, text=True, check=True
    ).stdout
    transports = [name for name in choices(shown, "--transport") if name != "auto"]
    found = []
    for transport in transports:
        for mode in choices(shown, "--cache") or [""]:
            options = [f"--transport={transport}", *([f"--cache={mode}"] if mode else [])]
            name = "-".join(filter(None, ["fsd", transport, mode]))
            found.append(Side(name, f"`fsd mount {' '.join(options)}`", _of_fsd(options)))
            if name == "fsd-devfuse-coherent" and "auto" in choices(shown, "--passthrough"):
                options = [*options, "--passthrough=auto"]
                about = f"`fsd mount {' '.join(options)}`"
                found.append(Side(f"{name}-passthrough", about, _of_fsd(options)))
    return found


def choices(shown: str, option: str) -> list[str]:
    """What an option of click's help takes, `--option [a|b]`; empty if there is no such option."""
    match = re.search(rf"{re.escape(option)}\s+\[([^\]]+)\]", shown)
    return re.sub(r"\s", "", match[1]).split("|") if match else []


def _of_fsd(options: list[str]) -> Callable[[Path, Path], AbstractContextManager[Processes]]:
    @contextmanager
    def serve(source: Path, mountpoint: Path) -> Iterator[Processes]:
        # --no-restore: a round must not begin with what the last one has looked up.
        with mounted(source, mountpoint, "--no-restore", *options) as mount:
            yield lambda: session_of(mount.process.pid)

    return serve


def _other(
    command_of: Callable[[Path, Path], list[str]],
) -> Callable[[Path, Path], AbstractContextManager[Processes]]:
    @contextmanager
    def serve(source: Path, mountpoint: Path) -> Iterator[Processes]:
        with served_by(command_of(source, mountpoint), mountpoint) as pid:
            yield lambda: [pid]

    return serve


def _of(name: str, about: str, command_of: Callable[[Path, Path], list[str]]) -> Side:
    return Side(name, about, _other(command_of))


OTHERS = [
    (_of("bindfs", "Debian's package; trusted for 1 s", bindfs), "bindfs"),
    (_of(LL, "libfuse's passthrough_ll; trusted for 1 s", passthrough_ll), "gcc"),
    (_of("ll-never", "the same, cache=never", partial(passthrough_ll, cache="never")), "gcc"),
    (_of(HP, "libfuse's passthrough_hp; trusted for a day, writes back", passthrough_hp), "g++"),
    (_of("hp-never", "the same, --nocache", partial(passthrough_hp, cached=False)), "g++"),
    (
        _of(
            HP_PASSTHROUGH,
            "passthrough_hp of Debian 13 (libfuse 3.17): trusted for a day, and the kernel itself "
            "reads and writes the files (FUSE_PASSTHROUGH)",
            passthrough_hp_of_trixie,
        ),
        "g++",
    ),
]
"""Beside each, the program without which it is not to be had. "Trusted": for so long the kernel
does not ask the server, and what it knows may be old.
"""
