"""The FUSE session on a real export: negotiation, what a guest may use, how it is asked."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsd.fuse.session import SessionOptions
from protocol import fuse
from protocol.frames import Op
from protocol.fuse import Init, Opcode
from protocol.masks import Mask

from .fuse_guest import ALL_FLAGS, GuestKernel, entry_of, flags_of
from .support import AGENT_PID, World

# INIT


@pytest.mark.parametrize(
    ("minor", "size", "agreed"),
    [(31, 16, 31), (32, 16, 32), (36, 64, 36), (38, 64, 38), (45, 64, 45), (99, 64, 45)],
)
def test_the_older_version_of_both_is_spoken(
    minor: int, size: int, agreed: int, world: World
) -> None:
    guest = GuestKernel(world.mount(agent=False), init=False)
    flags = ALL_FLAGS if size == 64 else ALL_FLAGS & 0x3FFF_FFFF
    error, payload = guest.init(7, minor, flags, size=size)
    assert not error
    assert len(payload) == 64
    assert fuse.INIT_OUT.unpack(payload)[:2] == (7, agreed)
    guest.session.close()


def test_a_newer_major_is_asked_to_come_again(world: World) -> None:
    guest = GuestKernel(world.mount(agent=False), init=False)
    error, payload = guest.init(8, 0)
    assert not error
    assert fuse.INIT_OUT.unpack(payload)[:2] == (7, 45)
    assert guest.ask(Opcode.STATFS).error == errno.EIO  # no version is agreed yet
    assert guest.init().error == 0


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (6, 99), (0, 0)])
def test_an_older_kernel_is_refused(major: int, minor: int, world: World) -> None:
    guest = GuestKernel(world.mount(agent=False), init=False)
    assert guest.init(major, minor).error == errno.EPROTO
    assert guest.ask(Opcode.GETATTR, 1, bytes(16)).error == errno.EIO


OPTIONAL = {
    "posix_acl": Init.POSIX_ACL,
    "submounts": Init.SUBMOUNTS,
    "locks": Init.POSIX_LOCKS | Init.FLOCK_LOCKS,
}


def test_only_what_both_know_is_agreed(world: World) -> None:
    guest = GuestKernel(world.mount(agent=False), init=False)
    assert flags_of(guest.init(flags=Init.BIG_WRITES)) == Init.BIG_WRITES
    agreed = flags_of(guest.init())
    assert not agreed & (Init.SPLICE_READ | Init.NO_OPEN_SUPPORT | Init.PASSTHROUGH)
    assert Init.DONT_MASK | Init.HANDLE_KILLPRIV_V2 | Init.CREATE_SUPP_GROUP in agreed
    # flags2 counts only where flags says that it is there
    low = flags_of(guest.init(flags=ALL_FLAGS & ~Init.INIT_EXT))
    assert low == agreed & 0xFFFF_FFFF & ~Init.INIT_EXT


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_option_is_offered_only_if_asked_for(name: str, world: World) -> None:
    for value in (False, True):
        options = SessionOptions(**{name: value})  # type: ignore[arg-type]
        agreed = flags_of(GuestKernel(world.mount(agent=False), options, init=False).init())
        assert bool(agreed & OPTIONAL[name]) is value
        assert Init.WRITEBACK_CACHE not in agreed


def test_nothing_before_init_and_nothing_unknown(world: World) -> None:
    guest = GuestKernel(world.mount(agent=False), init=False)
    for known in Opcode:
        if known != Opcode.INIT:
            assert guest.ask(known).error == errno.EIO
    guest.init()
    for opcode in (0, 7, 19, 37, 48, 49, 54, 4096, 1 << 31, fuse.Opcode.INIT << 24):
        assert guest.ask(opcode).error == errno.ENOSYS


@pytest.mark.parametrize("opcode", [Opcode.INIT, Opcode.DESTROY])
def test_a_guest_that_starts_anew_holds_nothing(opcode: Opcode, world: World) -> None:
    (world.source / "f").write_bytes(b"x")
    guest = GuestKernel(world.mount(agent=False))
    node = guest.lookup(b"f")
    fh = guest.open(node.nodeid)
    assert len(world.table) == 2
    if opcode == Opcode.INIT:
        guest.init()
    else:
        guest.ok(Opcode.DESTROY, 0)
        assert guest.ask(Opcode.STATFS).error == errno.EIO
        guest.init()
    assert len(world.table) == 1
    assert guest.ask(Opcode.GETATTR, node.nodeid, bytes(16)).error == errno.ESTALE
    body = fuse.READ_IN.pack(fh, 0, 10, 0, 0, 0)
    assert guest.ask(Opcode.READ, 1, body).error == errno.EBADF


# What a guest may use

WITH_NODE = sorted(
    set(Opcode)
    - {
        Opcode.INIT, Opcode.DESTROY, Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT,
        Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.SYNCFS, Opcode.BMAP, Opcode.NOTIFY_REPLY,
        Opcode.SETUPMAPPING, Opcode.REMOVEMAPPING,
    }
)  # fmt: skip


@pytest.mark.parametrize("opcode", WITH_NODE)
def test_a_guest_can_use_only_nodes_it_looked_up(
    opcode: Opcode, world: World, guest: GuestKernel, other: GuestKernel
) -> None:
    (world.source / "f").write_bytes(b"x")
    node = guest.lookup(b"f")
    for body in (b"", b"f\0", bytes(200)):
        assert other.ask(opcode, node.nodeid, body).error == errno.ESTALE
    guest.forget(node.nodeid, 1)
    assert guest.ask(opcode, node.nodeid, b"f\0").error == errno.ESTALE


def test_file_handles_outlive_the_guests_memory(
    world: World, guest: GuestKernel, other: GuestKernel
) -> None:
    """A guest's kernel asks for "." of a node that it has forgotten; of its own alone."""
    (world.source / "d").mkdir()
    node = guest.lookup(b"d")
    for name in (b".\0", b"..\0"):
        assert other.ask(Opcode.LOOKUP, node.nodeid, name).error == errno.ESTALE
    guest.forget(node.nodeid, 1)
    again = guest.lookup(b".", node.nodeid)
    assert (again.nodeid, again.generation) == (node.nodeid, node.generation)
    assert guest.lookup(b"..", node.nodeid).nodeid == 1
    guest.forget(node.nodeid, 1)
    for name in (b".\0", b"..\0"):
        assert other.ask(Opcode.LOOKUP, node.nodeid, name).error == errno.ESTALE
    (world.source / "d").rmdir()
    assert guest.ask(Opcode.LOOKUP, node.nodeid, b".\0").error == errno.ESTALE


