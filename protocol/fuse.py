"""The messages of FUSE as include/uapi/linux/fuse.h defines them, 7.31 to 7.45. Sans-IO.

A request is InHeader, its opcode's struct, names (NUL-terminated) or data, and extensions. A reply
is OutHeader and its opcode's struct or data. Fields have the kernel's names and order; padding is
left out. Integers are little-endian, as on every machine that fsd serves; INIT's opcode shows if a
guest has the other byte order, and it is refused. It is one module, to be read beside the header.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from enum import IntEnum, IntFlag
from typing import Any, Generic, NamedTuple, TypeVar

MAJOR = 7
MINOR = 45
"""The newest version whose messages are here."""
OLDEST_MINOR = 31
"""The oldest supported version: Linux 5.4, the first with virtiofs."""
ROOT_ID = 1

_T = TypeVar("_T")


class DecodeError(ValueError):
    """A message that does not have the layout of its opcode."""


class Opcode(IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Init(IntFlag):
    """INIT's flags (low 32 bits) and flags2 (high)."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


class Fattr(IntFlag):
    """What SetattrIn asks to change (``valid``)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class Fopen(IntFlag):
    """The server's answer to OPEN (OpenOut.open_flags)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


GETATTR_FH = 1 << 0
WRITE_CACHE, WRITE_LOCKOWNER, WRITE_KILL_SUIDGID = 1 << 0, 1 << 1, 1 << 2
RELEASE_FLUSH, RELEASE_FLOCK_UNLOCK = 1 << 0, 1 << 1
LK_FLOCK = 1 << 0
FSYNC_FDATASYNC = 1 << 0
OPEN_KILL_SUIDGID = 1 << 0
SETXATTR_ACL_KILL_SGID = 1 << 0
ATTR_SUBMOUNT = 1 << 0
IOCTL_COMPAT, IOCTL_UNRESTRICTED, IOCTL_32BIT, IOCTL_DIR = 1 << 0, 1 << 1, 1 << 3, 1 << 4
POLL_SCHEDULE_NOTIFY = 1 << 0
MAX_NR_SECCTX = 31
EXT_GROUPS = 32
NOTIFY_POLL = 1
NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_INC_EPOCH, EPOCH_MINOR = 8, 44
"""All names are to be looked up again; the minor version from which it is known."""
EXPIRE_ONLY = 1 << 0
"""The name is looked up again when it is used next, and not dropped before."""


class Wire(Generic[_T]):
    """The layout of one struct, and the tuple that represents it."""

    __slots__ = ("_make", "_unpack", "fields", "name", "pack", "size")

    def __init__(self, name: str, layout: str, make: Callable[[Iterable[Any]], _T]) -> None:
        layout_of = struct.Struct("<" + layout)
        self.name = name
        self.size = layout_of.size
        self.pack: Callable[..., bytes] = layout_of.pack
        """Makes the struct's bytes of its fields."""
        self.fields: Callable[[bytes | memoryview], tuple[Any, ...]] = layout_of.unpack_from
        """The fields at the start of data that is long enough: for the hottest paths."""
        self._unpack = layout_of.unpack_from
        self._make = make

    def unpack(self, data: bytes, offset: int = 0) -> _T:
        """The struct at ``offset``. Raises DecodeError if the data is too short."""
        try:
            return self._make(self._unpack(data, offset))
        except struct.error:
            have = len(data) - offset
            raise DecodeError(f"{self.name} has {self.size} bytes, here are {have}") from None


class InHeader(NamedTuple):
    """struct fuse_in_header: begins every request. ``total_extlen`` counts 8 bytes."""

    len: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int


class OutHeader(NamedTuple):
    """struct fuse_out_header: begins every reply. ``error`` is 0 or a negative errno."""

    len: int
    error: int
    unique: int


class InitIn(NamedTuple):
    """struct fuse_init_in, up to ``flags``; ``flags2`` follows if flags has INIT_EXT."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class ForgetOne(NamedTuple):
    """struct fuse_forget_one."""

    nodeid: int
    nlookup: int


class GetattrIn(NamedTuple):
    """struct fuse_getattr_in."""

    getattr_flags: int
    fh: int


class StatxIn(NamedTuple):
    """struct fuse_statx_in."""

    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int


class SetattrIn(NamedTuple):
    """struct fuse_setattr_in."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


class MknodIn(NamedTuple):
    """struct fuse_mknod_in."""

    mode: int
    rdev: int
    umask: int


class MkdirIn(NamedTuple):
    """struct fuse_mkdir_in."""

    mode: int
    umask: int


class Rename2In(NamedTuple):
    """struct fuse_rename2_in."""

    newdir: int
    flags: int


class OpenIn(NamedTuple):
    """struct fuse_open_in."""

    flags: int
    open_flags: int


class CreateIn(NamedTuple):
    """struct fuse_create_in; TMPFILE has the same."""

    flags: int
    mode: int
    umask: int
    open_flags: int


