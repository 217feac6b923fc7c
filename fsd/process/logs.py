"""Where the log goes: a line an event, to stderr or to syslog."""

from __future__ import annotations

import logging
import sys
import syslog
from typing import Any

import structlog

from ..pacing.ratelimit import RateLimit

_PROCESSORS: list[Any] = [
    RateLimit(),  # first: what is left out costs next to nothing
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso"),
    structlog.processors.format_exc_info,
    structlog.processors.LogfmtRenderer(),
]


def log_to_stderr(level: str) -> None:
    """``level`` and worse: a name of the logging module, in small letters."""
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
    """A logger of structlog's: a method a level."""

    @staticmethod
    def debug(line: str) -> None:
        """For who looks for a fault."""
        syslog.syslog(syslog.LOG_DEBUG, line)

    @staticmethod
    def info(line: str) -> None:
        """What happens."""
        syslog.syslog(syslog.LOG_INFO, line)

    @staticmethod
    def warning(line: str) -> None:
        """What should not happen."""
        syslog.syslog(syslog.LOG_WARNING, line)

    @staticmethod
    def error(line: str) -> None:
        """What has failed."""
        syslog.syslog(syslog.LOG_ERR, line)

    critical = exception = error
