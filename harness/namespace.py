"""Commands in a separate mount namespace: another /dev, and an ordinary user who may mount.

Changes in it vanish with its last process; the machine is not affected.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

UID = 65534
"""nobody: an ordinary user that every machine has."""

ROOT = Path(__file__).parents[1]


def as_user(uid: int = UID) -> list[str]:
    """The command prefix that runs a command as an ordinary user."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


def private(setup: str, *command: str | Path) -> list[str]:
    """A command line that runs ``command`` after the shell lines ``setup``, as root, in the
    namespace.
    """
    script = f"set -e\n{setup}\nexec {shlex.join(map(str, command))}"
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]


def inside(pid: int, *command: str | Path) -> list[str]:
    """A command line that runs in the namespace of a process."""
    return ["nsenter", f"--target={pid}", "--mount", *map(str, command)]


def device_of_everybody(directory: Path) -> str:
    """Shell lines that make /dev/fuse accessible to all users, as udev does on a usual machine."""
    node = directory / "fuse"
    number = os.stat("/dev/fuse").st_rdev
    return "\n".join(
        [
            f"mknod -m 666 {node} c {os.major(number)} {os.minor(number)}",
            f"mount --bind {node} /dev/fuse",
        ]
    )


def without_device(directory: Path) -> str:
    """Shell lines that remove /dev/fuse."""
    lines = []
    for name in ("null", "zero", "full", "random", "urandom"):
        number = os.stat(f"/dev/{name}").st_rdev
        lines.append(f"mknod -m 666 {directory / name} c {os.major(number)} {os.minor(number)}")
    return "\n".join([*lines, f"mount --bind {directory} /dev"])


def python_of_everybody(directory: Path) -> str:
    """Shell lines that let ordinary users reach this Python and this project, wherever they are."""
    lines = []
    for index, prefix in enumerate({Path(sys.base_prefix), ROOT}):
        closed = [p for p in reversed(prefix.parents) if not p.stat().st_mode & stat.S_IXOTH]
        if not closed:
            continue
        kept = directory / f"prefix{index}"
        kept.mkdir()
        lines += [
            f"mount --bind {prefix} {kept}",
            f"mount -t tmpfs -o mode=755 none {closed[0]}",
            f"mkdir -p {prefix}",
            f"mount --bind {kept} {prefix}",
        ]
    return "\n".join(lines)


def run(command: Sequence[str | Path], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The command's result, with decoded output."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
