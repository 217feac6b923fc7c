"""FUSE requests about names and attributes, as raw messages, on the operations.

A handler returns the payload of the reply; the session checks the node of the header before, and
turns an exception into the errno of the reply.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from protocol import fuse
from protocol.fuse import Fattr, Opcode

from ..files.changes import Changes
from ..files.passthrough import Entry
from ..files.xattrs import ACL_ACCESS
from ..linux import syscalls
from .nodes import Nodes
from .operations import Operations
from .request import Request

_MODE, _UID, _GID, _SIZE, _FH = (
    int(bit) for bit in (Fattr.MODE, Fattr.UID, Fattr.GID, Fattr.SIZE, Fattr.FH)
)
_ATIME, _MTIME = int(Fattr.ATIME), int(Fattr.MTIME)
_ATIME_NOW, _MTIME_NOW = int(Fattr.ATIME_NOW), int(Fattr.MTIME_NOW)
_KILL = int(Fattr.KILL_SUIDGID)
_ANY = _MODE | _UID | _GID | _SIZE | _ATIME | _MTIME
_SHORT_SETXATTR = 8
"""Bytes of fuse_setxattr_in before SETXATTR_EXT."""


class Names:
    """Handlers of one guest."""

    def __init__(self, operations: Operations, nodes: Nodes, *, xattr: bool) -> None:
        self._operations = operations
        self._nodes = nodes
        self.long_setxattr = False
        self.handlers: dict[int, Callable[[Request], bytes | None]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.STATX: self._statx,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.STATFS: self._statfs,
            Opcode.ACCESS: self._access,
        }
        if xattr:
            self.handlers |= {
                Opcode.SETXATTR: self._setxattr,
                Opcode.GETXATTR: self._getxattr,
                Opcode.LISTXATTR: self._listxattr,
                Opcode.REMOVEXATTR: self._removexattr,
            }

    def _entry(self, request: Request, entry: Entry, name: bytes) -> bytes:
        request.on_lost = self._nodes.hold(entry.inode)
        name = b"" if name in (b".", b"..") else name
        return self._nodes.entry(request.who, entry, request.nodeid, name)

    # Names

    def _lookup(self, request: Request) -> bytes:
        self._nodes.check_room()
        name = fuse.name(request.body)
        if name not in (b".", b".."):  # of a file handle, whose node may be forgotten
            self._nodes.looks_into(request.who, request.nodeid)
        try:
            entry = self._operations.lookup(request.who, request.nodeid, name)
        except FileNotFoundError:
            reply = self._nodes.no_entry(request.who, request.nodeid, name)
            if reply is None:
                raise
            return reply
        return self._entry(request, entry, name)

    def _mknod(self, request: Request) -> bytes:
        mode, rdev, umask = fuse.MKNOD_IN.unpack(request.body)
        name = fuse.name(request.body, fuse.MKNOD_IN.size)
        self._nodes.check_room()
        who = request.who._replace(umask=umask & 0o777)
        entry = self._operations.mknod(who, request.nodeid, name, mode, rdev)
        return self._entry(request, entry, name)

    def _mkdir(self, request: Request) -> bytes:
        mode, umask = fuse.MKDIR_IN.unpack(request.body)
        name = fuse.name(request.body, fuse.MKDIR_IN.size)
        self._nodes.check_room()
        who = request.who._replace(umask=umask & 0o777)
        entry = self._operations.mkdir(who, request.nodeid, name, mode)
        return self._entry(request, entry, name)

    def _symlink(self, request: Request) -> bytes:
        name, target = fuse.names(request.body, 0, 2)
        self._nodes.check_room()
        entry = self._operations.symlink(request.who, request.nodeid, name, target)
        return self._entry(request, entry, name)

    def _link(self, request: Request) -> bytes:
        old = fuse.LINK_IN.unpack(request.body)
        name = fuse.name(request.body, fuse.LINK_IN.size)
        self._nodes.check(old)
        entry = self._operations.link(request.who, old, request.nodeid, name)
        return self._entry(request, entry, name)

    def _unlink(self, request: Request) -> bytes:
        self._operations.unlink(request.who, request.nodeid, fuse.name(request.body))
        return b""

    def _rmdir(self, request: Request) -> bytes:
        self._operations.rmdir(request.who, request.nodeid, fuse.name(request.body))
        return b""

    def _rename(self, request: Request) -> bytes:
        newdir = fuse.RENAME_IN.unpack(request.body)
        return self._move(request, newdir, 0, fuse.RENAME_IN.size)

    def _rename2(self, request: Request) -> bytes:
        newdir, flags = fuse.RENAME2_IN.unpack(request.body)
        return self._move(request, newdir, flags, fuse.RENAME2_IN.size)

    def _move(self, request: Request, newdir: int, flags: int, offset: int) -> bytes:
        old, new = fuse.names(request.body, offset, 2)
        self._nodes.check(newdir)
        self._operations.rename(request.who, request.nodeid, old, newdir, new, flags)
        return b""

    def _readlink(self, request: Request) -> bytes:
        return self._operations.readlink(request.nodeid)

    # Attributes

    def _getattr(self, request: Request) -> bytes:
        self._nodes.catch_up()
        inode, attr = self._operations.getattr(request.who, request.nodeid)
        return self._nodes.attributes(request.who, inode, attr)

    def _statx(self, request: Request) -> bytes:
        fuse.STATX_IN.unpack(request.body)
        self._nodes.catch_up()
        inode, attr = self._operations.getattr(request.who, request.nodeid)
        born_ns = self._operations.born_ns(request.who, request.nodeid)
        return self._nodes.statx(request.who, inode, attr, born_ns)

    def _setattr(self, request: Request) -> bytes:
        asked = fuse.SETATTR_IN.unpack(request.body)
        valid = asked.valid
        atime_ns = mtime_ns = None
        if valid & _ATIME:
            now = valid & _ATIME_NOW
            atime_ns = syscalls.NOW if now else asked.atime * 10**9 + asked.atimensec
        if valid & _MTIME:
            now = valid & _MTIME_NOW
            mtime_ns = syscalls.NOW if now else asked.mtime * 10**9 + asked.mtimensec
        changes = Changes(
            asked.mode if valid & _MODE else None,
            asked.uid if valid & _UID else None,
            asked.gid if valid & _GID else None,
            asked.size if valid & _SIZE else None,
            atime_ns,
            mtime_ns,
            bool(valid & _KILL),
        )
        if not valid & _ANY:
            changes = self._without_suid(request)
        fh = asked.fh if valid & _FH else None
        inode, attr = self._operations.setattr(request.who, request.nodeid, changes, fh)
        return self._nodes.attributes(request.who, inode, attr)

    def _without_suid(self, request: Request) -> Changes:
        """If FUSE_HANDLE_KILLPRIV_V2 is agreed, a kernel asks for no change at all upon chown(2) of
        neither uid nor gid, which clears suid and sgid bits: of one's own files.
        """
        inode, attr = self._operations.getattr(request.who, request.nodeid)
        mode = attr.st_mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            mode &= ~stat.S_ISGID
        mine = request.who.uid in (0, attr.st_uid)
        kills = mine and not inode.is_dir and mode != attr.st_mode
        return Changes(mode if kills else None)

    def _statfs(self, request: Request) -> bytes:
        found = self._operations.statfs(request.nodeid)
        return fuse.STATFS_OUT.pack(
            found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree,
            found.f_bsize, found.f_namemax, found.f_frsize,
        )  # fmt: skip

    def _access(self, request: Request) -> bytes:
        mask = fuse.ACCESS_IN.unpack(request.body)
        if not self._operations.may_access(request.nodeid, mask & (os.R_OK | os.W_OK | os.X_OK)):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return b""

    # Extended attributes

    def _setxattr(self, request: Request) -> bytes:
        if self.long_setxattr:
            size, flags, more = fuse.SETXATTR_IN.unpack(request.body)
            offset = fuse.SETXATTR_IN.size
        else:
            size, flags, more = fuse.SETXATTR_IN.unpack(request.body[:8] + bytes(8))
            offset = _SHORT_SETXATTR
        name = fuse.name(request.body, offset)
        offset += len(name) + 1
        value = request.body[offset : offset + size]
        if len(value) != size:
            raise fuse.DecodeError(f"a value of {len(value)} bytes, not {size}")
        self._operations.setxattr(request.who, request.nodeid, name, value, flags)
        if more & fuse.SETXATTR_ACL_KILL_SGID and name == ACL_ACCESS:
            self._kill_sgid(request)
        return b""

    def _kill_sgid(self, request: Request) -> None:
        """The caller is not in the file's group: setting its ACL clears the sgid bit."""
        _, attr = self._operations.getattr(request.who, request.nodeid)
        if attr.st_mode & stat.S_ISGID:
            changes = Changes(mode=attr.st_mode & ~stat.S_ISGID)
            self._operations.setattr(request.who, request.nodeid, changes, None)

    def _getxattr(self, request: Request) -> bytes:
        size = fuse.GETXATTR_IN.unpack(request.body)
        name = fuse.name(request.body, fuse.GETXATTR_IN.size)
        return _sized(self._operations.getxattr(request.who, request.nodeid, name), size)

    def _listxattr(self, request: Request) -> bytes:
        size = fuse.GETXATTR_IN.unpack(request.body)
        names = self._operations.listxattr(request.nodeid)
        return _sized(b"".join(name + b"\0" for name in names), size)

    def _removexattr(self, request: Request) -> bytes:
        self._operations.removexattr(request.who, request.nodeid, fuse.name(request.body))
        return b""


def _sized(value: bytes, size: int) -> bytes:
    """A size of 0 asks for the value's length. Raises OSError ERANGE if the value is longer."""
    if not size:
        return fuse.GETXATTR_OUT.pack(len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value
