"""A hostile guest for tests: an export to attack with secrets beside it, and bent requests."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import stat
import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from fsd.fuse.operations import Operations
from fsd.fuse.session import SessionOptions
from fsd.linux import ioctls
from protocol import fuse
from protocol.fuse import Opcode

from .fuse_guest import GuestKernel, split
from .support import World

SECRET = b"what no guest may see: 6f1d2c"
FILE_SIZE = 1 << 22  # a fallocate must not fill the disk


class Target:
    """An export with something in it, secrets beside it, and a guest that has looked around."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.source = base / "source"
        self.source.mkdir()
        self.outside = base / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(SECRET)
        self._before = self._seen()
        self.privileges = _privileges()
        self.answers: Counter[tuple[int, int]] = Counter()
        self.world = World(self.source)
        self._operations: Operations | None = None
        self.refill()

    def refill(self) -> None:
        """A new guest and what it knows, as a fuzzed one may have lost it all."""
        self.leave()
        source = self.source
        _make_removable(source)
        os.chmod(source, 0o755)
        for path in source.iterdir():
            if not path.is_symlink() and path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name in ("dir", "dir2"):
            (source / name).mkdir()
        for name in ("f", "dir/g"):
            (source / name).write_bytes(b"data" * 500)
            with suppress(OSError):  # not every file system has them
                os.setxattr(source / name, "user.x", b"value")
        (source / "out").symlink_to("../outside")
        (source / "absolute").symlink_to(self.outside / "secret")
        self._operations = self.world.mount(agent=False)
        self.guest = GuestKernel(self._operations, SessionOptions(posix_acl=True))
        self.nodes = [1]
        self.handles: list[int] = []
        for name in os.listdir(source):
            try:
                node = self.guest.lookup(os.fsencode(name)).nodeid
                self.nodes.append(node)
                self.handles.append(self.guest.open(node))
            except AssertionError:  # not every kind of file can be opened
                continue
        opened = self.guest.ok(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0))
        self.handles.append(fuse.OPEN_OUT.unpack(opened)[0])

    def leave(self) -> None:
        """The guest goes, and nothing that it held is left."""
        operations, self._operations = self._operations, None
        if operations is None:
            return
        self.guest.session.close()
        self.guest.loop.run_threads()  # they end by themselves, and close what they had
        self.world.services.remove(operations)
        operations.close()
        self.world.export.remove_guest(operations.guest)
        held = self.world.table._by_node.values()
        assert [inode.nodeid for inode in held if inode.lookups] == []
        handles = [os.readlink(f"/proc/self/fd/{fd}") for fd in _open_below(self.source)]
        assert handles == [], "left open"

    def _seen(self) -> object:
        secret = self.outside / "secret"
        seen = [(os.lstat(path), path.name) for path in (self.outside, secret)]
        return (
            sorted(os.listdir(self.base)),
            os.listdir(self.outside),
            secret.read_bytes(),
            [(s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns, s.st_ctime_ns, n)
             for s, n in seen],
        )  # fmt: skip

    def check(self) -> None:
        """Nothing beside the export has changed."""
        assert self._seen() == self._before

    def serve(self, message: bytes, room: int, cut: list[int]) -> None:
        """Send a message, and check the answer."""
        lengths: list[int] = []
        buffer = bytearray(room)
        readable = split(memoryview(message), cut)
        writable = split(memoryview(buffer), cut)
        session = self.guest.session
        with structlog.testing.capture_logs() as logs:
            session.serve(readable, writable, lengths.append)
            self.guest.loop.turn()
            if not lengths:  # it waits, and is answered in the end
                self.guest.loop.expire()
        assert "request failed" not in [line["event"] for line in logs], logs  # a bug in fsd
        assert len(lengths) <= 1
        assert _privileges() == self.privileges
        assert SECRET not in bytes(buffer)
        if lengths and lengths[0]:
            length, error, _ = fuse.OUT_HEADER.unpack(bytes(buffer))
            self.answers[int.from_bytes(message[4:8], "little"), -error] += 1
            assert length == lengths[0] <= room
            assert -512 < error <= 0
            assert not error or length == 16

    def close(self) -> None:
        self.check()
        self.leave()
        self.world.close()


def _open_below(top: Path) -> list[int]:
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the listing's own
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{top}/"):
                found.append(fd)
    return found


def _privileges() -> list[str]:
    """What a request may lower for its own time only."""
    keys = ("Uid:", "Gid:", "Groups:", "CapEff:", "Umask:")
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return [line for line in lines if line.startswith(keys)]


def _make_removable(top: Path) -> None:
    """A fuzzed ioctl may have made something immutable."""
    for _, _, files, fd in os.fwalk(top, follow_symlinks=False):
        _clear_flags(fd)
        for name in files:
            if stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                file_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
                _clear_flags(file_fd)
                os.close(file_fd)


def _clear_flags(fd: int) -> None:
    with suppress(OSError):
        (flags,) = struct.unpack("q", fcntl.ioctl(fd, 0x8008_6601, bytes(8)))  # FS_IOC_GETFLAGS
        fcntl.ioctl(fd, 0x4008_6602, struct.pack("q", flags & ~0x30))  # immutable, append-only


