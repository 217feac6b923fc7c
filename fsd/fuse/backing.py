"""Which open files' data the guest's kernel moves itself, past the server: FUSE_PASSTHROUGH.

The kernel gets the host's file at the open, and then needs no request for its data. It uses one
file either this way or through its cache, never both at once (fs/fuse/iomode.c): the first open
decides. Later opens of such a file are of the same kind, but the server may still move their data.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from protocol.fuse import Fopen
from protocol.masks import Mask

from ..events.backed import LINGER, TOUCHES, BackedFiles
from ..files.caller import Caller
from ..files.handle import Handle
from ..files.inode import Inode
from ..linux import credentials, syscalls
from ..linux.ioctls import BACKING_CLOSE, BACKING_OPEN
from .operations import Operations

STACK_DEPTH = 1
"""What file systems a backing file may be on: such as are not stacked themselves (overlayfs)."""
_BACKING_MAP = struct.Struct("=iIQ")
_PASSTHROUGH = int(Fopen.PASSTHROUGH)
_BESIDE = int(Fopen.PASSTHROUGH | Fopen.DIRECT_IO)
_NOTHING = Mask(0)


class Reply(NamedTuple):
    """Of an open: ``open_flags`` and ``backing_id`` of fuse_open_out."""

    flags: int
    backing: int = 0


class _Backed:
    """A file that is open this way. ``uid`` is charged for what is written."""

    __slots__ = ("backing", "opens", "uid")

    def __init__(self, backing: int, uid: int) -> None:
        self.backing = backing
        self.uid = uid
        self.opens = 0


class Backing:
    """Those of one mount. ``device``: its descriptor of /dev/fuse. ``later`` calls after some
    seconds.
    """

    def __init__(
        self,
        operations: Operations,
        device: int,
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._guest = operations.guest
        self._export = export = operations.export
        self._device = device
        self._later = later
        self._is_lingering = False
        self._backed: dict[Inode, _Backed] = {}
        self._otherwise: Counter[Inode] = Counter()  # how often open in other ways
        self._files: dict[int, tuple[Inode, bool]] = {}  # by fh: whether open this way
        self._opens = 0
        self._why_not: Counter[str] = Counter()
        self.disabled = ""
        """Why no file is opened this way, if so."""
        self.files: BackedFiles | None = None
        watcher = export.watcher
        try:
            self.files = BackedFiles(
                export.table, self._guest, watcher.queue,
                watched=watcher.mask_of, wanted=export.interest.aggregate,
            )  # fmt: skip
        except OSError as error:
            self.disabled = error.strerror or str(error)
        else:
            watcher.backed = self.files
            export.table.on_moved.append(self.files.moved)

    def close(self) -> None:
        """The session ends, and the connection with it."""
        if self.files is not None:
            self._export.watcher.backed = None
            self._export.table.on_moved.remove(self.files.moved)
            self.files.close()
            self.files = None
        self.disabled = "the session has ended"

    def opened(self, handle: Handle, flags: int, who: Caller) -> Reply | None:
        """How a file is open that was just opened with these flags; None: not this way."""
        inode, reason = handle.inode, self._reason(handle, flags)
        backed = self._backed.get(inode)
        if backed is None:
            if not reason and self._otherwise[inode]:
                reason = "open in another way"
            backed = None if reason else self._begin(inode, handle, who)
            if backed is None:
                if not self.disabled:
                    self._why_not[reason or "refused by the kernel"] += 1
                self._otherwise[inode] += 1
                self._files[handle.fh] = inode, False
                return None
        is_written = flags & os.O_ACCMODE != os.O_RDONLY
        if not reason and is_written and who.uid != backed.uid:
            reason = "another user writes"
        if reason:
            self._why_not[reason] += 1
        else:
            self._opens += 1
        return self._beside(handle.fh, inode, backed, _BESIDE if reason else _PASSTHROUGH)

    def replayed(self, fh: int, inode: Inode) -> Reply | None:
        """The same for the replayer, whose data the server answers."""
        backed = self._backed.get(inode)
        return None if backed is None else self._beside(fh, inode, backed, _BESIDE)

    def _beside(self, fh: int, inode: Inode, backed: _Backed, flags: int) -> Reply:
        backed.opens += 1
        self._files[fh] = inode, True
        return Reply(flags, backed.backing)

    def closed(self, fh: int) -> None:
        """A file is closed."""
        inode, is_backed = self._files.pop(fh, (None, False))
        if inode is None:
            return
        if not is_backed:
            self._otherwise[inode] -= 1
            if not self._otherwise[inode]:
                del self._otherwise[inode]
            return
        backed = self._backed[inode]
        backed.opens -= 1
        if not backed.opens:
            del self._backed[inode]
            self._close(backed.backing)
            if self.files is not None:
                self.files.remove(inode)
                self._linger()

    def _linger(self) -> None:
        if not self._is_lingering:
            self._is_lingering = True
            self._later(LINGER * 1.1, self._expire)

    def _expire(self) -> None:
        self._is_lingering = False
        if self.files is not None and self.files.expire():
            self._linger()

    def _reason(self, handle: Handle, flags: int) -> str:
        """Why the server has to move a file's data; "" = it has not."""
        if self.disabled:
            return self.disabled
        inode = handle.inode
        if not self._export.table.reach.handle_opens(inode.identity):
            return "another file system"
        if self._is_watched(inode):
            return "watched"
        if flags & os.O_APPEND:  # fcntl(2) may end that, but the kernel's own descriptor stays so
            return "appends"
        if flags & os.O_DIRECT:
            return "direct I/O"
        is_written = flags & os.O_ACCMODE != os.O_RDONLY
        if is_written and os.fstat(handle.fd).st_mode & (stat.S_ISUID | stat.S_ISGID):
            return "set-user-ID or set-group-ID"
        return ""

    def _is_watched(self, inode: Inode) -> bool:
        """Whether the guest watches what is done with a file's data, or its opens: these are
        replayed by opening it.
        """
        interest, guest = self._export.interest, self._guest
        if not interest.count(guest):
            return False
        mask = interest.of(guest, inode) | interest.of(guest, None)
        if inode.parent is not None:
            mask |= interest.of(guest, inode.parent)
        return bool(mask & TOUCHES)

    def _begin(self, inode: Inode, handle: Handle, who: Caller) -> _Backed | None:
        """The kernel gets the host's file, through the private mount; None if that is
        impossible.
        """
        assert self.files is not None
        try:
            fd = self._open(inode, handle)
            try:
                # What is written is charged to that user, and kills set-user-ID bits.
                with credentials.on_behalf_of(who.uid, kill_suid=True):
                    backing = self._give(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.EPERM:
                self.disabled = "no CAP_SYS_ADMIN"
            elif error.errno == errno.ELOOP:
                self.disabled = "the share's file system is stacked on another"
            return None
        try:
            self.files.add(inode)
        except OSError:
            self._close(backing)
            return None
        found = self._backed[inode] = _Backed(backing, who.uid)
        return found

    def _open(self, inode: Inode, handle: Handle) -> int:
        """An O_PATH descriptor on the private mount. Raises OSError.

        By its path if it has several names: the host's watchers see the name that is used.
        """
        assert self.files is not None
        root, path = self.files.root_fd, None
        if inode.nlink > 1:
            path = inode.short_path()
            if path is None:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            fd = syscalls.open_below(root, path, one_mount=True)
        else:
            fd = syscalls.open_by_handle(root, inode.identity.handle, os.O_PATH)
        if not os.path.sameopenfile(fd, handle.fd):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _give(self, fd: int) -> int:
        argument = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        return int(fcntl.ioctl(self._device, BACKING_OPEN, argument, True))

    def _close(self, backing: int) -> None:
        with suppress(OSError):  # the connection has ended
            fcntl.ioctl(self._device, BACKING_CLOSE, struct.pack("=I", backing))

    def state(self) -> dict[str, Any]:
        """For people."""
        return {
            "disabled": self.disabled,
            "files": len(self._backed),
            "opens": self._opens,
            "not_so": dict(self._why_not),
        }
