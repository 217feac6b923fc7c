"""The C library, and the errors of its calls: for system calls that Python lacks."""

from __future__ import annotations

import ctypes
import errno
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: object = None) -> int:
    """The result of a call. Raises OSError if it failed; ``what`` is its file name."""
    if result < 0:
        raise last_error(what)
    return result


def last_error(what: object = None) -> OSError:
    """The error of the last call that failed, by this module or by pyinotify."""
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, os.strerror(number), what)