def test_the_second_node_of_a_request_is_checked_too(
    world: World, guest: GuestKernel, other: GuestKernel
) -> None:
    (world.source / "d").mkdir()
    (world.source / "f").write_bytes(b"x")
    theirs = guest.lookup(b"d").nodeid, guest.lookup(b"f").nodeid
    _, fh = other.create(b"own")
    for opcode, body in (
        (Opcode.RENAME, fuse.RENAME_IN.pack(theirs[0]) + b"own\0own\0"),
        (Opcode.RENAME2, fuse.RENAME2_IN.pack(theirs[0], 0) + b"own\0own\0"),
        (Opcode.LINK, fuse.LINK_IN.pack(theirs[1]) + b"link\0"),
        (Opcode.COPY_FILE_RANGE, fuse.COPY_FILE_RANGE_IN.pack(fh, 0, theirs[1], fh, 0, 1, 0)),
    ):
        assert other.ask(opcode, 1, body).error == errno.ESTALE
    assert sorted(os.listdir(world.source)) == ["d", "f", "own"]


def test_a_guest_can_use_only_its_own_handles(
    world: World, guest: GuestKernel, other: GuestKernel
) -> None:
    node, fh = guest.create(b"f")
    guest.write(node.nodeid, fh, b"secret")
    mine = other.lookup(b"f").nodeid
    for opcode, body in (
        (Opcode.READ, fuse.READ_IN.pack(fh, 0, 10, 0, 0, 0)),
        (Opcode.WRITE, fuse.WRITE_IN.pack(fh, 0, 1, 0, 0, 0) + b"x"),
        (Opcode.FLUSH, fuse.FLUSH_IN.pack(fh, 0)),
        (Opcode.FSYNC, fuse.FSYNC_IN.pack(fh, 0)),
        (Opcode.FALLOCATE, fuse.FALLOCATE_IN.pack(fh, 0, 1, 0)),
        (Opcode.LSEEK, fuse.LSEEK_IN.pack(fh, 0, os.SEEK_DATA)),
        (Opcode.SETLK, fuse.LK_IN.pack(fh, 1, 0, 1, fcntl.F_WRLCK, 1, 0)),
        (Opcode.POLL, fuse.POLL_IN.pack(fh, 0, 0, 0)),
    ):
        assert other.ask(opcode, mine, body).error == errno.EBADF
    other.ok(Opcode.RELEASE, mine, fuse.RELEASE_IN.pack(fh, 0, 0, 0))  # of nothing
    assert guest.read(node.nodeid, fh) == b"secret"


