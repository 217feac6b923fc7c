"""What a guest may not be given: rights that the host would not give to the caller."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fsd.fuse.session import SessionOptions
from fsd.linux import credentials, ioctls
from fsd.process.sandbox import CAPABILITIES
from protocol import frames, fuse
from protocol.fuse import Fattr, Opcode

from .fuse_guest import GuestKernel, entry_of
from .support import ALL, World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as others")
USER, UNMAPPED = 1000, 100_000
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, 7, ~0 & 0xFFFFFFFF) for tag in (1, 4, 32)
)
"""u::rwx g::rwx o::rwx (linux/posix_acl_xattr.h)."""


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL of tags, modes and uids (linux/posix_acl_xattr.h)."""
    packed = (struct.pack("<HHI", tag, mode, uid & 0xFFFF_FFFF) for tag, mode, uid in entries)
    return struct.pack("<I", 2) + b"".join(packed)


EVERYBODY = acl((1, 7, -1), (4, 7, -1), (32, 7, -1))
NAMED = acl((1, 6, -1), (2, 4, USER), (4, 4, -1), (16, 4, -1), (32, 0, -1))
"""With an entry that no mode can say."""


@contextmanager
def kernel_of(
    world: World, options: SessionOptions | None = None, *, uid: int = USER
) -> Iterator[GuestKernel]:
    """The kernel of a guest in which ``uid`` asks."""
    guest = GuestKernel(world.mount(agent=False), options)
    guest.uid = guest.gid = uid
    yield guest
    guest.session.close()


def in_child(work: Callable[[], None], before: Callable[[int], None] | None = None) -> None:
    """Run ``work`` in a process of its own, whose privileges it may spend. ``before`` is called
    here with the child's number, once the child is in a user namespace of its own.
    """
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            if before is not None:
                assert not ctypes.CDLL(None, use_errno=True).unshare(0x1000_0000)  # CLONE_NEWUSER
                os.write(ready[1], b"\0")
                assert os.read(go[0], 1)
            for known in (
                credentials._is_root,
                credentials._capabilities,
                credentials._effective,
                credentials._overflow_gid,
            ):
                known.cache_clear()  # what the process of the tests may do
            work()
        except BaseException:  # noqa: BLE001 - the child ends here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if before is not None:
        os.read(ready[0], 1)
        before(child)
        os.write(go[1], b"\0")
    for fd in (*ready, *go):
        os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Extended attributes


def setxattr(guest: GuestKernel, nodeid: int, name: bytes, value: bytes) -> int:
    """SETXATTR; returns the error."""
    body = fuse.SETXATTR_IN.pack(len(value), 0, 0) + name + b"\0" + value
    return guest.ask(Opcode.SETXATTR, nodeid, body).error


@pytest.mark.parametrize("agreed", [False, True])
def test_acls_are_for_kernels_that_mind_them(tmp_path: Path, agreed: bool) -> None:
    """Where it was not agreed that the guest's kernel judges ACLs, it asks for them on anybody's
    behalf: they would be the server's.
    """
    (tmp_path / "secret").touch(0o600)
    (tmp_path / "known").touch(0o640)
    os.setxattr(tmp_path / "known", "system.posix_acl_access", NAMED)
    world = World(tmp_path)
    with kernel_of(world, SessionOptions(posix_acl=agreed)) as guest:
        secret, known = guest.lookup(b"secret").nodeid, guest.lookup(b"known").nodeid
        for name in (b"system.posix_acl_access", b"system.nfs4_acl", b"system.richacl"):
            error = setxattr(guest, secret, name, EVERYBODY)
            asked = fuse.GETXATTR_IN.pack(4096) + name + b"\0"
            got = guest.ask(Opcode.GETXATTR, known, asked).error
            removed = guest.ask(Opcode.REMOVEXATTR, known, name + b"\0").error
            if agreed and name == b"system.posix_acl_access":
                assert (error, got, removed) == (0, 0, 0)
                os.setxattr(tmp_path / "known", "system.posix_acl_access", NAMED)
            else:
                assert {error, got, removed} == {errno.EOPNOTSUPP}, name
        assert setxattr(guest, known, b"user.any", b"x") == 0
        listed = guest.ok(Opcode.LISTXATTR, known, fuse.GETXATTR_IN.pack(4096)).split(b"\0")
        assert (b"system.posix_acl_access" in listed) is agreed
        assert b"user.any" in listed
    mode = stat.S_IMODE((tmp_path / "secret").stat().st_mode)
    assert mode == (0o777 if agreed else 0o600)
    world.close()


