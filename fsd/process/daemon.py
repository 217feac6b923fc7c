"""`--daemon`: run in the background, while the parent waits to report success or the failure."""

from __future__ import annotations

import os
import sys

_READY = b"\0"


class Daemon:
    """A pipe from the background process to the one that the user started."""

    def __init__(self) -> None:
        self._pipe: int | None = None

    def detach(self) -> None:
        """Fork. The parent waits and exits; only the child returns."""
        read_fd, write_fd = os.pipe()
        if os.fork():
            os.close(write_fd)
            with open(read_fd, "rb") as pipe:
                said = pipe.read()
            if said == _READY:
                os._exit(0)
            reason = os.fsdecode(said) or "the server exited before the mount was ready"
            print(f"fsd: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
        os.close(read_fd)
        os.setsid()
        self._pipe = write_fd
        os.set_inheritable(write_fd, False)

    def ready(self) -> None:
        """The mount is ready: release the parent and the terminal."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        self._say(_READY)

    def failed(self, reason: str) -> None:
        """Pass the reason to the parent, which prints it; this process exits."""
        if self._pipe is not None:
            self._say(os.fsencode(reason))
            os._exit(1)

    def _say(self, data: bytes) -> None:
        if self._pipe is not None:
            os.write(self._pipe, data)
            os.close(self._pipe)
            self._pipe = None