class ReleaseIn(NamedTuple):
    """struct fuse_release_in."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class FlushIn(NamedTuple):
    """struct fuse_flush_in."""

    fh: int
    lock_owner: int


class ReadIn(NamedTuple):
    """struct fuse_read_in; READDIR and READDIRPLUS have the same."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class WriteIn(NamedTuple):
    """struct fuse_write_in."""

    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int

    @property
    def appends(self) -> bool:
        """Whether the write appends. Pages that are written back have an offset of their own."""
        return bool(self.flags & os.O_APPEND) and not self.write_flags & WRITE_CACHE


class FsyncIn(NamedTuple):
    """struct fuse_fsync_in."""

    fh: int
    fsync_flags: int


class SetxattrIn(NamedTuple):
    """struct fuse_setxattr_in as of SETXATTR_EXT."""

    size: int
    flags: int
    setxattr_flags: int


class LkIn(NamedTuple):
    """struct fuse_lk_in; ``end`` is inclusive, ``type`` is of fcntl(2)."""

    fh: int
    owner: int
    start: int
    end: int
    type: int
    pid: int
    lk_flags: int


class IoctlIn(NamedTuple):
    """struct fuse_ioctl_in."""

    fh: int
    flags: int
    cmd: int
    arg: int
    in_size: int
    out_size: int


class PollIn(NamedTuple):
    """struct fuse_poll_in."""

    fh: int
    kh: int
    flags: int
    events: int


class FallocateIn(NamedTuple):
    """struct fuse_fallocate_in."""

    fh: int
    offset: int
    length: int
    mode: int


class LseekIn(NamedTuple):
    """struct fuse_lseek_in."""

    fh: int
    offset: int
    whence: int


class CopyFileRangeIn(NamedTuple):
    """struct fuse_copy_file_range_in."""

    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    len: int
    flags: int


def _first(fields: Iterable[Any]) -> int:
    (value,) = fields
    number: int = value
    return number


def _fields(fields: Iterable[Any]) -> tuple[int, ...]:
    return tuple(fields)


