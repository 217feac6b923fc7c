"""Guards code that runs without a request: a fault becomes one line in the log and one lost step.

Requests are guarded in fuse.session and transports.libfuse; this is for the core and its tasks.
"""

from __future__ import annotations

from types import TracebackType

import structlog

log = structlog.get_logger()
PAUSE = 0.1
"""Seconds to wait after a lost step: a step that fails each time must not take the processor."""


class Guard:
    """``with Guard("planning") as guard: …``: an Exception ends the block, and nothing else."""

    __slots__ = ("_about", "_step", "failed")

    def __init__(self, step: str, **about: object) -> None:
        """``about``: fields of the line in the log, such as ``guest`` or ``share``."""
        self._step = step
        self._about = about
        self.failed = False

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):  # none, or the end of the task
            return False
        self.failed = True
        log.error(f"{self._step} failed", exc_info=error, **self._about)
        return True
