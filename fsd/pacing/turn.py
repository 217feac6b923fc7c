"""Calls to make right after the core's present work, such as answers to waiting requests.

Apart from the event loop's own queue, because that costs a system call to itself and a second turn,
about 200 us of an event's way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType

from .guard import Guard


class Turn:
    """A context in which the core works: calls put ``after`` it are made at its end."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._is_on = False

    def after(self, call: Callable[[], None]) -> bool:
        """Call it at the end; False if no turn is under way, and the call was not taken."""
        if self._is_on:
            self._calls.append(call)
        return self._is_on

    def __enter__(self) -> None:
        self._is_on = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._calls:
                with Guard("a late answer"):
                    self._calls.popleft()()
        finally:
            self._is_on = False
