"""Mounts of ordinary users: fusermount3 mounts, passes the connection on, and unmounts.

The protocol is libfuse's, and every FUSE library speaks it: the program gets a socket's number in
_FUSE_COMMFD, and sends the descriptor of /dev/fuse there (SCM_RIGHTS).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess

from ..linux import fdpassing, mounting
from .mounting import MountError, Place, UnavailableError

PROGRAM = "fusermount3"
_TIMEOUT = 20.0
"""Seconds for it to mount or unmount: it does nothing that takes longer."""
_DIRECTORIES = "/usr/local/bin:/usr/bin:/bin"
"""Directories to search in addition to PATH."""
_SPECIAL = re.compile(r"[\\,]")


def mount(place: Place, kind: str) -> int:
    """Mount; returns the descriptor of the connection. Raises MountError, UnavailableError if there
    is no such program, or it passes no descriptor.
    """
    options = [f"fsname={_quoted(place.source)}", f"subtype={_quoted(kind)}", "nosuid", "nodev"]
    options += ["default_permissions"] * place.is_judged + ["allow_other"] * place.for_all
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            arguments = ["-o", ",".join(options), "--", place.mountpoint]
            done = _run(*arguments, passed=theirs.fileno())
        if done.returncode:
            raise MountError(_reason(done))
        ours.setblocking(False)
        try:
            _, fds = fdpassing.receive(ours, 1, 1)
        except BlockingIOError:
            fds = []
    if not fds:
        raise UnavailableError(f"{PROGRAM} passes no descriptor")
    return fds[0]


def unmount(place: Place, timeout: float = _TIMEOUT) -> None:
    """Unmount a place even if it is in use: as root by umount2(2), else by fusermount3. Raises
    MountError, OSError.
    """
    if os.geteuid() == 0:
        try:
            mounting.unmount(place.fd)
            return
        except PermissionError:  # root of a user namespace: as it was mounted
            pass
    done = _run("-u", "-z", "--", place.mountpoint, timeout=timeout)
    if done.returncode:
        raise MountError(_reason(done))


def _run(
    *arguments: str, passed: int | None = None, timeout: float = _TIMEOUT
) -> subprocess.CompletedProcess[bytes]:
    path = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=_DIRECTORIES)
    if path is None:
        raise UnavailableError(f"there is no {PROGRAM}")
    environment = {**os.environ, "LC_ALL": "C"}
    if passed is not None:
        environment["_FUSE_COMMFD"] = str(passed)
    try:
        return subprocess.run(
            [PROGRAM, *arguments],  # by its name only, as in its own messages
            executable=path,
            env=environment,
            pass_fds=() if passed is None else (passed,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MountError(f"{PROGRAM} has not ended within {timeout:.0f} s") from None
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}") from None


def _quoted(text: str) -> str:
    """A value of fsname= or subtype=, the only options that may contain commas: each after a
    backslash.
    """
    return _SPECIAL.sub(r"\\\g<0>", text)


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    said = os.fsdecode(done.stderr).strip().rpartition("\n")[2]
    return said or f"{PROGRAM} ended with exit status {done.returncode}"
