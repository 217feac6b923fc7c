"""Changes of an object's attributes: the request, its events, and how it is carried out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

from protocol.masks import Mask

from ..linux import credentials, syscalls

Change = Callable[[int], os.stat_result]
"""Changes attributes through a descriptor; returns the new ones. Runs in any thread."""


class Changes(NamedTuple):
    """The changes that SETATTR asks for; None = unchanged."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    kill_suid: bool = False  # with ``size``: as an ordinary user's truncate does

    @property
    def events(self) -> Mask:
        """The events that they cause (include/linux/fsnotify.h, fsnotify_change)."""
        events = Mask(0)
        if any(value is not None for value in (self.mode, self.uid, self.gid)):
            events |= Mask.ATTRIB
        if self.size is not None:
            events |= Mask.MODIFY | Mask.ATTRIB  # ATTRIB if suid bits are cleared
        if self.atime_ns is not None and self.mtime_ns is not None:
            return events | Mask.ATTRIB
        if self.atime_ns is not None:
            events |= Mask.ACCESS
        if self.mtime_ns is not None:
            events |= Mask.MODIFY
        return events

    def apply(self, fd: int, *, is_open: bool) -> os.stat_result:
        """Carry them out, in the order chown, mode, size, times: each undoes side effects of the
        previous ones. Returns the new attributes. ``is_open``: the descriptor is open for writing,
        not O_PATH. Raises OSError.
        """
        path = syscalls.fd_path(fd)
        mode, uid, gid, size, atime_ns, mtime_ns, kill_suid = self
        if credentials.NO_ID in (uid, gid):  # chown(2) would leave it, and say nothing
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        if uid is not None or gid is not None:
            # By descriptor, as a path would follow a symlink: fchownat(AT_EMPTY_PATH) is not in os.
            os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
        if mode is not None:
            os.chmod(path, stat.S_IMODE(mode))
        if size is not None:
            with credentials.killing_suid() if kill_suid else nullcontext():
                if is_open:
                    os.ftruncate(fd, size)
                else:
                    os.truncate(path, size)
        if atime_ns is not None or mtime_ns is not None:
            syscalls.set_times(path, atime_ns, mtime_ns)
        return os.fstat(fd)