# Users that the server's user namespace does not map

MAKING = {
    "create": (Opcode.CREATE, fuse.CREATE_IN.pack(os.O_RDWR, 0o104755, 0, 0) + b"n\0"),
    "tmpfile": (Opcode.TMPFILE, fuse.CREATE_IN.pack(os.O_RDWR, 0o104755, 0, 0) + b"n\0"),
    "mknod": (Opcode.MKNOD, fuse.MKNOD_IN.pack(0o104755, 0, 0) + b"n\0"),
    "fifo": (Opcode.MKNOD, fuse.MKNOD_IN.pack(stat.S_IFIFO | 0o644, 0, 0) + b"n\0"),
    "mkdir": (Opcode.MKDIR, fuse.MKDIR_IN.pack(0o2755, 0) + b"n\0"),
    "symlink": (Opcode.SYMLINK, b"n\0target\0"),
}
NUMBERS = {
    "uid": (UNMAPPED, 0, ()),
    "gid": (0, UNMAPPED, ()),
    "group": (USER, USER, (UNMAPPED,)),
    "none": (0xFFFF_FFFF, 0, ()),
    "no gid": (USER, 0xFFFF_FFFF, ()),
}


def _map(child: int) -> None:
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text("0 0 65536")


def test_users_who_are_not_mapped_make_nothing(tmp_path: Path) -> None:
    """setfsuid(2) says nothing, and leaves the server root."""
    (tmp_path / "mine").touch()
    os.chmod(tmp_path, 0o777)

    def work() -> None:
        world = World(tmp_path)
        before = Path("/proc/thread-self/status").read_text().split("Cpus_allowed")[0]
        with kernel_of(world) as guest:
            for case, (uid, gid, groups) in NUMBERS.items():
                ext = _supplementary(groups)
                for name, (opcode, body) in MAKING.items():
                    guest.uid, guest.gid = uid, gid
                    error = guest.ask(opcode, 1, body, ext=ext).error
                    assert error == errno.EOVERFLOW, (case, name, error)
            guest.uid = guest.gid = 0
            node = guest.lookup(b"mine").nodeid
            for field in (Fattr.UID, Fattr.GID):
                for number, expected in ((UNMAPPED, errno.EINVAL), (2**32 - 1, errno.EOVERFLOW)):
                    asked = fuse.SETATTR_IN.pack(int(field), *(0,) * 10, number, number)
                    assert guest.ask(Opcode.SETATTR, node, asked).error == expected
            fh = guest.open(node)
            guest.uid = 0xFFFF_FFFF  # blocks of nobody's
            body = fuse.WRITE_IN.pack(fh, 0, 1, 0, 0, 0) + b"x"
            assert guest.ask(Opcode.WRITE, node, body).error == errno.EOVERFLOW
            guest.uid = guest.gid = USER
            guest.create(b"fine")
        after = Path("/proc/thread-self/status").read_text().split("Cpus_allowed")[0]
        assert _identity(after) == _identity(before)
        world.close()

    in_child(work, _map)
    assert sorted(os.listdir(tmp_path)) == ["fine", "mine"]
    assert (tmp_path / "fine").stat().st_uid == USER


def _identity(status: str) -> list[str]:
    wanted = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "Umask")
    return [line for line in status.splitlines() if line.startswith(wanted)]