NUMBERS = (
    *range(8), 0xFFFF_FFFF, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
    4096, 1 << 20, 0o100644, 0o40755, 0o20666, 0o60666, 0o10600, 0o107777, os.O_TMPFILE,
    os.O_RDWR | os.O_CREAT, os.O_TRUNC | os.O_WRONLY, *ioctls.FILES,
)  # fmt: skip
GOOD_NAMES = (b"f", b"dir", b"dir2", b"new", b"new2", b"out", b"absolute", b"user.x", b"g")
BAD_NAMES = (
    b"", b".", b"..", b"../outside", b"../outside/secret", b"/etc/passwd", b"dir/g", b"/",
    b"x" * 255, b"x" * 256, b"x" * 5000, b".fsd", b"control", b"security.capability",
    b"system.posix_acl_access", b"\xff\xfe", b"dir/../../outside/secret",
)  # fmt: skip
INPUTS: dict[Opcode, fuse.Wire[object] | None] = {
    opcode: getattr(fuse, f"{opcode.name}_IN", None) for opcode in Opcode
} | {
    Opcode.READDIR: fuse.READ_IN,
    Opcode.READDIRPLUS: fuse.READ_IN,
    Opcode.OPENDIR: fuse.OPEN_IN,
    Opcode.RELEASEDIR: fuse.RELEASE_IN,
    Opcode.FSYNCDIR: fuse.FSYNC_IN,
    Opcode.TMPFILE: fuse.CREATE_IN,
    Opcode.GETLK: fuse.LK_IN,
    Opcode.SETLK: fuse.LK_IN,
    Opcode.SETLKW: fuse.LK_IN,
    Opcode.COPY_FILE_RANGE_64: fuse.COPY_FILE_RANGE_IN,
    Opcode.LISTXATTR: fuse.GETXATTR_IN,
}


NAME_COUNT = {
    Opcode.SYMLINK: 2, Opcode.RENAME: 2, Opcode.RENAME2: 2, Opcode.LOOKUP: 1, Opcode.MKNOD: 1,
    Opcode.MKDIR: 1, Opcode.UNLINK: 1, Opcode.RMDIR: 1, Opcode.LINK: 1, Opcode.CREATE: 1,
    Opcode.TMPFILE: 1, Opcode.SETXATTR: 1, Opcode.GETXATTR: 1, Opcode.REMOVEXATTR: 1,
}  # fmt: skip


OPCODES = [opcode for opcode in Opcode if opcode not in (Opcode.DESTROY, Opcode.SYNCFS)]
"""SYNCFS waits for what the whole machine has written, and says nothing about us."""


class Bent(NamedTuple):
    """A request of which parts are as they should be, and parts are not."""

    opcode: Opcode
    node: int  # index; beyond the known ones a number made up
    handle: int  # index of a handle for the first field; negative: not one
    numbers: list[int]
    rest: bytes
    lie: int
    extensions: int
    uid: int

    def message(self, target: Target) -> bytes:
        """Its bytes, with nodes and handles that the guest has."""
        numbers = list(self.numbers)
        if self.handle >= 0 and target.handles:
            numbers[0] = target.handles[self.handle % len(target.handles)]
        if self.opcode in (Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64) and target.handles:
            numbers[2] = target.nodes[-1]
            numbers[3] = target.handles[0]
        if self.opcode in (Opcode.RENAME, Opcode.RENAME2, Opcode.LINK):
            numbers[0] = target.nodes[self.handle % len(target.nodes)]
        layout = INPUTS[self.opcode]
        words = b"".join((number & (1 << 64) - 1).to_bytes(8, "little") for number in numbers)
        body = (words[: layout.size] if layout is not None else b"") + self.rest
        known = self.node < len(target.nodes)
        nodeid = target.nodes[self.node] if known else self.numbers[1] & (1 << 64) - 1
        length = max(0, 40 + len(body) + self.lie)
        return (
            fuse.IN_HEADER.pack(
                length, self.opcode, 99, nodeid, self.uid, self.uid, 1, self.extensions
            )
            + body
        )


def bent(rng: random.Random) -> Bent:
    """A request of which most is as it should be. From a seed, and not drawn by Hypothesis: of its
    own many small choices hardly one request in a hundred would be whole.
    """

    def seldom(usual: int, *others: int) -> int:
        return usual if rng.random() < 0.95 else rng.choice(others)

    opcode = rng.choice(OPCODES)
    count = NAME_COUNT.get(opcode, 0) if rng.random() < 0.95 else rng.randrange(4)
    names = (rng.choice(GOOD_NAMES if rng.random() < 0.8 else BAD_NAMES) for _ in range(count))
    numbers = [rng.choice(NUMBERS) for _ in range(16)]
    if rng.random() < 0.6:  # small numbers mean something, mostly
        numbers = [rng.choice((0, 0, 1, 2, 3, 8)) for _ in range(16)]
    if opcode == Opcode.IOCTL:
        numbers[1] = rng.choice(list(ioctls.FILES)) << 32
    return Bent(
        opcode,
        rng.randrange(9),
        rng.randrange(-1, 9),
        numbers,
        b"".join(name + b"\0" for name in names) + rng.choice((b"", b"", b"x", bytes(64))),
        seldom(0, -1, 1, -40, 1 << 20),
        seldom(0, 1, 2, 65535),
        seldom(0, 54321, 0xFFFF_FFFF),
    )
