"""What ends a command, and which errors pass: apart because all of the modules use them."""

from __future__ import annotations

import errno

GONE = frozenset({errno.ENOENT, errno.ESRCH})
"""What /proc answers for a process or a descriptor that is not there (any more)."""
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
"""Errors that say nothing of what was asked for: ask again later."""


class Failure(Exception):
    """What failed, on what, and what to do: one line."""