def test_a_guest_forgets_only_what_it_holds(
    world: World, guest: GuestKernel, other: GuestKernel
) -> None:
    (world.source / "f").write_bytes(b"x")
    node = guest.lookup(b"f").nodeid
    assert other.lookup(b"f").nodeid == node
    other.lookup(b"f")
    inode = world.table.get(node)
    assert inode.lookups == 3
    other.forget(node, 1000)
    assert inode.lookups == 1
    other.forget(node, 1)
    body = fuse.BATCH_FORGET_IN.pack(2) + fuse.FORGET_ONE.pack(node, 7) + fuse.FORGET_ONE.pack(1, 7)
    assert other.begin(Opcode.BATCH_FORGET, 0, body, room=0).lengths == [0]
    assert inode.lookups == 1
    guest.ok(Opcode.GETATTR, node, bytes(16))
    guest.forget(node, 1)
    assert len(world.table) == 1


def test_a_guest_that_leaves_gives_back_everything(world: World) -> None:
    guest = GuestKernel(world.mount(agent=False))
    before = set(os.listdir("/proc/self/fd"))
    for i in range(20):
        (world.source / f"d{i}").mkdir()
        (world.source / f"d{i}" / "f").write_bytes(b"x")
        directory = guest.lookup(b"d%d" % i).nodeid
        guest.ok(Opcode.OPENDIR, directory, fuse.OPEN_IN.pack(0, 0))
        node = guest.lookup(b"f", directory).nodeid
        fh = guest.open(node)
        guest.ok(Opcode.SETLK, node, fuse.LK_IN.pack(fh, i, 0, 9, fcntl.F_WRLCK, 1, 0))
        guest.ok(Opcode.SETLK, node, fuse.LK_IN.pack(fh, i + 99, 10, 19, fcntl.F_WRLCK, 1, 0))
    assert len(world.table) == 41
    guest.session.close()
    assert len(world.table) == 1
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("reason", ["room", "withdrawn"])
def test_what_a_lost_reply_gave_is_taken_back(reason: str, world: World) -> None:
    (world.source / "f").write_bytes(b"x")
    (world.source / "d").mkdir()
    guest = GuestKernel(world.mount(agent=False))
    node = guest.lookup(b"f").nodeid
    before = set(os.listdir("/proc/self/fd"))
    flags = os.O_RDWR | os.O_CREAT
    for opcode, nodeid, body in (
        (Opcode.LOOKUP, 1, b"d\0"),
        (Opcode.OPEN, node, fuse.OPEN_IN.pack(os.O_RDWR, 0)),
        (Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0)),
        (Opcode.CREATE, 1, fuse.CREATE_IN.pack(flags, 0o644, 0, 0) + b"new\0"),
        (Opcode.TMPFILE, 1, fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + b"/\0"),
        (Opcode.MKDIR, 1, fuse.MKDIR_IN.pack(0o755, 0) + b"newdir\0"),
    ):
        if reason == "room":
            assert guest.ask(opcode, nodeid, body, room=17).error == errno.EIO
        else:
            guest.begin(opcode, nodeid, body, lost=True)
    assert len(world.table) == 2
    assert world.table.get(node).lookups == 1
    assert set(os.listdir("/proc/self/fd")) == before
    guest.session.close()


