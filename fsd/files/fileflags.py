"""The ioctls that guests may make on files, and the file flags that these may change.

Apart because it is a rule of its own: the flags of linux/fs.h, and which of them carry rights that
the host has not given.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..linux.ioctls import FILES, FSGETXATTR, FSSETXATTR, GETFLAGS, SETFLAGS

CHANGING = (SETFLAGS, FSSETXATTR)
_FLAGS = struct.Struct("=I")
_XATTR = struct.Struct("=IIIII")  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize
_MAY_CHANGE = 0x008B_C4FF
"""Of FS_*_FL: SECRM, UNRM, COMPR, SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME, NOCOMP, JOURNAL_DATA,
NOTAIL, DIRSYNC, TOPDIR, EXTENT, NOCOW. The host checks what IMMUTABLE, APPEND (CAP_LINUX_IMMUTABLE)
and JOURNAL_DATA (CAP_SYS_RESOURCE) ask of the server, which acts as the caller. Not PROJINHERIT
(the quota of whatever is made in a directory), CASEFOLD (two names for one file) and DAX."""
_MAY_CHANGE_X = 0x24F8
"""Of FS_XFLAG_*: IMMUTABLE, APPEND, SYNC, NOATIME, NODUMP, NOSYMLINKS, NODEFRAG. Not PROJINHERIT,
and nothing about where and in what pieces the host's file system puts data."""
_SHOWN, _SHOWN_X = 0x1074_3B00, 0x8000_0002
"""Flags that a file system reports and nobody can set: DIRTY, COMPRBLK, ENCRYPT, INDEX, IMAGIC,
HUGE_FILE, VERITY, EA_INODE, EOFBLOCKS, INLINE_DATA; HASATTR, PREALLOC."""


def check(fd: int, command: int, data: bytes) -> None:
    """Raises OSError EPERM for a change that guests may not make: of the project above all, by
    which the host limits the share.
    """
    may = {SETFLAGS: _may_set_flags, FSSETXATTR: _may_set_xattr}.get(command)
    if may is not None and not may(fd, data):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _may_set_flags(fd: int, data: bytes) -> bool:
    (now,) = _FLAGS.unpack_from(fcntl.ioctl(fd, GETFLAGS, bytes(FILES[GETFLAGS])))
    (wanted,) = _FLAGS.unpack_from(data)
    return not (now ^ wanted) & ~(_MAY_CHANGE | _SHOWN)


def _may_set_xattr(fd: int, data: bytes) -> bool:
    now = _XATTR.unpack_from(fcntl.ioctl(fd, FSGETXATTR, bytes(FILES[FSGETXATTR])))
    xflags, extsize, _, project, cow_extsize = _XATTR.unpack_from(data)
    return (extsize, project, cow_extsize) == (now[1], *now[3:]) and not (
        (now[0] ^ xflags) & ~(_MAY_CHANGE_X | _SHOWN_X)
    )