def _supplementary(groups: tuple[int, ...]) -> bytes:
    """struct fuse_ext_header and fuse_supp_groups, FUSE_EXT_GROUPS."""
    if not groups:
        return b""
    data = struct.pack(f"<I{len(groups)}I", len(groups), *groups)
    size = 8 + len(data) + 7 & ~7
    return (struct.pack("<II", size, 32) + data).ljust(size, b"\0")


OTHER_MACHINE = """
import os, sys
name = os.uname()
os.uname = lambda: os.uname_result((*name[:4], "sparc64"))
from fsd.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["mount", "virtiofs"])
def test_root_does_not_start_where_it_cannot_act_as_others(tmp_path: Path, command: str) -> None:
    for name in ("source", "mount"):
        (tmp_path / name).mkdir()
    arguments = [str(tmp_path / "source"), str(tmp_path / "mount")]
    if command == "virtiofs":
        arguments = [f"--shared-dir={tmp_path / 'source'}", f"--socket-path={tmp_path / 'socket'}"]
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MACHINE, command, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "setfsuid" in line
    assert "sparc64" in line
    assert "as an ordinary user" in line


# suid and sgid bits (FUSE_HANDLE_KILLPRIV_V2)


def _truncating_open(guest: GuestKernel, node: int, kill: int) -> None:
    asked = fuse.OPEN_IN.pack(os.O_WRONLY | os.O_TRUNC, kill and fuse.OPEN_KILL_SUIDGID)
    guest.ok(Opcode.OPEN, node, asked)


def _truncating_create(guest: GuestKernel, node: int, kill: int) -> None:
    flags = kill and fuse.OPEN_KILL_SUIDGID
    body = fuse.CREATE_IN.pack(os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, 0, flags)
    guest.ok(Opcode.CREATE, 1, body + b"tool\0")


def _truncate(guest: GuestKernel, node: int, kill: int) -> None:
    valid = int(Fattr.SIZE) | (int(Fattr.KILL_SUIDGID) if kill else 0)
    asked = guest.begin(Opcode.SETATTR, node, fuse.SETATTR_IN.pack(valid, *(0,) * 12))
    guest.loop.run_threads()  # somebody might have a lease
    guest.loop.turn()
    reply = asked.reply()
    assert reply is not None
    assert not reply.error


def _write(guest: GuestKernel, node: int, kill: int) -> None:
    fh = guest.open(node)
    flags = kill and fuse.WRITE_KILL_SUIDGID
    guest.ok(Opcode.WRITE, node, fuse.WRITE_IN.pack(fh, 0, 1, flags, 0, 0) + b"x")


def _fallocate(guest: GuestKernel, node: int, kill: int) -> None:
    fh = guest.open(node)
    guest.ok(Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.pack(fh, 0, 8192, 0))


def _copy(guest: GuestKernel, node: int, kill: int) -> None:
    source = guest.lookup(b"source").nodeid
    fh_in, fh_out = guest.open(source), guest.open(node)
    asked = fuse.COPY_FILE_RANGE_IN.pack(fh_in, 0, node, fh_out, 0, 4, 0)
    guest.ok(Opcode.COPY_FILE_RANGE, source, asked)


CHANGES = (_truncating_open, _truncating_create, _truncate, _write, _fallocate, _copy)


@pytest.mark.parametrize("change", CHANGES)
def test_changing_a_file_clears_its_suid_bits(
    tmp_path: Path, change: Callable[[GuestKernel, int, int], None]
) -> None:
    """Unless it has CAP_FSETID, as the guest's kernel says for root; anybody else has not."""
    tool = tmp_path / "tool"
    tool.touch()
    (tmp_path / "source").write_text("data")
    for name in ("tool", "source"):
        os.chmod(tmp_path / name, 0o666)
    world = World(tmp_path)
    killed = {(0, True): change not in (_fallocate, _copy), (0, False): False}
    if change is _truncate:  # the guest's kernel always says
        killed[USER, False] = False
    with kernel_of(world) as guest:
        node = guest.lookup(b"tool").nodeid
        for uid in (0, USER):
            for kill in (True, False):
                guest.uid = guest.gid = uid
                os.chmod(tool, 0o6777)
                change(guest, node, int(kill))
                expected = 0o777 if killed.get((uid, kill), True) else 0o6777
                assert stat.S_IMODE(tool.stat().st_mode) == expected, (uid, kill)
    world.close()