def test_a_withdrawn_listing_gives_its_nodes_back(world: World, guest: GuestKernel) -> None:
    for i in range(50):
        (world.source / f"f{i}").touch()
    fh = fuse.OPEN_OUT.unpack(guest.ok(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0)))[0]
    body = fuse.READ_IN.pack(fh, 0, 4096, 0, 0, 0)
    guest.begin(Opcode.READDIRPLUS, 1, body, lost=True)
    assert len(world.table) == 1
    guest.ok(Opcode.READDIRPLUS, 1, body)
    assert len(world.table) > 10


def test_the_number_of_nodes_is_limited(world: World) -> None:
    for i in range(20):
        (world.source / f"f{i:02}").touch()
    guest = GuestKernel(world.mount(agent=False), SessionOptions(nodes_limit=5))
    for i in range(5):
        guest.lookup(b"f%02d" % i)
    assert guest.ask(Opcode.LOOKUP, 1, b"f05\0").error == errno.ENFILE
    flags = os.O_RDWR | os.O_CREAT
    body = fuse.CREATE_IN.pack(flags, 0o644, 0, 0) + b"new\0"
    assert guest.ask(Opcode.CREATE, 1, body).error == errno.ENFILE
    assert not (world.source / "new").exists()
    # A listing continues, with names alone.
    fh = fuse.OPEN_OUT.unpack(guest.ok(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0)))[0]
    payload = guest.ok(Opcode.READDIRPLUS, 1, fuse.READ_IN.pack(fh, 0, ROOM_FOR_ALL, 0, 0, 0))
    assert {name for name, _, _ in plus_entries(payload)} >= {b"f%02d" % i for i in range(20)}
    assert len(guest.session.nodes) == 5
    guest.session.close()


ROOM_FOR_ALL = 1 << 15


