"""A CLOSE without an OPEN: of a file that was open before anybody watched it.

A FIFO or a directory refuses O_DIRECT only after it was opened (do_dentry_open in fs/open.c, from
Linux 4.19 on). Then the kernel closes it, and reports the close; the open failed, so it reports no
OPEN. No promise of the kernel, so the agent tries it first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress

from protocol.inotify import parse_events
from protocol.masks import Mask

from .. import kernel
from ..beneath import reopen

_libc = ctypes.CDLL(None, use_errno=True)
_FLAGS = os.O_DIRECT | os.O_NONBLOCK | os.O_NOCTTY


def close_alone(file: int, *, writing: bool) -> None:
    """Make the kernel report that an O_PATH descriptor's FIFO or directory was closed. Raises
    OSError: EINVAL for anything else, such as a device, where opening could have an effect.
    """
    if kernel.kind_of(file) not in (stat.S_IFIFO, stat.S_IFDIR):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    flags = os.O_RDWR if writing else os.O_RDONLY  # a FIFO opened for both waits for nobody
    try:
        os.close(reopen(file, flags | _FLAGS))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def is_possible() -> bool:
    """Whether this kernel does so."""
    ends = os.pipe2(os.O_CLOEXEC)
    inotify = -1
    try:
        inotify = kernel.check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        watched = Mask.OPEN | Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
        path = b"/proc/self/fd/%d" % ends[0]
        kernel.check(_libc.inotify_add_watch(inotify, path, ctypes.c_uint32(int(watched))))
        close_alone(ends[0], writing=True)
        return [event.mask for event in parse_events(os.read(inotify, 4096))] == [Mask.CLOSE_WRITE]
    except OSError:  # nothing came, or there are no more watches
        return False
    finally:
        for fd in (*ends, inotify):
            with suppress(OSError):
                os.close(fd)