IN_HEADER = Wire("fuse_in_header", "IIQQIIIH2x", InHeader._make)
OUT_HEADER = Wire("fuse_out_header", "IiQ", OutHeader._make)
INIT_IN = Wire("fuse_init_in", "IIII", InitIn._make)
INIT_FLAGS2 = Wire("fuse_init_in.flags2", "I", _first)
INIT_OUT = Wire("fuse_init_out", "IIIIHHIIHHIIH22x", _fields)
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout."""
FORGET_IN = Wire("fuse_forget_in", "Q", _first)
FORGET_ONE = Wire("fuse_forget_one", "QQ", ForgetOne._make)
BATCH_FORGET_IN = Wire("fuse_batch_forget_in", "I4x", _first)
GETATTR_IN = Wire("fuse_getattr_in", "I4xQ", GetattrIn._make)
STATX_IN = Wire("fuse_statx_in", "I4xQII", StatxIn._make)
SETATTR_IN = Wire("fuse_setattr_in", "I4xQQQqqqIIII4xII4x", SetattrIn._make)
MKNOD_IN = Wire("fuse_mknod_in", "III4x", MknodIn._make)
MKDIR_IN = Wire("fuse_mkdir_in", "II", MkdirIn._make)
RENAME_IN = Wire("fuse_rename_in", "Q", _first)
RENAME2_IN = Wire("fuse_rename2_in", "QI4x", Rename2In._make)
LINK_IN = Wire("fuse_link_in", "Q", _first)
OPEN_IN = Wire("fuse_open_in", "II", OpenIn._make)
CREATE_IN = Wire("fuse_create_in", "IIII", CreateIn._make)
RELEASE_IN = Wire("fuse_release_in", "QIIQ", ReleaseIn._make)
FLUSH_IN = Wire("fuse_flush_in", "Q8xQ", FlushIn._make)
READ_IN = Wire("fuse_read_in", "QQIIQI4x", ReadIn._make)
WRITE_IN = Wire("fuse_write_in", "QQIIQI4x", WriteIn._make)
FSYNC_IN = Wire("fuse_fsync_in", "QI4x", FsyncIn._make)
SETXATTR_IN = Wire("fuse_setxattr_in", "III4x", SetxattrIn._make)
GETXATTR_IN = Wire("fuse_getxattr_in", "I4x", _first)
LK_IN = Wire("fuse_lk_in", "QQQQIII4x", LkIn._make)
ACCESS_IN = Wire("fuse_access_in", "I4x", _first)
INTERRUPT_IN = Wire("fuse_interrupt_in", "Q", _first)
IOCTL_IN = Wire("fuse_ioctl_in", "QIIQII", IoctlIn._make)
POLL_IN = Wire("fuse_poll_in", "QQII", PollIn._make)
FALLOCATE_IN = Wire("fuse_fallocate_in", "QQQI4x", FallocateIn._make)
LSEEK_IN = Wire("fuse_lseek_in", "QQI4x", LseekIn._make)
COPY_FILE_RANGE_IN = Wire("fuse_copy_file_range_in", "QQQQQQQ", CopyFileRangeIn._make)

ATTR = Wire("fuse_attr", "QQQqqqIIIIIIIIII", _fields)
"""ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid,
rdev, blksize, flags."""
ENTRY_OUT = Wire("fuse_entry_out", "QQQQII", _fields)
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec; then
fuse_attr."""
ATTR_OUT = Wire("fuse_attr_out", "QI4x", _fields)
"""attr_valid, attr_valid_nsec; fuse_attr follows."""
STATX_OUT = Wire("fuse_statx_out", "QII16xIIQIIIH2xQQQQqI4xqI4xqI4xqI4xIIII112x", _fields)
"""attr_valid, attr_valid_nsec, flags; then fuse_statx: mask, blksize, attributes, nlink, uid, gid,
mode, ino, size, blocks, attributes_mask; seconds and nanoseconds of atime, btime, ctime, mtime;
rdev_major, rdev_minor, dev_major, dev_minor."""
OPEN_OUT = Wire("fuse_open_out", "QIi", _fields)
"""fh, open_flags, backing_id."""
WRITE_OUT = Wire("fuse_write_out", "I4x", _first)
STATFS_OUT = Wire("fuse_statfs_out", "QQQQQIII28x", _fields)
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize."""
GETXATTR_OUT = Wire("fuse_getxattr_out", "I4x", _first)
LK_OUT = Wire("fuse_lk_out", "QQII", _fields)
"""start, end, type, pid."""
IOCTL_OUT = Wire("fuse_ioctl_out", "iIII", _fields)
"""result, flags, in_iovs, out_iovs; data follows."""
POLL_OUT = Wire("fuse_poll_out", "I4x", _first)
LSEEK_OUT = Wire("fuse_lseek_out", "Q", _first)
COPY_FILE_RANGE_OUT = Wire("fuse_copy_file_range_out", "Q", _first)
DIRENT = Wire("fuse_dirent", "QQII", _fields)
"""ino, off, namelen, type; the name follows, then zeros up to a multiple of 8."""
NOTIFY_INVAL_INODE_OUT = Wire("fuse_notify_inval_inode_out", "Qqq", _fields)
"""ino, off, len; only the attributes if off is negative."""
NOTIFY_INVAL_ENTRY_OUT = Wire("fuse_notify_inval_entry_out", "QII", _fields)
"""parent, namelen, flags; the name follows, with a NUL."""
NOTIFY_POLL_OUT = Wire("fuse_notify_poll_wakeup_out", "Q", _first)
EXT_HEADER = Wire("fuse_ext_header", "II", _fields)
"""size with this header, type; fuse_secctx_header where type is at most MAX_NR_SECCTX."""
SUPP_GROUPS = Wire("fuse_supp_groups", "I", _first)

ENTRY_SIZE = ENTRY_OUT.size + ATTR.size
_PAD = (b"", b"\0" * 7, b"\0" * 6, b"\0" * 5, b"\0" * 4, b"\0" * 3, b"\0" * 2, b"\0")


def names(data: bytes, offset: int, count: int) -> list[bytes]:
    """``count`` NUL-terminated names from ``offset``. Raises DecodeError if one is missing."""
    found = data[offset:].split(b"\0", count)
    if len(found) <= count:
        raise DecodeError(f"{count} names expected, here are {len(found) - 1}")
    return found[:count]


def name(data: bytes, offset: int = 0) -> bytes:
    """One NUL-terminated name. Raises DecodeError if the NUL is missing."""
    end = data.find(b"\0", offset)
    if end < 0:
        raise DecodeError("a name without its end")
    return data[offset:end]


def forgets(data: bytes) -> list[ForgetOne]:
    """The entries of BATCH_FORGET. Raises DecodeError if there are fewer than its header states."""
    count = BATCH_FORGET_IN.unpack(data)
    if BATCH_FORGET_IN.size + count * FORGET_ONE.size > len(data):
        raise DecodeError(f"{count} forgets do not fit into {len(data)} bytes")
    return [FORGET_ONE.unpack(data, 8 + 16 * index) for index in range(count)]


def supplementary_groups(extensions: bytes) -> tuple[int, ...]:
    """The groups among the extensions of a request (CREATE_SUPP_GROUP). Raises DecodeError."""
    offset = 0
    while offset < len(extensions):
        size, kind = EXT_HEADER.unpack(extensions, offset)
        if size < EXT_HEADER.size or offset + size > len(extensions):
            raise DecodeError(f"an extension of {size} bytes")
        if kind == EXT_GROUPS:
            count = SUPP_GROUPS.unpack(extensions, offset + 8)
            if 12 + 4 * count > size:
                raise DecodeError(f"{count} groups do not fit into {size} bytes")
            return struct.unpack_from(f"<{count}I", extensions, offset + 12)
        offset += (size + 7) & ~7
    return ()


def dirent(ino: int, off: int, kind: int, entry: bytes) -> bytes:
    """struct fuse_dirent with its name and padding. ``kind`` is the DT_* of readdir(3)."""
    return DIRENT.pack(ino, off, len(entry), kind) + entry + _PAD[len(entry) & 7]