def plus_entries(payload: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, nodeid, offset) of each fuse_direntplus."""
    at = 0
    while at < len(payload):
        nodeid = entry_of(payload[at:]).nodeid
        _ino, offset, length, _kind = fuse.DIRENT.unpack(payload, at + fuse.ENTRY_SIZE)
        name_at = at + fuse.ENTRY_SIZE + fuse.DIRENT.size
        yield payload[name_at : name_at + length], nodeid, offset
        at = name_at + length + 7 & ~7


# What must not be opened


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link", "directory"])
def test_only_regular_files_are_opened(kind: str, world: World, guest: GuestKernel) -> None:
    path = world.source / "x"
    expected = errno.ENXIO
    if kind == "fifo":
        os.mkfifo(path)  # to open it would wait for ever
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "device":
        if os.geteuid():
            pytest.skip("needs root: makes a device node")
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: the host's, not ours
    elif kind == "link":
        path.symlink_to("/etc/passwd")
        expected = errno.ELOOP
    else:
        path.mkdir()
        expected = errno.EISDIR
    node = guest.lookup(b"x").nodeid
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        assert guest.ask(Opcode.OPEN, node, fuse.OPEN_IN.pack(flags, 0)).error == expected
    body = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o600, 0, 0) + b"x\0"
    assert guest.ask(Opcode.CREATE, 1, body).error == expected


# Buffers

CUTS = st.lists(st.integers(0, 300), max_size=6)


@pytest.fixture(scope="module")
def shared_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestKernel]:
    source = tmp_path_factory.mktemp("buffers")
    (source / "f").write_bytes(bytes(range(256)) * 8)
    (source / "link").symlink_to("target")
    world = World(source)
    yield GuestKernel(world.mount(agent=False))
    world.close()


@given(cut=CUTS)
def test_how_buffers_are_cut_means_nothing(cut: list[int], shared_guest: GuestKernel) -> None:
    guest = shared_guest
    payload = guest.ok(Opcode.LOOKUP, 1, b"f\0", cut=cut)
    node = entry_of(payload).nodeid
    fh = guest.open(node)
    content = bytes(range(256)) * 8
    assert guest.read(node, fh, 100, 1500, cut=cut) == content[100:1600]
    assert guest.read(node, fh, 2000, 1500, cut=cut) == content[2000:]
    assert guest.write(node, fh, content[300:900], 300, cut=cut) == 600
    assert guest.read(node, fh) == content
    link = entry_of(guest.ok(Opcode.LOOKUP, 1, b"link\0", cut=cut)).nodeid
    assert guest.ok(Opcode.READLINK, link, cut=cut) == b"target"
    guest.release(node, fh)


def test_more_buffers_than_one_system_call_takes(guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    data = os.urandom(3000)
    cut = range(80, 3080)  # each byte in a buffer of its own
    assert guest.write(node.nodeid, fh, data, cut=cut) == 3000
    assert guest.read(node.nodeid, fh, cut=range(16, 3016)) == data


def test_a_write_that_lacks_data_writes_nothing(guest: GuestKernel) -> None:
    node, fh = guest.create(b"f")
    body = fuse.WRITE_IN.pack(fh, 0, 100, 0, 0, 0) + b"short"
    assert guest.ask(Opcode.WRITE, node.nodeid, body).error == errno.EINVAL
    assert guest.read(node.nodeid, fh) == b""


@pytest.mark.parametrize("room", range(17))
def test_without_room_for_a_reply_there_is_none(room: int, guest: GuestKernel) -> None:
    pending = guest.begin(Opcode.STATFS, room=room)
    assert pending.lengths == ([0] if room < 16 else [16])
    pending = guest.begin(Opcode.LOOKUP, 1, b"absent\0", room=room)
    assert pending.lengths == ([0] if room < 16 else [16])


# The replayer changes nothing


def test_what_the_replayer_asks_for_changes_nothing(world: World) -> None:
    (world.source / "f").write_bytes(b"data")
    guest = GuestKernel(world.mount())
    node = guest.lookup(b"f").nodeid
    fh = guest.open(node)
    guest.pid = AGENT_PID
    before = os.stat(world.source / "f")
    for opcode, body in (
        (Opcode.WRITE, fuse.WRITE_IN.pack(fh, 0, 1, 0, 0, 0) + b"x"),
        (Opcode.FALLOCATE, fuse.FALLOCATE_IN.pack(fh, 0, 100, 0)),
        (Opcode.COPY_FILE_RANGE, fuse.COPY_FILE_RANGE_IN.pack(fh, 0, node, fh, 9, 4, 0)),
        (Opcode.COPY_FILE_RANGE_64, fuse.COPY_FILE_RANGE_IN.pack(fh, 0, node, fh, 9, 4, 0)),
        (Opcode.IOCTL, fuse.IOCTL_IN.pack(fh, 0, 0x4008_6602, 0, 8, 0) + bytes(8)),
        (Opcode.SETLK, fuse.LK_IN.pack(fh, 1, 0, 9, fcntl.F_WRLCK, 1, 0)),
        (Opcode.SETLKW, fuse.LK_IN.pack(fh, 1, 0, 9, fcntl.F_WRLCK, 1, fuse.LK_FLOCK)),
        (Opcode.SETATTR, fuse.SETATTR_IN.pack(8, 0, 1, *(0,) * 10)),
        (Opcode.OPEN, fuse.OPEN_IN.pack(os.O_RDWR | os.O_TRUNC, 0)),
        (Opcode.SETXATTR, fuse.SETXATTR_IN.pack(1, 0, 0) + b"user.x\0y"),
    ):
        assert guest.ask(opcode, node, body).error == errno.EACCES, opcode
    for opcode, body in (
        (Opcode.TMPFILE, fuse.CREATE_IN.pack(os.O_RDWR, 0o600, 0, 0) + b"/\0"),
        (Opcode.CREATE, fuse.CREATE_IN.pack(os.O_RDWR, 0o600, 0, 0) + b"new\0"),
        (Opcode.MKDIR, fuse.MKDIR_IN.pack(0o700, 0) + b"new\0"),
        (Opcode.UNLINK, b"f\0"),
        (Opcode.LINK, fuse.LINK_IN.pack(node) + b"new\0"),
    ):
        assert guest.ask(opcode, 1, body).error == errno.EACCES, opcode
    after = os.stat(world.source / "f")
    assert (after.st_ctime_ns, after.st_size) == (before.st_ctime_ns, before.st_size)
    assert os.listdir(world.source) == ["f"]
    guest.session.close()


def test_a_file_that_the_replayer_opens_is_asked_about_once(world: World) -> None:
    """Its attributes are valid within the call, and are taken back once it has returned; closing
    it makes no flush.
    """
    (world.source / "file").touch()
    notified: list[bytes] = []
    operations = world.mount(local=True)
    guest = GuestKernel(operations, SessionOptions(is_local=True, notify=notified.append))
    world.mark(operations.guest, mask=int(Mask.CLOSE_WRITE))
    (world.source / "file").write_text("x")
    opening, _close = world.orders(operations)
    assert opening.op == Op.OPEN
    guest.pid = AGENT_PID
    node = guest.lookup(b"file")
    assert 0 < node.attr_valid < 0.1
    assert not node.entry_valid
    reply = guest.ok(Opcode.OPEN, node.nodeid, fuse.OPEN_IN.pack(os.O_WRONLY, 0))
    fh, flags, _ = fuse.OPEN_OUT.unpack(reply)
    assert flags & fuse.Fopen.NOFLUSH
    assert not notified
    guest.release(node.nodeid, fh)
    world.orders(operations)
    size = fuse.OUT_HEADER.size
    taken_back = [fuse.NOTIFY_INVAL_INODE_OUT.unpack(message[size:]) for message in notified]
    assert taken_back == [(node.nodeid, -1, 0)]
    guest.session.close()


def test_a_directory_is_looked_at_again_only_after_a_change(world: World) -> None:
    operations = world.mount(local=True)
    guest = GuestKernel(operations, SessionOptions(is_local=True, notify=lambda _: None))
    world.mark(operations.guest, mask=int(Mask.CREATE))
    guest.pid = AGENT_PID

    def modified() -> int:
        payload = guest.ok(Opcode.GETATTR, 1, bytes(fuse.GETATTR_IN.size))
        fields = fuse.ATTR.unpack(payload, fuse.ATTR_OUT.size)
        return fields[4] * 10**9 + fields[7]

    def kept() -> object:
        return world.root.attr_given

    host = os.stat(world.source)
    assert modified() == host.st_mtime_ns
    assert (given := kept()) is not None
    assert modified() == host.st_mtime_ns
    assert kept() is given
    (world.source / "new").mkdir()
    world.orders(operations)
    assert kept() is None
    assert modified() == os.stat(world.source).st_mtime_ns > host.st_mtime_ns
    guest.session.close()
