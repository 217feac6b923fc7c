"""The replayer: makes the real system calls on the mount that its orders name.

A single thread does all of it, the one that opened `control`: the server recognises it by the
thread id in the FUSE request header, and answers it from the ledger. Orders are not trusted: files
are opened through ``beneath``, which never leaves the mount.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from protocol.frames import ALIAS, FSD_DIR, ROOT, STAGING, Message, Op, Order
from protocol.handles import FILEID_INO64_GEN, NodeKey, encode_fh
from protocol.masks import Mask

from .. import kernel
from ..beneath import check_name, open_entry, open_reached, reach
from .loneclose import close_alone

_O_DIR = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_RETRIES = 3
"""Attempts per order: a user's own look-up of the same name can come between two of its steps."""
_DIRECTORIES = 64
"""Directories of a batch that are open at a time; beyond that they are looked up again."""
_CLOSED_SOON = 64
"""Files beyond the limit that may be open if the batch that opens them also closes them."""
_RENAME_EXCHANGE = 2
_HIDDEN = {STAGING: b".fsd/staging", ALIAS: b".fsd/alias"}
_NAMELESS = (Op.TOUCH, Op.OPEN, Op.LONE_CLOSE)
"""Orders that may be about a directory itself."""


class _Name(NamedTuple):
    """What a file was opened as, and whether for writing."""

    nodeid: int
    name: bytes
    writing: bool


class _File(NamedTuple):
    """An open file."""

    fd: int
    name: _Name


class _View:
    """A way into the mount; owns its descriptors. Events carry the mount of their call."""

    def __init__(self, root_fd: int) -> None:
        self.root_fd = root_fd
        self._hidden: dict[int, int] = {}

    def hidden(self, nodeid: int) -> int:
        """The hidden directory with that nodeid."""
        if nodeid not in _HIDDEN:
            raise OSError(errno.EINVAL, "no hidden directory")
        fd = self._hidden.get(nodeid)
        if fd is None:
            fd = self._hidden[nodeid] = reach(self.root_fd, _HIDDEN[nodeid], directory=True)
        return fd

    def close(self) -> None:
        """Close the descriptors of the mount."""
        for fd in (self.root_fd, *self._hidden.values()):
            os.close(fd)


