"""Limits what guests, VMMs and users can write into the log: a few lines a minute of each kind.

It is a structlog processor, so every line passes it. Dropped lines are counted; the next line of
their kind has the number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

BURST = 10
"""Lines of one kind and one guest in a PERIOD: enough to see what happens."""
PERIOD = 60.0
"""Seconds after which a kind may be written again, with the number of dropped lines."""
KINDS_LIMIT = 1024
"""Kinds that are counted separately, about 200 bytes each; further ones share one count."""
_WHO = ("guest", "share")
"""Fields of a line that name the guest that it is about."""
_OTHERS = ("", None)


@dataclass(slots=True)
class _Kind:
    begun: float
    lines: int = 0
    left_out: int = 0


class RateLimit:
    """A processor: raises structlog.DropEvent for a line beyond the limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[tuple[Any, Any], _Kind] = {}

    def __call__(self, _logger: Any, _method: str, line: dict[str, Any]) -> dict[str, Any]:
        """Lines of one kind have the same text (``event``), and are about the same guest."""
        kind = self._kind(line)
        kind.lines += 1
        if kind.lines > BURST:
            kind.left_out += 1
            raise structlog.DropEvent
        if kind.left_out:
            line["left_out"], kind.left_out = kind.left_out, 0
        if kind.lines == BURST:
            line["note"] = f"for up to {PERIOD:.0f} s more lines like it are only counted"
        return line

    def _kind(self, line: dict[str, Any]) -> _Kind:
        now = self._clock()
        key = (line.get("event"), next((line[who] for who in _WHO if who in line), None))
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= KINDS_LIMIT:
                self._kinds = {k: v for k, v in self._kinds.items() if now - v.begun < PERIOD}
            if len(self._kinds) >= KINDS_LIMIT:
                key = _OTHERS
            kind = self._kinds.setdefault(key, _Kind(now))
        if now - kind.begun >= PERIOD:
            kind.begun, kind.lines = now, 0
        return kind
