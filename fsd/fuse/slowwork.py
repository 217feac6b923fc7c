"""Runs the parts of a request that may take long, or hang, in a thread of the transport, if it has
any.

Long files, leases of other programs, and file systems below the share that may not answer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from ..files.handle import Handle
from ..files.slowcalls import PATIENCE, Later, Outcomes, SlowCall, Work
from ..linux import credentials, syscalls
from ..linux.mounts import Mounts
from .access import Events

Acting = Callable[[], AbstractContextManager[None]]
Close = Callable[[int, Events], None]
"""Closes a descriptor if that may free a long file, and cause events."""


class SlowWork:
    """The slow work of one mount. Everything is done at once unless the transport has threads."""

    def __init__(self, mounts: Mounts) -> None:
        self._mounts = mounts
        self.outcomes: Outcomes = {}
        """What threads have done for the request that is being served."""
        self.patience = PATIENCE
        """Seconds that a request waits for a file system that does not answer."""
        self.has_threads = False
        self.close: Close = _close

    def use_threads(self, close: Close, patience: float = PATIENCE) -> None:
        """The transport serves a request that raised Later again, and closes in a thread."""
        self.has_threads, self.close, self.patience = True, close, patience

    def slowly(
        self, what: str, work: Callable[..., Any], *fds: int, expected: Events = (), **more: Any
    ) -> Any:
        """The result of work with descriptors that a thread has done for this request. Raises Later
        if it is still to be done, and the exception of the work. ``more``: fields of SlowCall.
        """
        if not self.has_threads:
            return work(*fds)
        outcome = self.outcomes.get(what)
        if outcome is None:
            raise Later(SlowCall(what, Work(work, *fds), expected, **more))
        return outcome.take()

    def open_file(
        self, events: Events, kill: bool, path_fd: int, flags: int, acting: Acting = nullcontext
    ) -> int:
        """Open a regular file for the request. A program of the host may have a lease on it
        (F_SETLEASE of fcntl(2)), and gives it back when it likes. ``kill`` suid and sgid bits.
        """
        suid = credentials.killing_suid if kill else nullcontext
        if "open" not in self.outcomes:
            with suppress(BlockingIOError), acting(), suid():
                return os.open(syscalls.fd_path(path_fd), flags | os.O_NONBLOCK)

        def wait(own: int) -> int:
            with acting(), suid():
                return os.open(syscalls.fd_path(own), flags)

        fd: int = self.slowly("open", wait, path_fd, expected=events, discard=os.close)
        if not os.path.sameopenfile(fd, path_fd):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def there(self, what: str, work: Callable[[int], Any], handle: Handle, events: Events) -> Any:
        """Work on a file of another file system."""
        mount = handle.inode.identity.mount if self.is_elsewhere(handle) else 0
        return self.slowly(what, work, handle.fd, expected=events, mount=mount)

    def is_elsewhere(self, handle: Handle) -> bool:
        """Whether it is on a file system that may not answer."""
        mounts = self._mounts
        return bool(mounts.remote) and handle.inode.identity.mount in mounts.remote


def _close(fd: int, expected: Events) -> None:
    os.close(fd)
