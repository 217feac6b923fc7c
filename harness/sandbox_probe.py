"""Enters the sandbox of `fsd virtiofs`, and prints as JSON what a process can do in it.

    python -m harness.sandbox_probe DIRECTORY JSON-OPTIONS [CALL]

With CALL (execve), makes only that call.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from fsd.export.export import Export
from fsd.linux import credentials, syscalls
from fsd.process import sandbox
from fsd.servers.virtiofs import Options, enter
from protocol import frames, masks
from protocol.masks import Mask

_libc = ctypes.CDLL(None, use_errno=True)


def answer(call: Callable[[], Any]) -> Any:
    """The result of a call, or the name of its error."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ImportError:
        return "ImportError"


def libc(name: str, *arguments: Any) -> Any:
    """A function of libc that Python lacks."""
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
    return "done"


def _thread() -> str:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    return "done"


def _write() -> str:
    with open("/new", "w"):
        return "done"


def _import() -> str:
    import this

    return this.__name__


def _read(name: str) -> dict[str, str]:
    with open(f"{syscalls.fd_path(0).removesuffix('/fd/0')}/{name}") as file:
        return dict(line.strip().split(":", 1) for line in file if ":" in line)


def _status() -> dict[str, str]:
    """What was given up permanently."""
    wanted = ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp")
    return {name: value.strip() for name, value in _read("status").items() if name in wanted}


def _through_a_descriptor() -> list[str]:
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
    return os.listdir(syscalls.fd_path(fd))


def _by_handle() -> str:
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.close(syscalls.open_by_handle(fd, syscalls.file_handle(fd), os.O_PATH))
    return "done"


def _node(directory: str) -> str:
    """Makes a node of /dev/null, as for a guest's root, and opens it."""
    path = f"{directory}/null"
    with credentials.making_nodes():
        os.mknod(path, 0o20666, os.makedev(1, 3))
    try:
        os.close(os.open(path, os.O_RDWR))
    finally:
        os.unlink(path)
    return "done"


def _mounts() -> list[list[str]]:
    """The flags that restrict the share's mounts."""
    refusals = {"nosuid", "nodev", "noexec"}
    with open(syscalls.fd_path(0).removesuffix("fd/0") + "mountinfo") as mountinfo:
        rows = [line.split() for line in mountinfo]
    return [sorted(refusals & {*row[5].split(",")}) for row in rows if row[4].startswith("/")]


def _ioctl() -> dict[str, str]:
    requests = {"TIOCSTI": 0x5412, "high bits": 0x5412 | 1 << 40, "FS_IOC_GETFLAGS": 0x8008_6601}
    call = _libc.ioctl
    call.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]
    fd = os.open("/program", os.O_RDONLY)
    room = ctypes.create_string_buffer(64)
    return {name: answer(partial(libc, "ioctl", fd, n, room)) for name, n in requests.items()}


def _watch() -> list[str]:
    """The events of a directory made and removed, watched as the server does."""
    export = Export("/")
    guest = export.add_observer("probe")
    export.update(guest, export.table.root.key, int(Mask.CREATE | Mask.DELETE))
    os.mkdir("/made")
    os.rmdir("/made")
    export.watcher.drain()
    export.process(100)
    events = [message for message in guest.take(10) if isinstance(message, frames.Event)]
    return [masks.names(event.mask)[0] for event in events]


PROBES: dict[str, Callable[[], Any]] = {
    "root": lambda: sorted(os.listdir("/")),
    "above": lambda: sorted(os.listdir("/..")),
    "beside": lambda: "status" in os.listdir("..") or sorted(os.listdir("..")),
    "descriptor": _through_a_descriptor,
    "handle": _by_handle,
    "pid": os.getpid,
    "parent": os.getppid,
    "status": _status,
    "network": lambda: sorted(name for name in _read("net/dev") if " " not in name),
    "socket": lambda: socket.socket(socket.AF_INET).close(),
    "execute": lambda: os.execv("/program", ["program"]),
    "fork": os.fork,
    "thread": _thread,
    "mount": lambda: libc("mount", b"x", b"/", b"tmpfs", 0, None),
    "unshare": lambda: libc("unshare", 0x2000_0000),
    "chroot": lambda: os.chroot("/"),
    "trace": lambda: libc("ptrace", 16, 1, 0, 0),
    "import": _import,
    "mknod": lambda: os.mknod("/null", 0o20666, os.makedev(1, 3)),
    "node": lambda: _node(""),
    "node below": lambda: _node("/below"),
    "mounts": _mounts,
    "ioctl": _ioctl,
    "watch": _watch,
    "write": _write,
}


def main() -> int:
    """Run the probes in the sandbox."""
    options = Options(sys.argv[1], **json.loads(sys.argv[2]))
    if options.sandbox == "namespace":
        sandbox.own_processes()

    def inside(_lifeline: int) -> int:
        enter(options)
        if sys.argv[3:]:
            os.execv("/program", ["program"])
        found = {}
        for name, probe in PROBES.items():
            found[name] = answer(probe)
            if name == "fork" and found[name] == 0:
                os._exit(0)
        print(json.dumps(found), flush=True)
        return 0

    return sandbox.supervise(inside, lambda: None)


if __name__ == "__main__":
    sys.exit(main())