def test_a_change_of_nothing_takes_suid_bits_of_ones_own(tmp_path: Path) -> None:
    """What a kernel asks for upon chown(-1, -1), by whomever."""
    tool = tmp_path / "tool"
    tool.touch()
    os.chown(tool, USER, USER)
    world = World(tmp_path)
    with kernel_of(world) as guest:
        node = guest.lookup(b"tool").nodeid
        for uid, mode, expected in (
            (USER + 1, 0o6755, 0o6755), (USER, 0o6755, 0o755), (0, 0o4644, 0o644),
            (USER, 0o2644, 0o2644), (USER, 0o644, 0o644),
        ):  # fmt: skip
            os.chmod(tool, mode)
            before = tool.stat().st_ctime_ns
            guest.uid = uid
            guest.ok(Opcode.SETATTR, node, fuse.SETATTR_IN.pack(*(0,) * 13))
            assert stat.S_IMODE(tool.stat().st_mode) == expected
            assert (tool.stat().st_ctime_ns != before) is (mode != expected)
    world.close()


# What the host gives to users: blocks of its disks, projects


@contextmanager
def disk(top: Path, kind: str, mebibytes: int, *options: str) -> Iterator[Path]:
    """A new file system, mounted."""
    image, point = top / "image", top / "disk"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run([f"mkfs.{kind}", "-q", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        os.chmod(point, 0o777)
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True)


def _filled_by_writes(guest: GuestKernel, number: int) -> int:
    node, fh = guest.create(b"w%d" % number)
    body = fuse.WRITE_IN.pack(fh, 0, 32768, 0, 0, 0) + bytes(32768)
    return guest.ask(Opcode.WRITE, node.nodeid, body).error


def _filled_by_writeback(guest: GuestKernel, number: int) -> int:
    node, fh = guest.create(b"w%d" % number)
    body = fuse.WRITE_IN.pack(fh, 0, 32768, fuse.WRITE_CACHE, 0, 0) + bytes(32768)
    uid, pid = guest.uid, guest.pid
    guest.uid = guest.gid = guest.pid = 0  # no process asks
    error = guest.ask(Opcode.WRITE, node.nodeid, body).error
    guest.uid = guest.gid = uid
    guest.pid = pid
    return error


def _filled_by_fallocate(guest: GuestKernel, number: int) -> int:
    node, fh = guest.create(b"w%d" % number)
    return guest.ask(Opcode.FALLOCATE, node.nodeid, fuse.FALLOCATE_IN.pack(fh, 0, 32768, 0)).error


def _filled_by_attributes(guest: GuestKernel, number: int) -> int:
    node, _ = guest.create(b"w%d" % number)
    return setxattr(guest, node.nodeid, b"user.x", b"%04d" % number * 800)


def _filled_by_links(guest: GuestKernel, number: int) -> int:
    node = guest.lookup(b"linked").nodeid
    for part in range(64):
        name = b"%04d-%02d" % (number, part)
        body = fuse.LINK_IN.pack(node) + name.ljust(250, b"l") + b"\0"
        error = guest.ask(Opcode.LINK, 1, body).error
        if error:
            break
    return error


@pytest.mark.parametrize(
    "fill",
    [
        _filled_by_writes,
        _filled_by_writeback,
        _filled_by_fallocate,
        _filled_by_attributes,
        _filled_by_links,
    ],
)
def test_users_do_not_get_what_is_reserved_for_root(
    tmp_path: Path, fill: Callable[[GuestKernel, int], int]
) -> None:
    def work() -> None:
        credentials.obey_limits_of_disks()
        world = World(point)
        with kernel_of(world) as guest:
            guest.create(b"linked")
            numbers = iter(range(4096))
            while not (error := fill(guest, next(numbers))):
                pass
            assert error == errno.ENOSPC
            left = os.statvfs(point)
            assert left.f_bfree * left.f_frsize > 1 << 20  # of 2 MiB, some for metadata
            guest.uid = guest.gid = 0
            assert _filled_by_writes(guest, 9999) == 0, "root has it"
        world.close()

    with disk(tmp_path, "ext4", 8, "-m", "25", "-N", "4096", "-O", "^has_journal") as point:
        in_child(work)


def test_limits_of_disks_are_obeyed_for_good() -> None:
    """CAP_SYS_RESOURCE, with which quotas do not hold, is in no set of the server's any more."""

    def work() -> None:
        bit = 1 << CAPABILITIES.index("SYS_RESOURCE")
        for has in (True, False):
            status = Path("/proc/thread-self/status").read_text()
            sets = [line.split() for line in status.splitlines() if line.startswith("Cap")]
            held = {name: int(value, 16) & bit for name, value in sets}
            assert bool(held["CapEff:"]) is bool(held["CapPrm:"]) is has
            credentials.obey_limits_of_disks()
            with credentials.on_behalf_of(USER, kill_suid=False):
                pass

    in_child(work, _map)


def test_a_guest_does_not_leave_its_project(tmp_path: Path) -> None:
    """By which the host limits the share as a whole, as container runtimes do."""
    with disk(tmp_path, "xfs", 320) as point:
        share = point / "share"
        share.mkdir()
        os.chmod(share, 0o777)
        subprocess.run(["chattr", "-p", "77", "+P", share], check=True)
        world = World(share)
        with kernel_of(world) as guest:
            node, fh = guest.create(b"f")
            top = fuse.OPEN_OUT.unpack(guest.ok(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0)))[0]

            def ioctl(fh: int, nodeid: int, command: int, data: bytes) -> tuple[int, bytes]:
                asked = fuse.IOCTL_IN.pack(fh, 0, command, 0, len(data), len(data)) + data
                reply = guest.ask(Opcode.IOCTL, nodeid, asked)
                return reply.error, reply.payload[16:]

            for uid in (0, USER):
                guest.uid = guest.gid = uid
                error, now = ioctl(fh, node.nodeid, ioctls.FSGETXATTR, bytes(28))
                assert error == 0
                xflags, extsize, extents, project, cow = struct.unpack("=5I8x", now)
                assert project == 77
                for bent in (
                    (xflags, extsize, extents, 0, cow),
                    (xflags | 0x200, extsize, extents, project, cow),
                    (xflags | 0x800, 1 << 20, extents, project, cow),
                ):
                    data = struct.pack("=5I8x", *bent)
                    assert ioctl(fh, node.nodeid, ioctls.FSSETXATTR, data)[0] == errno.EPERM
                error, now = ioctl(top, 1, ioctls.GETFLAGS, bytes(8))
                (flags,) = struct.unpack("=Q", now)
                assert flags & 0x2000_0000, "PROJINHERIT"
                data = struct.pack("=Q", flags & ~0x2000_0000)
                assert ioctl(top, 1, ioctls.SETFLAGS, data)[0] == errno.EPERM
            guest.uid = guest.gid = USER
            data = struct.pack("=5I8x", xflags | 0x80, extsize, extents, project, cow)
            assert ioctl(fh, node.nodeid, ioctls.FSSETXATTR, data)[0] == 0  # NODUMP
            data = struct.pack("=5I8x", xflags | 0x08, extsize, extents, project, cow)
            assert ioctl(fh, node.nodeid, ioctls.FSSETXATTR, data)[0] == errno.EPERM  # IMMUTABLE
        world.close()


