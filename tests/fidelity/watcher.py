"""A stand-alone inotify program: records what one kernel reports for a list of paths.

It is run twice, once below the shared directory and once below the mount, so it uses nothing but
the standard library and knows nothing of fsd. It never opens or lists what it watches: that would
itself be an event on the other side.

Standard input: a JSON object {base, paths, mask, control, end, linger, output}; paths and names are
bytes spelt in latin-1. Standard output: READY, then "MARK name" for every marker in the control
directory. It ends when the file `end` was created and closed in the control directory and nothing
more has come for `linger` seconds, or on SIGTERM, and then writes
{events: [[watch, mask, name, cookie]]}.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator

IN_CLOSE_WRITE = 0x8
IN_CREATE = 0x100
EVENT = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, len
READ_SIZE = 1 << 20
MARKER = re.compile(rb"mark-[0-9a-z.-]+")
CONTROL_MASK = IN_CREATE | IN_CLOSE_WRITE

Raw = tuple[int, int, int, bytes]


def parse(data: bytes) -> Iterator[Raw]:
    """Yield (wd, mask, cookie, name) for each event of one read."""
    offset = 0
    while offset < len(data):
        wd, mask, cookie, length = EVENT.unpack_from(data, offset)
        offset += EVENT.size
        yield wd, mask, cookie, data[offset : offset + length].rstrip(b"\0")
        offset += length


class Watcher:
    """One inotify descriptor, what it watches and all that it has read."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.labels: dict[int, str] = {-1: "(queue)"}
        self.chunks: list[bytes] = []

    def add(self, path: bytes, mask: int, label: str) -> int:
        wd: int = self._libc.inotify_add_watch(self.fd, path, ctypes.c_uint32(mask))
        if wd < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", os.fsdecode(path))
        self.labels.setdefault(wd, label)
        return wd

    def read(self, wake: int, timeout: float | None) -> bytes | None:
        """Return the next chunk, None at a timeout or when asked to stop."""
        ready, _, _ = select.select([self.fd, wake], [], [], timeout)
        if self.fd not in ready:
            return None
        data = os.read(self.fd, READ_SIZE)
        self.chunks.append(data)
        return data

    def events(self) -> list[list[str | int]]:
        return [
            [self.labels.get(wd, f"(unknown wd {wd})"), mask, name.decode("latin-1"), cookie]
            for chunk in self.chunks
            for wd, mask, cookie, name in parse(chunk)
        ]


def wakeup() -> int:
    """Return a descriptor that becomes readable on SIGTERM."""
    wake, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.detach())
    signal.signal(signal.SIGTERM, lambda *_: None)
    return wake.detach()


def main() -> None:
    job = json.load(sys.stdin)
    base: bytes = job["base"].encode("latin-1")
    end: bytes = job["end"].encode("latin-1")
    wake = wakeup()
    watcher = Watcher()
    for path in job["paths"]:
        watcher.add(os.path.join(base, path.encode("latin-1")), job["mask"], path)
    control = watcher.add(
        os.path.join(base, job["control"].encode("latin-1")), CONTROL_MASK, job["control"]
    )
    print("READY", flush=True)

    timeout: float | None = None
    while (data := watcher.read(wake, timeout)) is not None:
        for name in MARKER.findall(data):
            print("MARK", name.decode(), flush=True)
        if end in data and any(
            wd == control and name == end and mask & IN_CLOSE_WRITE
            for wd, mask, _, name in parse(data)
        ):
            timeout = job["linger"]
    with open(job["output"], "w", encoding="ascii") as out:
        json.dump({"events": watcher.events()}, out)


if __name__ == "__main__":
    main()
