"""The C library, and the errors of its calls: for system calls that Python lacks."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: object = None) -> int:
    """The result of a call, if it has not failed. Raises OSError; ``what`` is its file name."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