# Locks


def test_a_read_only_share_gives_no_locks_for_writing(tmp_path: Path) -> None:
    """With which a guest would keep out the host's own programs."""
    (tmp_path / "f").touch()
    world = World(tmp_path, read_only=True)
    with kernel_of(world) as guest:
        node = guest.lookup(b"f").nodeid
        fh = guest.open(node, os.O_RDONLY)

        def lock(kind: int, flags: int, opcode: int = Opcode.SETLK) -> int:
            asked = fuse.LK_IN.pack(fh, 5, 0, (1 << 63) - 1, kind, 1, flags)
            return guest.ask(opcode, node, asked).error

        for opcode in (Opcode.SETLK, Opcode.SETLKW):
            assert lock(fcntl.F_WRLCK, fuse.LK_FLOCK, opcode) == errno.EROFS
            assert lock(fcntl.F_WRLCK, 0, opcode) == errno.EBADF
        with open(tmp_path / "f", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for flags in (fuse.LK_FLOCK, 0):  # to read, as natively
            assert lock(fcntl.F_RDLCK, flags) == 0
            assert lock(fcntl.F_UNLCK, flags) == 0
    world.close()


def test_a_file_open_for_reading_gives_no_write_lock(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    world = World(tmp_path)
    with kernel_of(world) as guest:
        node = guest.lookup(b"f").nodeid
        for mode, error in ((os.O_RDONLY, errno.EBADF), (os.O_RDWR, 0)):
            asked = (guest.open(node, mode), 5, 0, 9, fcntl.F_WRLCK, 1, 0)
            assert guest.ask(Opcode.SETLK, node, fuse.LK_IN.pack(*asked)).error == error
    world.close()


# The hidden directory


@pytest.mark.parametrize("local", [False, True])
def test_the_servers_own_user_is_known_on_this_machine_alone(local: bool) -> None:
    """A machine's user with the same number is somebody else."""

    def work() -> None:
        os.setgroups([])
        os.setgid(USER)
        os.setuid(USER)
        credentials._is_root.cache_clear()
        credentials._capabilities.cache_clear()
        credentials._effective.cache_clear()
        world = World(source)
        guest = GuestKernel(world.mount(agent=False, local=local))
        for uid, sees in ((0, True), (USER, local), (USER + 1, False)):
            guest.uid = uid
            answer = guest.ask(Opcode.LOOKUP, 1, frames.FSD_NAME + b"\0")
            assert answer.error == (0 if sees else errno.ENOENT), uid
            if sees:
                top = entry_of(answer.payload).nodeid
                assert (guest.ask(Opcode.OPENDIR, top, fuse.OPEN_IN.pack(0, 0)).error) == 0
        guest.session.close()
        world.close()

    with TemporaryDirectory(prefix="fsd-user-") as source_name:  # pytest's own are root's alone
        source = Path(source_name)
        os.chown(source, USER, USER)
        in_child(work)


# Marks set by hand


def test_marks_by_hand_are_each_machines_own(tmp_path: Path) -> None:
    for name in ("a", "b", "host"):
        (tmp_path / name).mkdir()
    world = World(tmp_path)
    one, two = world.mount("one"), world.mount("two")
    local = world.mount("local", local=True)
    export = world.export
    mine, theirs, hosts = (export.hand_marks(s.guest if s else None) for s in (one, two, None))
    assert len({mine, theirs, hosts}) == 3
    assert export.hand_marks(local.guest) is hosts
    assert export.hand_marks(one.guest) is mine
    a, b = world.mark(mine, "a", ALL), world.mark(theirs, "b", ALL)
    kept = world.mark(hosts, "host", ALL)
    export.update(mine, b.key, 0)  # what another machine has set
    assert export.interest.of(theirs, b)
    session = GuestKernel(one).session
    assert mine not in export.guests, "a machine that starts anew"
    assert not world.host_mask(a)
    world.mark(export.hand_marks(one.guest), "a", ALL)
    session.close()
    assert not world.host_mask(a), "a machine that has gone"
    assert world.host_mask(b)
    export.remove_guest(two.guest)
    world.services.remove(two)
    assert not world.host_mask(b)
    assert world.host_mask(kept)
    assert hosts in export.guests
    world.close()
