"""The log: one line per event, to stderr or to syslog."""

from __future__ import annotations

import logging
import sys
import syslog
from typing import Any

import structlog

from ..pacing.ratelimit import RateLimit

_PROCESSORS: list[Any] = [
    RateLimit(),  # first, so that dropped lines cost next to nothing
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso"),
    structlog.processors.format_exc_info,
    structlog.processors.LogfmtRenderer(),
]


def log_to_stderr(level: str) -> None:
    """``level`` and above: a name of the logging module in lower case."""
    _configure(level, structlog.PrintLoggerFactory(sys.stderr))


def log_to_syslog(level: str, name: str) -> None:
    """The same to syslog(3), under ``name``."""
    syslog.openlog(name, syslog.LOG_PID | syslog.LOG_NDELAY, syslog.LOG_USER)
    syslog.syslog(syslog.LOG_DEBUG, "started")  # connects now, while there is a /dev
    _configure(level, lambda *_: _Syslog())


def _configure(level: str, factory: Any) -> None:
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=factory,
    )


class _Syslog:
    """A structlog logger: one method per level."""

    @staticmethod
    def debug(line: str) -> None:
        """For debugging."""
        syslog.syslog(syslog.LOG_DEBUG, line)

    @staticmethod
    def info(line: str) -> None:
        """Normal operation."""
        syslog.syslog(syslog.LOG_INFO, line)

    @staticmethod
    def warning(line: str) -> None:
        """Unexpected conditions."""
        syslog.syslog(syslog.LOG_WARNING, line)

    @staticmethod
    def error(line: str) -> None:
        """Failures."""
        syslog.syslog(syslog.LOG_ERR, line)

    critical = exception = error
