"""System calls that may take long, or for ever: a thread makes them, then the request continues.

The core is not thread-safe, so a thread makes raw calls on descriptors and nothing else. Code that
needs such a call raises ``Later``. The transport makes the call and serves the request once more,
with the outcome: all checks are made again, and nothing was changed before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from protocol.masks import Mask

from .inode import Inode

LONG = 4 << 20
"""Bytes up to which a file is allocated, truncated, removed or copied at once: some
milliseconds."""
THREADS = 4
"""Threads of one guest for the share's file system, and for each other one below it."""
PATIENCE = 10.0
"""Seconds that a request waits for a file system below the share to answer."""
END = 4.5
"""Seconds from SIGTERM until the server exits in spite of hanging calls."""


class Work:
    """A call with descriptors of its own, as the guest may close its files before it is done. They
    are duplicated now, and closed with it. Raises OSError.
    """

    def __init__(self, call: Callable[..., Any], *fds: int) -> None:
        self._call = call
        self._fds: list[int] = []
        try:
            self._fds.extend(map(os.dup, fds))
        except OSError:
            self.close()
            raise

    @classmethod
    def closing(cls, fd: int) -> Work:
        """Work that closes a descriptor, which it takes."""
        work = cls(_nothing)
        work._fds.append(fd)
        return work

    def __call__(self) -> Any:
        """Make it, once."""
        try:
            return self._call(*self._fds)
        finally:
            self.close()

    def close(self) -> None:
        """It is done, or will not be done."""
        while self._fds:
            os.close(self._fds.pop())


def _nothing(*_fds: int) -> None:
    """Closing them is all."""


class SlowCall(NamedTuple):
    """What to do in a thread."""

    what: str
    """For logs, and the key of its outcome: a request makes one call of a name."""
    work: Work
    expected: tuple[tuple[Inode | None, bytes | None, Mask], ...] = ()
    """The events that it causes: watcher.Expected."""
    mount: int = 0
    """The mount that it waits for, if that is not the share's own."""
    discard: Callable[[Any], object] | None = None
    """What to do with a result that is not taken."""
    patience: float | None = None
    """Seconds after which the request fails with EIO; None: no limit."""


class Outcome:
    """The outcome of a slow call: call it in a thread, then ``take`` returns the result."""

    def __init__(self, call: SlowCall) -> None:
        self.call = call
        self._results: list[Any] = []
        self._error: BaseException | None = None
        self._is_begun = self._is_unwanted = False

    def __call__(self) -> None:
        """Make the call."""
        self._is_begun = True
        _running[self] = self.call.what
        try:
            self._results.append(self.call.work())
        except Exception as error:  # noqa: BLE001 - raised where the result is taken
            self._error = error
        finally:
            del _running[self]
        if self._is_unwanted:
            self.drop()

    def take(self) -> Any:
        """The result, which belongs to the caller now. Raises the exception of the call."""
        if self._error is not None:
            raise self._error
        return self._results[0] if self.call.discard is None else self._results.pop()

    def drop(self) -> None:
        """The result is not needed, even if it is still being made."""
        self._is_unwanted = True
        self._error = None  # its traceback leads back here, and to the request
        if not self._is_begun:
            self.call.work.close()
        while self._results:
            result = self._results.pop()
            if self.call.discard is not None:
                self.call.discard(result)


Outcomes = dict[str, Outcome]
_running: dict[Outcome, str] = {}


def running() -> list[str]:
    """The calls that threads are making, for the log."""
    return sorted(_running.values())


class Later(Exception):
    """The request has to be served again, once a call is done."""

    def __init__(self, call: SlowCall) -> None:
        super().__init__(call.what)
        self.call = call