class Replayer:
    """Executes orders on one mount, whose root is ``root_fd``.

    While ``visibly`` is set it works through ``open_mountpoint`` instead, which raises OSError:
    fanotify marks may depend on the mount, and report paths. That mount is busy until
    ``batch_done``. What is covered there by another mount is reached through ``root_fd``, if that
    is a private copy of the mount, or not at all. Owns the descriptors that it opened for OPEN, at
    most ``opened_limit``; beyond, an OPEN is refused with EMFILE, unless its CLOSE is in the same
    batch.
    """

    def __init__(
        self,
        root_fd: int,
        open_mountpoint: Callable[[], int],
        channel_fd: int,
        opened_limit: int,
        *,
        is_copy: bool = False,
    ) -> None:
        """``is_copy``: ``root_fd`` is that of a private copy, on which nothing is mounted."""
        self._private = self._visible = self._view = _View(root_fd)
        self._open_mountpoint = open_mountpoint
        self._mount_fd = channel_fd  # for open_by_handle_at, which takes no O_PATH descriptor
        self._opened_limit = opened_limit
        self._is_copy = is_copy
        self._opens_by_name = is_copy and bool(os.fstatvfs(root_fd).f_flag & os.ST_NODEV)
        # Directories of this batch. Not kept longer: an open one would delay its IN_DELETE_SELF.
        self._directories: dict[tuple[int, int], int] = {}
        self._files: dict[int, _File] = {}  # by the order that opened it
        self._opened_visibly: dict[_Name, int] = {}
        self._closed_soon: set[int] = set()
        self.visibly = False
        self._walking = False
        self._actions = {
            Op.CREATE: self._create,
            Op.REMOVE: self._remove,
            Op.RENAME: self._rename,
            Op.TOUCH: self._touch,
            Op.OPEN: self._open,
            Op.LONE_CLOSE: self._close_alone,
        }

    def batch_begins(self, messages: Iterable[Message]) -> None:
        """These messages come next, until ``batch_done``."""
        self._closed_soon = {
            message.arg
            for message in messages
            if isinstance(message, Order) and message.op == Op.CLOSE
        }
        if self.visibly and self._visible is self._private:
            with suppress(OSError):  # not where it was: watches on inodes still work
                self._visible = _View(self._open_mountpoint())
        self._view = self._visible

    def execute(self, order: Order) -> int:
        """Make the call. Returns 0, or the errno with which the guest's kernel refused it, or
        EINVAL for an invalid order.
        """
        if order.op == Op.CLOSE:
            self._close(order.arg)
            return 0
        try:
            _check(order)
        except OSError as error:
            return error.errno or errno.EINVAL
        if len(self._directories) >= _DIRECTORIES:
            self._leave_directories()
        self._walking = False
        exchange = order.op == Op.RENAME and order.arg  # in which the other may be a directory
        if exchange or (stat.S_ISDIR(order.mode) and order.op in (Op.REMOVE, Op.RENAME)):
            self._leave_directories()
            # The kernel refuses to rename a directory if it believes the source to be inside the
            # target or the reverse; a walk updates its view.
            self._walking = order.op == Op.RENAME
        number = 0
        for _ in range(_RETRIES):
            try:
                dir_fd = self._directory(order.nodeid, order.generation, order.path)
                if number == errno.ESTALE and order.name:
                    # The kernel caches the name from before the mark. By path it would look the
                    # name up again, but not by a descriptor that was opened before.
                    kernel.ask_for(dir_fd, order.name)
                number = self._actions[Op(order.op)](order, dir_fd) or 0
                break
            except OSError as error:
                number = error.errno or errno.EIO
                self._leave_directories()
                self._walking = True
                if number == errno.EXDEV:  # something is mounted there: not on the private copy
                    self._view = self._private
        if self._view is not self._visible:
            self._leave_directories()
            self._view = self._visible
        return number

    def _directory(self, nodeid: int, generation: int, path: bytes) -> int:
        if nodeid > FSD_DIR:
            return self._view.hidden(nodeid)
        if nodeid == ROOT:
            return self._view.root_fd
        fd = self._directories.get((nodeid, generation))
        if fd is None:
            fd = self._by_handle(nodeid, generation)
            if fd < 0 and not path:
                raise OSError(errno.ESTALE, "no way leads to the directory")
            if fd < 0:
                # The server answers each step as of the event.
                fd = reach(self._view.root_fd, path, directory=True)
            self._directories[nodeid, generation] = fd
        return fd

    def _by_handle(self, nodeid: int, generation: int) -> int:
        """Open a directory that the kernel holds, without a request; -1 if it does not hold it.

        If the kernel has dropped the dentry, it would look for the name in the parent, whose
        watchers would see the read: the server refuses that look-up.
        """
        if self._walking or self._view is not self._private:
            return -1
        try:
            handle = encode_fh(NodeKey(nodeid, generation))
            return kernel.open_by_handle(self._mount_fd, FILEID_INO64_GEN, handle, _O_DIR)
        except (OSError, struct.error):  # the latter: no such number
            return -1

    def batch_done(self) -> None:
        """The batch is finished: close its directories, and the mountpoint."""
        self._leave_directories()
        self._closed_soon.clear()
        if self._visible is not self._private:
            self._visible.close()
            self._visible = self._view = self._private

    def _leave_directories(self) -> None:
        for fd in self._directories.values():
            os.close(fd)
        self._directories.clear()

    def _create(self, order: Order, dir_fd: int) -> None:
        kind = stat.S_IFMT(order.mode)
        if kind == stat.S_IFDIR:
            if order.name2:
                # The kernel may know it already, and programs may work in it or have mounted
                # something there. A look-up in another place moves it there (d_splice_alias), and
                # the reply to mkdir moves it back; if its name were not found, all that would be
                # detached.
                with suppress(OSError):
                    os.close(reach(self._view.hidden(order.nodeid2), order.name2))
            os.mkdir(order.name, dir_fd=dir_fd)
        elif kind == stat.S_IFLNK:
            os.symlink(b"?", order.name, dir_fd=dir_fd)
        elif order.arg and kind == stat.S_IFREG:
            self._check_room(order, 2 * _CLOSED_SOON)  # the server keeps to fewer
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK | os.O_NOCTTY
            self._keep(order, os.open(order.name, flags, 0o600, dir_fd=dir_fd))
        else:
            os.mknod(order.name, kind | 0o600, dir_fd=dir_fd)

    @staticmethod
    def _remove(order: Order, dir_fd: int) -> None:
        if order.nodeid == ALIAS:
            # It has no name left. The kernel sees it with a link count of 0 and then finds it
            # missing, so it drops the dentry, which causes IN_DELETE_SELF (dentry_unlink_inode in
            # fs/dcache.c).
            os.close(reach(dir_fd, order.name))
            with suppress(FileNotFoundError):
                os.close(reach(dir_fd, order.name))
        elif stat.S_ISDIR(order.mode):
            os.rmdir(order.name, dir_fd=dir_fd)
        else:
            os.unlink(order.name, dir_fd=dir_fd)

    def _rename(self, order: Order, dir_fd: int) -> None:
        dir_fd2 = self._directory(order.nodeid2, order.generation2, order.path2)
        if stat.S_ISDIR(order.mode) or order.arg:
            # The kernel may know a directory at another place by now. A look-up moves it here, but
            # not a look-up that holds the locks of a rename (d_splice_alias, ESTALE).
            for fd, name in ((dir_fd, order.name), (dir_fd2, order.name2)):
                with suppress(FileNotFoundError):
                    os.close(reach(fd, name))
        kernel.renameat2(dir_fd, order.name, dir_fd2, order.name2, order.arg)

    def _touch(self, order: Order, dir_fd: int) -> None:
        opened = self._files.get(order.nodeid2)
        fd = self._opened_visibly.get(_Name(order.nodeid, order.name, order.arg == Mask.MODIFY))
        if opened is not None:
            fd = opened.fd
        if fd is not None and order.arg in (Mask.ACCESS, Mask.MODIFY):
            with suppress(OSError):  # now of another file
                _move_a_byte(fd, order.arg)
                return
        if order.generation2 and order.arg in (Mask.ACCESS, Mask.MODIFY):
            self._touch_apart(order, dir_fd)
            return
        both = bool(order.arg & Mask.ATTRIB)
        atime, mtime = bool(order.arg & Mask.ACCESS), bool(order.arg & Mask.MODIFY)
        atime, mtime = both or atime, both or mtime
        if order.name and self._is_copy and self._view is self._private:
            # One call for three, and as safe: no link is followed, and no mount is in the way.
            kernel.touch_name(dir_fd, order.name, atime=atime, mtime=mtime)
            return
        with _reached(dir_fd, order.name) as file:
            kernel.touch(file, atime=atime, mtime=mtime)

    @staticmethod
    def _touch_apart(order: Order, dir_fd: int) -> None:
        """Through a descriptor whose name is gone: a second look-up does not find it."""
        with _reached(dir_fd, order.name) as file:
            with suppress(FileNotFoundError):
                os.close(reach(dir_fd, order.name))
            modifies = order.arg == Mask.MODIFY
            mode = os.O_WRONLY if modifies else os.O_RDONLY
            try:
                fd = open_reached(file, mode | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:  # a program here executes it: all writers get ETXTBSY
                kernel.touch(file, atime=not modifies, mtime=modifies)
                return
        try:
            _move_a_byte(fd, order.arg)
        finally:
            os.close(fd)

    def _open(self, order: Order, dir_fd: int) -> int:
        """Returns ETXTBSY if it was opened for reading instead because a program executes it."""
        self._check_room(order, _CLOSED_SOON if order.seq in self._closed_soon else 0)
        flags = os.O_NONBLOCK | os.O_NOCTTY
        flags |= os.O_WRONLY if order.arg else os.O_RDONLY
        if stat.S_ISDIR(order.mode):
            flags |= os.O_DIRECTORY
        number = 0
        try:
            fd = self._open_named(dir_fd, order.name, flags)
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            number = errno.ETXTBSY
            fd = self._open_named(dir_fd, order.name, flags & ~os.O_WRONLY)
        self._keep(order, fd)
        return number

    def _check_room(self, order: Order, beyond: int) -> None:
        if self._opened_limit - len(self._files) <= -beyond:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), order.name)

    def _keep(self, order: Order, fd: int) -> None:
        """Until the CLOSE of this order."""
        self._close(order.seq)  # which an honest server never causes
        name = _Name(order.nodeid, order.name, bool(order.arg))
        self._files[order.seq] = _File(fd, name)
        if self._view is not self._private and not stat.S_ISDIR(order.mode):
            self._opened_visibly[name] = fd

    def _open_named(self, dir_fd: int, name: bytes, flags: int) -> int:
        if name and self._opens_by_name and self._view is self._private:
            return open_entry(dir_fd, name, flags)
        with _reached(dir_fd, name) as file:
            return open_reached(file, flags)

    def _close_alone(self, order: Order, dir_fd: int) -> None:
        if self.visibly:  # groups that report descriptors would get the FIFO
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        with _reached(dir_fd, order.name) as file:
            if order.generation2:  # a second look-up does not find it
                with suppress(FileNotFoundError):
                    os.close(reach(dir_fd, order.name))
            close_alone(file, writing=bool(order.arg))

    def _close(self, seq: int) -> None:
        file = self._files.pop(seq, None)
        if file is None:
            return
        if self._opened_visibly.get(file.name) == file.fd:
            del self._opened_visibly[file.name]
        os.close(file.fd)

    def close(self) -> None:
        """Close the files that are still open for the host's programs."""
        for file in self._files.values():
            with suppress(OSError):
                os.close(file.fd)
        self._files.clear()
        self.batch_done()
        self._private.close()


def _move_a_byte(fd: int, event: int) -> None:
    if event == Mask.MODIFY:
        os.pwrite(fd, b"\0", 0)
    else:
        os.pread(fd, 1, 0)


def _check(order: Order) -> None:
    """Raises OSError (EINVAL) for an order that no honest server sends."""
    if order.op not in (*_NAMELESS, Op.CREATE, Op.REMOVE, Op.RENAME):
        raise OSError(errno.EINVAL, "no such order")
    if order.name or order.op not in _NAMELESS:
        check_name(order.name)
    if order.op == Op.RENAME or order.name2:
        check_name(order.name2)
    if order.op == Op.RENAME and order.arg not in (0, _RENAME_EXCHANGE):
        raise OSError(errno.EINVAL, "no such rename")


@contextmanager
def _reached(dir_fd: int, name: bytes) -> Iterator[int]:
    """An O_PATH descriptor of the named file, or of the directory itself."""
    if not name:
        yield dir_fd
        return
    fd = reach(dir_fd, name)
    try:
        yield fd
    finally:
        os.close(fd)
