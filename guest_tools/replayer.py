"""The replayer: makes the real system calls on the mount that its orders name.

One thread does all of it, and it is the one that opened `control`: the server knows it by the
thread id in the FUSE request header, and answers it from the ledger.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from protocol.frames import ALIAS, FSD_DIR, STAGING, Op, Order
from protocol.handles import FILEID_INO64_GEN, NodeKey, encode_fh
from protocol.masks import Mask

from . import kernel

_O_DIR = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_O_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""A look-up; it asks for no attributes."""
_PATH_LIMIT = 4000
"""Bytes of a path walked at once, below PATH_MAX."""
_RETRIES = 3
"""Tries of one order: a user's own look-up of the same name can come between two of its steps."""
_HIDDEN = {STAGING: b".fsd/staging", ALIAS: b".fsd/alias"}


class _Name(NamedTuple):
    """What a file was opened as, and whether for writing."""

    nodeid: int
    name: bytes
    writing: bool


class _View:
    """A way into the mount, owner of its descriptors. Events carry the mount they are made on."""

    def __init__(self, root_fd: int) -> None:
        self.root_fd = root_fd
        self._hidden: dict[int, int] = {}

    def hidden(self, nodeid: int) -> int:
        """The hidden directory of that node."""
        fd = self._hidden.get(nodeid)
        if fd is None:
            fd = self._hidden[nodeid] = os.open(_HIDDEN[nodeid], _O_DIR, dir_fd=self.root_fd)
        return fd

    def close(self) -> None:
        """Let go of the mount."""
        for fd in (self.root_fd, *self._hidden.values()):
            os.close(fd)


