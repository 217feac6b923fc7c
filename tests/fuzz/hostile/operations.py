"""What a hostile guest asks the file system: a table of operations with their weights."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable

from fsd.linux import ioctls
from protocol import fuse
from protocol.fuse import Fattr, Opcode

from .guest import NAMES, SIZES, Guest, open_flags
from .machine import Then, entry

Operation = Callable[[Guest], None]
TABLE: dict[str, tuple[float, Operation]] = {}
"""By name: how often, and what."""
MODES = (0o644, 0o755, 0o4755, 0o2775, 0o1777, 0o000, 0o7777)
TARGETS = (
    b"../outside/secret",
    b"/etc/passwd",
    b"n1",
    b"swap",
    b".",
    b"/proc/self/fd/0",
    b"x" * 4095,
)
OUTSIDE_TIME = (1 << 62, -1, 0, 1_700_000_000)


def operation(weight: float) -> Callable[[Operation], Operation]:
    """Enter a function in the table."""

    def add(function: Operation) -> Operation:
        TABLE[function.__name__] = (weight, function)
        return function

    return add


# Names


@operation(20)
def lookup(guest: Guest) -> None:
    guest.send(Opcode.LOOKUP, guest.directory(), guest.some_name() + b"\0", guest.learn)


@operation(2)
def lookup_below_a_file(guest: Guest) -> None:
    guest.send(Opcode.LOOKUP, guest.node(), guest.some_name() + b"\0", guest.learn)


@operation(4)
def mkdir(guest: Guest) -> None:
    body = fuse.MKDIR_IN.pack(guest.rng.choice(MODES), 0) + guest.some_name() + b"\0"
    guest.send(Opcode.MKDIR, guest.directory(), body, guest.learn)


@operation(0.05)
def deep_tree(guest: Guest) -> None:
    """A directory in a directory in … ; each is asked for when the one above is there."""
    left = guest.rng.randrange(50, 1200)
    name = guest.rng.choice((b"d", b"d", b"deep" * 60))
    body = fuse.MKDIR_IN.pack(0o755, 0) + name + b"\0"

    def deeper(error: int, payload: bytes) -> None:
        nonlocal left
        if error or len(payload) < fuse.ENTRY_SIZE:
            return
        guest.learn(0, payload)
        left -= 1
        if left:
            guest.operation = "deep_tree"
            guest.send(Opcode.MKDIR, entry(payload)[0], body, deeper, wild=False)

    guest.send(Opcode.MKDIR, guest.directory(), body, deeper, wild=False)


@operation(0.3)
def wide_directory(guest: Guest) -> None:
    """Some hundred names in one directory."""
    parent = guest.directory()
    for number in range(guest.rng.randrange(400)):
        body = fuse.MKNOD_IN.pack(stat.S_IFREG | 0o644, 0, 0) + b"w%d\0" % number
        guest.send(Opcode.MKNOD, parent, body, guest.learn)


@operation(5)
def mknod(guest: Guest) -> None:
    kind = guest.rng.choice(
        (stat.S_IFREG, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, 0)
    )
    device = guest.rng.choice((0, os.makedev(1, 3), os.makedev(1, 5), 0xFFFF_FFFF))
    body = fuse.MKNOD_IN.pack(kind | guest.rng.choice(MODES), device & 0xFFFF_FFFF, 0)
    guest.send(Opcode.MKNOD, guest.directory(), body + guest.some_name() + b"\0", guest.learn)


@operation(3)
def symlink(guest: Guest) -> None:
    body = guest.some_name() + b"\0" + guest.rng.choice(TARGETS) + b"\0"
    guest.send(Opcode.SYMLINK, guest.directory(), body, guest.learn)


@operation(3)
def link(guest: Guest) -> None:
    body = fuse.LINK_IN.pack(guest.node()) + guest.some_name() + b"\0"
    guest.send(Opcode.LINK, guest.directory(), body, guest.learn)


@operation(4)
def unlink(guest: Guest) -> None:
    guest.send(Opcode.UNLINK, guest.directory(), guest.some_name() + b"\0")


@operation(2)
def rmdir(guest: Guest) -> None:
    guest.send(Opcode.RMDIR, guest.directory(), guest.some_name() + b"\0")


@operation(4)
def rename(guest: Guest) -> None:
    names = guest.some_name() + b"\0" + guest.some_name() + b"\0"
    guest.send(Opcode.RENAME, guest.directory(), fuse.RENAME_IN.pack(guest.directory()) + names)


@operation(3)
def rename2(guest: Guest) -> None:
    names = guest.some_name() + b"\0" + guest.some_name() + b"\0"
    flags = guest.rng.choice((0, 1, 2, 4, 7, 0xFFFF_FFFF))
    guest.send(
        Opcode.RENAME2, guest.directory(),
        fuse.RENAME2_IN.pack(guest.directory(), flags) + names,
    )  # fmt: skip


@operation(5)
def create(guest: Guest) -> None:
    flags = open_flags(guest.rng) | guest.rng.choice((os.O_CREAT, os.O_CREAT | os.O_EXCL))
    body = fuse.CREATE_IN.pack(flags & 0xFFFF_FFFF, guest.rng.choice(MODES), 0o022, 0)
    guest.send(
        Opcode.CREATE, guest.directory(), body + guest.some_name() + b"\0", guest.learn_created
    )


@operation(1)
def tmpfile(guest: Guest) -> None:
    body = fuse.CREATE_IN.pack(open_flags(guest.rng), 0o600, 0, 0) + b"\0"
    guest.send(Opcode.TMPFILE, guest.directory(), body, guest.learn_created)


@operation(2)
def readlink(guest: Guest) -> None:
    guest.send(Opcode.READLINK, guest.node(stat.S_IFLNK))


# Attributes


@operation(10)
def get_attributes(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    flags = guest.rng.choice((0, 0, 1))
    guest.send(Opcode.GETATTR, nodeid if flags else guest.node(), fuse.GETATTR_IN.pack(flags, fh))


@operation(2)
def statx(guest: Guest) -> None:
    guest.send(Opcode.STATX, guest.node(), fuse.STATX_IN.pack(0, 0, 0, 0xFFF))


@operation(4)
def set_attributes(guest: Guest) -> None:
    rng = guest.rng
    valid = 0
    for bit in Fattr:
        valid |= bit * (rng.random() < 0.2)
    nodeid, fh = guest.handle()
    size = rng.randrange(1 << 20) if rng.random() < 0.8 else guest.number()
    ids = [rng.choice((0, 1000, 65534, 0xFFFF_FFFF)) for _ in range(2)]
    seconds = [rng.choice(OUTSIDE_TIME) for _ in range(3)]
    parts = [rng.choice((0, 999_999_999, 0xFFFF_FFFF)) for _ in range(3)]
    body = fuse.SETATTR_IN.pack(
        valid, fh, size, 0, *seconds, *parts, stat.S_IFREG | rng.choice(MODES), *ids
    )
    guest.send(Opcode.SETATTR, nodeid, body)


@operation(2)
def access(guest: Guest) -> None:
    guest.send(Opcode.ACCESS, guest.node(), fuse.ACCESS_IN.pack(guest.rng.choice((0, 1, 4, 7, 99))))


@operation(1)
def statfs(guest: Guest) -> None:
    guest.send(Opcode.STATFS, guest.node())


XATTRS = (
    b"user.x", b"user." + b"y" * 250, b"trusted.x", b"security.capability",
    b"system.posix_acl_access", b"system.posix_acl_default", b"system.nfs4_acl", b"user.", b"",
)  # fmt: skip


@operation(3)
def setxattr(guest: Guest) -> None:
    size = guest.rng.choice((0, 1, 100, 4096, 65536, 65537, 200_000))
    lie = guest.rng.choice((0, 0, 0, 1, 1 << 20))
    body = fuse.SETXATTR_IN.pack(size + lie, guest.rng.choice((0, 1, 2, 3)), 0)
    value = bytes([guest.rng.randrange(256)]) * size
    guest.send(Opcode.SETXATTR, guest.node(), body + guest.rng.choice(XATTRS) + b"\0" + value)


@operation(3)
def getxattr(guest: Guest) -> None:
    size = guest.rng.choice((0, 10, 65536, 0xFFFF_FFFF))
    body = fuse.GETXATTR_IN.pack(size) + guest.rng.choice(XATTRS) + b"\0"
    guest.send(Opcode.GETXATTR, guest.node(), body, room=70_000)


@operation(2)
def listxattr(guest: Guest) -> None:
    size = guest.rng.choice((0, 10, 65536, 0xFFFF_FFFF))
    guest.send(Opcode.LISTXATTR, guest.node(), fuse.GETXATTR_IN.pack(size), room=70_000)


@operation(1)
def removexattr(guest: Guest) -> None:
    guest.send(Opcode.REMOVEXATTR, guest.node(), guest.rng.choice(XATTRS) + b"\0")


# References


@operation(6)
def forget(guest: Guest) -> None:
    nodeid = guest.node()
    if nodeid != 1:
        guest.give_back(nodeid)


@operation(0.5)
def forget_too_much(guest: Guest) -> None:
    nodeid = guest.node()
    guest.nodes.pop(nodeid, None)
    guest.nodes[1] = stat.S_IFDIR
    guest.lookups.pop(nodeid, None)
    guest.send(Opcode.FORGET, nodeid, fuse.FORGET_IN.pack(guest.number()), None, priority=True)


@operation(1)
def batch_forget(guest: Guest) -> None:
    """Some of what it knows, in one request."""
    known = [nodeid for nodeid in guest.lookups if guest.rng.random() < 0.1]
    pairs = b"".join(fuse.FORGET_ONE.pack(n, guest.lookups.pop(n)) for n in known)
    for nodeid in known:
        guest.nodes.pop(nodeid, None)
    guest.nodes[1] = stat.S_IFDIR
    body = fuse.BATCH_FORGET_IN.pack(len(known)) + pairs
    guest.send(Opcode.BATCH_FORGET, 0, body[:299_000], None, priority=guest.rng.random() < 0.5)


@operation(0.2)
def giant_batch_forget(guest: Guest) -> None:
    """Of numbers that may be nodes, or of one node again and again."""
    count = guest.rng.randrange(18_000)
    if guest.rng.random() < 0.5:
        nodeid = guest.node()
        pairs = fuse.FORGET_ONE.pack(nodeid, 1) * count
        guest.lookups.pop(nodeid, None)
    else:
        first = guest.rng.choice((1, 2, 1000, 1 << 40))
        pairs = b"".join(fuse.FORGET_ONE.pack(first + n, 0) for n in range(count))
    claimed = guest.rng.choice((count, count, 0xFFFF_FFFF))
    body = fuse.BATCH_FORGET_IN.pack(claimed) + pairs
    guest.send(Opcode.BATCH_FORGET, 0, body, None, priority=guest.rng.random() < 0.5)


# Files


@operation(10)
def open_file(guest: Guest) -> None:
    nodeid = guest.file() if guest.rng.random() < 0.9 else guest.node()
    body = fuse.OPEN_IN.pack(open_flags(guest.rng), 0)
    guest.send(Opcode.OPEN, nodeid, body, guest.learn_handle(nodeid))


@operation(5)
def release(guest: Guest) -> None:
    if guest.handles:
        guest.release(guest.rng.choice(list(guest.handles)))


@operation(8)
def read(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    size = guest.size()
    room = size + 16 if guest.rng.random() < 0.9 else guest.rng.choice((16, 100, 3 << 20))
    guest.send(Opcode.READ, nodeid, fuse.READ_IN.pack(fh, guest.offset(), size, 0, 0, 0), room=room)


@operation(1)
def giant_read(guest: Guest) -> None:
    """Room for megabytes; the request is padded so that it gets a large slot."""
    nodeid, fh = guest.handle()
    body = fuse.READ_IN.pack(fh, 0, guest.rng.choice(SIZES[-5:]), 0, 0, 0).ljust(9000, b"\0")
    guest.send(Opcode.READ, nodeid, body, room=3 << 20)


@operation(8)
def write(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    size = guest.rng.choice((0, 1, 100, 4096, 65536, 131072, 250_000))
    claimed = size if guest.rng.random() < 0.95 else guest.rng.choice(SIZES)
    body = fuse.WRITE_IN.pack(fh, guest.offset(), claimed, guest.rng.choice((0, 0, 4)), 0, 0)
    guest.send(Opcode.WRITE, nodeid, body + bytes(size))


@operation(2)
def flush(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    guest.send(Opcode.FLUSH, nodeid, fuse.FLUSH_IN.pack(fh, guest.number()))


@operation(1)
def fsync(guest: Guest) -> None:
    directory = guest.rng.random() < 0.3
    nodeid, fh = guest.handle(directory=directory)
    opcode = Opcode.FSYNCDIR if directory else Opcode.FSYNC
    guest.send(opcode, nodeid, fuse.FSYNC_IN.pack(fh, guest.rng.choice((0, 1))))


@operation(0.3)
def syncfs(guest: Guest) -> None:
    guest.send(Opcode.SYNCFS, 1, bytes(8))


@operation(2)
def fallocate(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    length = guest.rng.choice((1, 4096, 1 << 20, 1 << 26, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
    mode = guest.rng.choice((0, 1, 3, 0x10, 0x11, 8, 0xFF))
    body = fuse.FALLOCATE_IN.pack(fh, guest.offset(), length, mode)
    guest.send(Opcode.FALLOCATE, nodeid, body)


@operation(2)
def lseek(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    whence = guest.rng.choice((os.SEEK_DATA, os.SEEK_HOLE, 0, 9))
    guest.send(Opcode.LSEEK, nodeid, fuse.LSEEK_IN.pack(fh, guest.offset(), whence))


@operation(2)
def copy_file_range(guest: Guest) -> None:
    source, fh = guest.handle()
    target, fh_out = guest.handle()
    length = guest.rng.choice((1, 4096, 1 << 20, 1 << 26, 1 << 40, (1 << 64) - 1))
    body = fuse.COPY_FILE_RANGE_IN.pack(
        fh, guest.offset(), target, fh_out, guest.offset(), length, guest.rng.choice((0, 0, 1))
    )
    opcode = guest.rng.choice((Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64))
    guest.send(opcode, source, body)


@operation(3)
def ioctl(guest: Guest) -> None:
    nodeid, fh = guest.handle(directory=guest.rng.random() < 0.2)
    known = list(ioctls.FILES)
    command = guest.rng.choice(known) if guest.rng.random() < 0.8 else guest.number() & 0xFFFF_FFFF
    data = guest.rng.choice((bytes(8), struct.pack("q", 0x30), bytes(32), b""))
    sizes = [guest.rng.choice((len(data), 8, 28, 0xFFFF_FFFF)) for _ in range(2)]
    flags = guest.rng.choice((0, 0, 1, 2, 0x10))
    guest.send(Opcode.IOCTL, nodeid, fuse.IOCTL_IN.pack(fh, flags, command, 0, *sizes) + data)


@operation(2)
def poll(guest: Guest) -> None:
    nodeid, fh = guest.handle()
    guest.send(Opcode.POLL, nodeid, fuse.POLL_IN.pack(fh, 1, guest.rng.choice((0, 1)), 0xFFFF))


# Directories


@operation(5)
def opendir(guest: Guest) -> None:
    nodeid = guest.directory()
    then = guest.learn_handle(nodeid, directory=True)
    guest.send(Opcode.OPENDIR, nodeid, fuse.OPEN_IN.pack(os.O_RDONLY, 0), then)


def _readdir(guest: Guest, opcode: Opcode) -> None:
    nodeid, fh = guest.handle(directory=True)
    rng = guest.rng
    offset = guest.places.get(fh, 0) if rng.random() < 0.9 else guest.number()
    size = rng.choice((0, 24, 200, 4096, 32768, 65536, 1 << 20, 0xFFFF_FFFF))
    then: Then = guest.learn_listing(fh, plus=opcode == Opcode.READDIRPLUS)
    body = fuse.READ_IN.pack(fh, offset, size, 0, 0, 0)
    if rng.random() < 0.1:
        body = body.ljust(9000, b"\0")  # a large slot: room for megabytes
    guest.send(opcode, nodeid, body, then, room=min(size + 16, 3 << 20))


@operation(6)
def readdir(guest: Guest) -> None:
    _readdir(guest, Opcode.READDIR)


@operation(6)
def readdirplus(guest: Guest) -> None:
    _readdir(guest, Opcode.READDIRPLUS)


# Locks


def _lock(guest: Guest, opcode: Opcode) -> None:
    nodeid, fh = guest.handle()
    rng = guest.rng
    owner = rng.randrange(6) if rng.random() < 0.9 else guest.number()
    start = rng.choice((0, 0, 10, 1000)) if rng.random() < 0.95 else guest.number()
    end = rng.choice((start + 10, (1 << 63) - 1, start)) & (1 << 64) - 1
    kind = rng.choice((0, 1, 1, 2, 2)) if rng.random() < 0.98 else 77
    flags = rng.choice((0, 0, 1))
    body = fuse.LK_IN.pack(fh, owner, start, end, kind, guest.pid, flags)
    guest.send(opcode, nodeid, body, waits=opcode == Opcode.SETLKW)


@operation(2)
def getlk(guest: Guest) -> None:
    _lock(guest, Opcode.GETLK)


@operation(4)
def setlk(guest: Guest) -> None:
    _lock(guest, Opcode.SETLK)


@operation(3)
def setlkw(guest: Guest) -> None:
    _lock(guest, Opcode.SETLKW)


@operation(3)
def interrupt(guest: Guest) -> None:
    """Something that waits, or a number; on either queue."""
    waiting = list(guest.waiting)
    unique = guest.rng.choice(waiting) if waiting else guest.number()
    body = fuse.INTERRUPT_IN.pack(unique)
    guest.send(Opcode.INTERRUPT, 0, body, None, priority=guest.rng.random() < 0.8)


# Anything


@operation(1)
def unknown_request(guest: Guest) -> None:
    opcode = guest.rng.choice((0, 7, 19, 37, 41, 48, 49, 54, 4096, 0x1000_0000, 0xFFFF_FFFF))
    guest.send(opcode, guest.node(), guest.rng.randbytes(guest.rng.randrange(200)))


@operation(2)
def torn_request(guest: Guest) -> None:
    """A known opcode with a body that is too short, too long, or noise."""
    opcode = guest.rng.choice([o for o in Opcode if o not in (Opcode.DESTROY, Opcode.INIT)])
    names = guest.rng.choice(NAMES) + b"\0"
    noise = guest.rng.randbytes(guest.rng.randrange(120))
    guest.send(opcode, guest.node(), guest.rng.choice((noise, names, noise + names, bytes(64))))
