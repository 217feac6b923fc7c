"""The exception that ends a command, and which errors are temporary. For all other modules."""

from __future__ import annotations

import errno

GONE = frozenset({errno.ENOENT, errno.ESRCH})
"""Errors of /proc for a process or a descriptor that does not exist (any more)."""
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
"""Errors that say nothing about the file itself: try again later."""


NO_MOUNT = "not an fsd mount, or another user's"


class Failure(Exception):
    """What failed, on what, and what to do: one line."""