class Replayer:
    """Executes orders on one mount, ``root_fd`` being its root.

    While ``visibly`` is set it works through ``open_mountpoint`` instead, which raises OSError:
    marks of fanotify may know the mount, and tell paths. That mount is busy until ``batch_done``.
    Owner of the descriptors that it opened for OPEN.
    """

    def __init__(self, root_fd: int, open_mountpoint: Callable[[], int], channel_fd: int) -> None:
        self._private = self._view = _View(root_fd)
        self._open_mountpoint = open_mountpoint
        self._mount_fd = channel_fd  # for open_by_handle_at, which takes no O_PATH descriptor
        # Directories of this batch. Not kept longer: an open one would delay its IN_DELETE_SELF.
        self._directories: dict[tuple[int, int], int] = {}
        self._files: dict[int, int] = {}
        self._visible: dict[_Name, int] = {}  # those that were opened visibly
        self.visibly = False
        self._walking = False
        self._actions = {
            Op.CREATE: self._create,
            Op.REMOVE: self._remove,
            Op.RENAME: self._rename,
            Op.TOUCH: self._touch,
            Op.OPEN: self._open,
        }

    def execute(self, order: Order) -> int:
        """Make the call. Returns 0, or the errno with which the guest's kernel refused it."""
        if order.op == Op.CLOSE:
            fd = self._files.pop(order.arg, -1)
            if fd >= 0:
                os.close(fd)
                self._visible = {name: file for name, file in self._visible.items() if file != fd}
            return 0
        self._walking = False
        exchange = order.op == Op.RENAME and order.arg  # of which the other may be a directory
        if exchange or (stat.S_ISDIR(order.mode) and order.op in (Op.REMOVE, Op.RENAME)):
            self._leave_directories()
            # A rename of a directory is refused where the kernel believes the one to be in the
            # other; a walk tells it where they are.
            self._walking = order.op == Op.RENAME
        if self.visibly and self._view is self._private:
            with suppress(OSError):  # not where it was: those who watch inodes are served
                self._view = _View(self._open_mountpoint())
        error: OSError | None = None
        for _ in range(_RETRIES):
            try:
                dir_fd = self._directory(order.nodeid, order.generation, order.path)
                self._actions[Op(order.op)](order, dir_fd)
                return 0
            except OSError as caught:
                error = caught
                self._leave_directories()
                self._walking = True
        assert error is not None
        return error.errno or 5

    def _directory(self, nodeid: int, generation: int, path: bytes) -> int:
        if nodeid > FSD_DIR:
            return self._view.hidden(nodeid)
        if not path:
            return self._view.root_fd
        fd = self._directories.get((nodeid, generation))
        if fd is None:
            fd = self._by_handle(nodeid, generation)
            if fd < 0:
                fd = self._walk(path)
            self._directories[nodeid, generation] = fd
        return fd

    def _by_handle(self, nodeid: int, generation: int) -> int:
        """Open a directory that the kernel holds, without a request; -1 where it does not.

        For a dentry that the kernel has dropped, it would look for the name in the parent, where
        watchers would see it read: the server refuses that look-up.
        """
        if self._walking or self._view is not self._private:
            return -1
        try:
            handle = encode_fh(NodeKey(nodeid, generation))
            return kernel.open_by_handle(self._mount_fd, FILEID_INO64_GEN, handle, _O_DIR)
        except OSError:
            return -1

    def _walk(self, path: bytes) -> int:
        """Open a directory by its path; the server answers each step as of the event."""
        fd = root = self._view.root_fd
        for part in _parts(path):
            below = os.open(part, _O_DIR | os.O_NOFOLLOW, dir_fd=fd)
            if fd != root:
                os.close(fd)
            fd = below
        return fd

    def batch_done(self) -> None:
        """No order is at hand: let go of the directories, and of the mountpoint."""
        self._leave_directories()
        if self._view is not self._private:
            self._view.close()
            self._view = self._private

    def _leave_directories(self) -> None:
        for fd in self._directories.values():
            os.close(fd)
        self._directories.clear()

    @staticmethod
    def _create(order: Order, dir_fd: int) -> None:
        kind = stat.S_IFMT(order.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(order.name, dir_fd=dir_fd)
        elif kind == stat.S_IFLNK:
            os.symlink(b"?", order.name, dir_fd=dir_fd)
        else:
            os.mknod(order.name, kind | 0o600, dir_fd=dir_fd)

    @staticmethod
    def _remove(order: Order, dir_fd: int) -> None:
        if order.nodeid == ALIAS:
            # It has no name left. Seen with a link count of 0, and then found missing, its dentry
            # is dropped, and that is its IN_DELETE_SELF (dentry_unlink_inode in fs/dcache.c).
            os.close(os.open(order.name, _O_ANY, dir_fd=dir_fd))
            with suppress(FileNotFoundError):
                os.close(os.open(order.name, _O_ANY, dir_fd=dir_fd))
        elif stat.S_ISDIR(order.mode):
            os.rmdir(order.name, dir_fd=dir_fd)
        else:
            os.unlink(order.name, dir_fd=dir_fd)

    def _rename(self, order: Order, dir_fd: int) -> None:
        dir_fd2 = self._directory(order.nodeid2, order.generation2, order.path2)
        if stat.S_ISDIR(order.mode) or order.arg:
            # The kernel may know a directory at another place by now. It moves it here on a
            # look-up, but not on one that holds the locks of a rename (d_splice_alias, ESTALE).
            for fd, name in ((dir_fd, order.name), (dir_fd2, order.name2)):
                with suppress(FileNotFoundError):
                    os.close(os.open(name, _O_ANY, dir_fd=fd))
        kernel.renameat2(dir_fd, order.name, dir_fd2, order.name2, order.arg)

    def _touch(self, order: Order, dir_fd: int) -> None:
        fd = self._visible.get(_Name(order.nodeid, order.name, order.arg == Mask.MODIFY))
        if fd is not None and order.arg in (Mask.ACCESS, Mask.MODIFY):
            with suppress(OSError):  # of another file by now
                if order.arg == Mask.MODIFY:
                    os.pwrite(fd, b"\0", 0)
                else:
                    os.pread(fd, 1, 0)
                return
        both = bool(order.arg & Mask.ATTRIB)
        atime, mtime = bool(order.arg & Mask.ACCESS), bool(order.arg & Mask.MODIFY)
        kernel.touch(dir_fd, order.name, atime=both or atime, mtime=both or mtime)

    def _open(self, order: Order, dir_fd: int) -> None:
        flags = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        flags |= os.O_WRONLY if order.arg else os.O_RDONLY
        if stat.S_ISDIR(order.mode):
            flags |= os.O_DIRECTORY
        if order.name:
            fd = os.open(order.name, flags | os.O_NOFOLLOW, dir_fd=dir_fd)
        else:
            fd = os.open(f"/proc/self/fd/{dir_fd}", flags)
        self._files[order.seq] = fd
        if self._view is not self._private and not stat.S_ISDIR(order.mode):
            self._visible[_Name(order.nodeid, order.name, bool(order.arg))] = fd

    def close(self) -> None:
        """Close what is still open for the host's programs."""
        for fd in self._files.values():
            with suppress(OSError):
                os.close(fd)
        self._files.clear()
        self.batch_done()
        self._private.close()


def _parts(path: bytes) -> Iterator[bytes]:
    """The path cut at slashes into parts that one system call takes."""
    while len(path) > _PATH_LIMIT:
        cut = path.rindex(b"/", 0, _PATH_LIMIT)
        yield path[:cut]
        path = path[cut + 1 :]
    yield path
