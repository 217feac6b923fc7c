"""The safety rule: nothing that the replayer asks for changes the backing store."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsd.export.channel import Channel
from fsd.files.changes import Changes
from fsd.fuse import openfiledata
from fsd.fuse.channelfile import ChannelFile
from fsd.fuse.operations import Operations
from fsd.guests.orders import CREATED_LIMIT
from fsd.linux.syscalls import RENAME_EXCHANGE, renameat2
from protocol import frames
from protocol.frames import ALIAS, CONTROL, FSD_DIR, STAGING, Op, Order
from protocol.masks import Mask

from .support import AGENT, ALL, USER, World, snapshot

Call = Callable[[World, Operations], object]


def at(world: World, path: str) -> int:
    return world.node(path).nodeid


# Every operation that could change something, as an agent gone wrong (or mad) would call it.
CHANGING: dict[str, Call] = {
    "mknod": lambda w, s: s.mknod(AGENT, 1, b"new", stat.S_IFREG | 0o644, 0),
    "mknod fifo": lambda w, s: s.mknod(AGENT, 1, b"new", stat.S_IFIFO | 0o644, 0),
    "mkdir": lambda w, s: s.mkdir(AGENT, 1, b"new", 0o755),
    "symlink": lambda w, s: s.symlink(AGENT, 1, b"new", b"t"),
    "link": lambda w, s: s.link(AGENT, at(w, "file"), 1, b"new"),
    "unlink": lambda w, s: s.unlink(AGENT, 1, b"file"),
    "rmdir": lambda w, s: s.rmdir(AGENT, 1, b"empty"),
    "rename": lambda w, s: s.rename(AGENT, 1, b"file", 1, b"new", 0),
    "rename over": lambda w, s: s.rename(AGENT, 1, b"file", at(w, "dir"), b"inner", 0),
    "exchange": lambda w, s: s.rename(AGENT, 1, b"file", at(w, "dir"), b"inner", 2),
    "to staging": lambda w, s: s.rename(AGENT, 1, b"file", STAGING, b"x", 0),
    "out of staging": lambda w, s: s.rename(AGENT, STAGING, b"x", 1, b"new", 0),
    "create": lambda w, s: s.create(AGENT, 1, b"new", 0o644, os.O_RDWR | os.O_CREAT),
    "create over": lambda w, s: s.create(AGENT, 1, b"file", 0o644, os.O_RDWR | os.O_CREAT),
    "chmod": lambda w, s: s.setattr(AGENT, at(w, "file"), Changes(mode=0), None),
    "chown": lambda w, s: s.setattr(AGENT, at(w, "file"), Changes(uid=1), None),
    "truncate": lambda w, s: s.setattr(AGENT, at(w, "file"), Changes(size=0), None),
    "utime": lambda w, s: s.setattr(AGENT, at(w, "file"), Changes(mtime_ns=1), None),
    "setxattr": lambda w, s: s.setxattr(AGENT, at(w, "file"), b"user.x", b"y", 0),
    "removexattr": lambda w, s: s.removexattr(AGENT, at(w, "file"), b"user.kept"),
    "open": lambda w, s: s.files.open(AGENT, at(w, "file"), os.O_RDONLY),
    "open for writing": lambda w, s: s.files.open(AGENT, at(w, "file"), os.O_RDWR),
    "open truncating": lambda w, s: s.files.open(AGENT, at(w, "file"), os.O_RDWR | os.O_TRUNC),
    "opendir": lambda w, s: s.files.opendir(AGENT, at(w, "dir")),
}


@pytest.fixture
def tree(world: World) -> World:
    (world.source / "dir").mkdir()
    (world.source / "empty").mkdir()
    (world.source / "file").write_text("content")
    (world.source / "dir/inner").write_text("inner")
    os.setxattr(world.source / "file", "user.kept", b"1")
    return world


@pytest.mark.parametrize("what", CHANGING)
def test_what_no_order_covers_is_refused_and_counted(tree: World, what: str) -> None:
    mount = tree.mount()
    before = snapshot(tree.source)
    with pytest.raises(OSError, match="ledger") as error:
        CHANGING[what](tree, mount)
    assert error.value.errno == errno.EACCES
    assert mount.guest.counts["refused"] == 1
    assert snapshot(tree.source) == before
    assert os.listxattr(tree.source / "file") == ["user.kept"]


@pytest.mark.parametrize("what", CHANGING)
def test_also_while_it_has_other_orders(tree: World, what: str) -> None:
    """An order covers one call on one name, and nothing else."""
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL)
    tree.mark(mount.guest, "dir", mask=ALL)
    (tree.source / "host").write_text("x")
    (tree.source / "host").rename(tree.source / "dir/host")
    (tree.source / "dir/host").unlink()
    orders = tree.orders(mount)
    assert len(orders) >= 5
    before = snapshot(tree.source)
    with pytest.raises(OSError, match="ledger") as error:
        CHANGING[what](tree, mount)
    assert error.value.errno == errno.EACCES
    assert snapshot(tree.source) == before
    assert replay_all(mount, orders) == len(orders)


def replay_all(mount: Operations, orders: list[Order]) -> int:
    """Do what a true agent's kernel would: look up and call. Returns how many were answered."""
    opened: dict[int, int] = {}
    for order in orders:
        kind = stat.S_IFMT(order.mode)
        if order.op == Op.CREATE:
            with pytest.raises(FileNotFoundError):
                mount.lookup(AGENT, order.nodeid, order.name)
            make = {
                stat.S_IFDIR: lambda o: mount.mkdir(AGENT, o.nodeid, o.name, 0o777),
                stat.S_IFLNK: lambda o: mount.symlink(AGENT, o.nodeid, o.name, b"?"),
            }
            default = lambda o: mount.mknod(AGENT, o.nodeid, o.name, o.mode, 0)  # noqa: E731
            make.get(kind, default)(order)
            continue
        if order.op == Op.CLOSE:
            mount.files.release(opened.pop(order.arg))
            continue
        child = mount.lookup(AGENT, order.nodeid, order.name).inode if order.name else None
        node = child.nodeid if child is not None else order.nodeid
        if order.op == Op.REMOVE:
            (mount.rmdir if kind == stat.S_IFDIR else mount.unlink)(AGENT, order.nodeid, order.name)
        elif order.op == Op.RENAME:
            mount.rename(AGENT, order.nodeid, order.name, order.nodeid2, order.name2, order.arg)
        elif order.op == Op.TOUCH:
            mount.setattr(AGENT, node, Changes(mtime_ns=5, atime_ns=5), None)
        elif order.op == Op.OPEN:
            opened[order.seq] = mount.files.open(
                AGENT, node, os.O_WRONLY if order.arg else os.O_RDONLY
            )
    return len(orders)


def test_true_replays_change_nothing_either(tree: World) -> None:
    mount = tree.mount()
    for path in ("", "dir", "empty"):
        tree.mark(mount.guest, path, mask=ALL)
    source = tree.source
    (source / "new").write_text("content")
    os.chmod(source / "new", 0o4755)
    os.utime(source / "new", (1, 1))
    (source / "new").read_text()
    os.rename(source / "new", source / "dir/inner")
    os.link(source / "file", source / "link")
    os.symlink("file", source / "sym")
    os.mkfifo(source / "fifo")
    (source / "made").mkdir()
    os.rename(source / "empty", source / "made/empty")
    os.rename(source / "sym", source.parent / "out")
    os.rename(source.parent / "out", source / "in")
    (source / "fifo").unlink()
    before = snapshot(source)
    done = 0
    while orders := tree.orders(mount):
        done += replay_all(mount, orders)
    assert done >= 15
    assert mount.guest.counts["refused"] == 0
    assert snapshot(source) == before


def test_create_write_delete_replays_completely_on_a_tombstone(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL)
    (tree.source / "gone").write_text("x")
    (tree.source / "gone").unlink()
    orders = tree.orders(mount)
    ops = [Op(order.op).name for order in orders]
    assert ops == ["CREATE", "OPEN", "TOUCH", "CLOSE", "REMOVE"]
    assert {order.name for order in orders} - {b""} <= {b"gone"}
    assert replay_all(mount, orders) == len(orders)
    assert "gone" not in os.listdir(tree.source)


def test_answers_are_as_of_the_event(tree: World) -> None:
    """The name stands for another object by the time that its first one's end is replayed."""
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL & ~int(Mask.OPEN | Mask.CLOSE_WRITE | Mask.MODIFY))
    old = tree.node("file")
    (tree.source / "file").unlink()
    (tree.source / "file").mkdir()
    remove, create = tree.orders(mount)
    assert mount.lookup(AGENT, 1, b"file").inode is old
    mount.unlink(AGENT, 1, b"file")
    assert (remove.op, create.op) == (Op.REMOVE, Op.CREATE)
    with pytest.raises(FileNotFoundError):
        mount.lookup(AGENT, 1, b"file")
    entry = mount.mkdir(AGENT, 1, b"file", 0o777)
    assert entry.inode is tree.node("file")


def test_a_rename_over_a_watched_file_names_that_file(tree: World) -> None:
    """Else its watcher in the guest would never see its end (DELETE_SELF)."""
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL)
    tree.mark(mount.guest, "dir", mask=ALL)
    victim = tree.mark(mount.guest, "dir/inner", mask=ALL)
    os.rename(tree.source / "file", tree.source / "dir/inner")
    order = next(order for order in tree.orders(mount) if order.op == Op.RENAME)
    assert mount.lookup(AGENT, order.nodeid2, order.name2).inode is victim


def test_users_see_the_present_while_the_replayer_sees_the_past(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL)
    (tree.source / "file").unlink()
    tree.orders(mount)
    assert mount.lookup(AGENT, 1, b"file").inode.kind == stat.S_IFREG
    with pytest.raises(FileNotFoundError):
        mount.lookup(USER, 1, b"file")


def test_the_replayers_handles_do_nothing(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL)
    with open(tree.source / "file", "a") as file:
        file.write("y")
    orders = tree.orders(mount)
    opening = next(order for order in orders if order.op == Op.OPEN)
    node = mount.lookup(AGENT, opening.nodeid, opening.name).inode
    fh = mount.files.open(AGENT, node.nodeid, os.O_WRONLY)
    before = snapshot(tree.source)

    def write() -> int:
        return mount.files.write(fh, 0, b"z")

    def read() -> bytes:
        return mount.files.read(fh, 0, 1)

    _refused(read)
    assert write() == 1  # the order behind the OPEN: its MODIFY
    _refused(write)
    _refused(read)
    assert mount.handles.file_fd(fh) == -1
    mount.files.release(fh)
    assert snapshot(tree.source) == before


def test_the_replayers_handles_are_none_of_the_guests_share(
    tree: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds files open on the host, or in another machine, takes none from its programs;
    and programs that hold all do not keep its agent from working, and from coming back.
    """
    mount = tree.mount()
    tree.mark(mount.guest, mask=int(Mask.OPEN))
    tree.export.descriptors = 3
    user = mount.lookup(USER, 1, b"file").inode.nodeid

    def replayed() -> int:
        with open(tree.source / "file"):
            (opening,) = [order for order in tree.orders(mount) if order.op == Op.OPEN]
        return mount.files.open(
            AGENT, mount.lookup(AGENT, 1, opening.name).inode.nodeid, os.O_RDONLY
        )

    handles = [replayed() for _ in range(5)]
    own = [mount.files.open(USER, user, os.O_RDONLY) for _ in range(3)]
    with pytest.raises(OSError, match="Too many open files"):
        mount.files.open(USER, user, os.O_RDONLY)
    handles.append(replayed())
    monkeypatch.setattr(openfiledata, "REPLAYED_LIMIT", len(handles))
    with pytest.raises(OSError, match="Too many open files"):
        replayed()
    control = mount.files.open(USER._replace(uid=0), CONTROL, os.O_RDWR)
    for fh in (*handles, *own, control):
        mount.files.release(fh)
    mount.files.release(mount.files.open(USER, user, os.O_RDONLY))


def test_what_the_agent_could_not_open_is_opened_when_it_is_closed(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=int(Mask.OPEN | Mask.CLOSE_WRITE))
    with open(tree.source / "file", "a"):
        (refused,) = tree.orders(mount)
        assert refused.op == Op.OPEN
        mount.guest.acknowledge(refused.seq, errno.EMFILE)
        assert mount.guest.counts["failed"] == 1
    opening, closing = tree.orders(mount)
    assert (opening.op, opening.arg) == (Op.OPEN, 1)
    assert (closing.op, closing.arg) == (Op.CLOSE, opening.seq)


def test_data_of_another_file_than_the_orders_is_refused(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=ALL)
    tree.mark(mount.guest, "dir", mask=ALL)
    handles = []
    for name in ("file", "dir/inner"):
        with open(tree.source / name, "a") as file:
            file.write("y")
        opening, *rest = tree.orders(mount)
        node = mount.lookup(AGENT, opening.nodeid, opening.name).inode
        handles.append(mount.files.open(AGENT, node.nodeid, os.O_WRONLY))
        assert [order.op for order in rest] == [Op.TOUCH, Op.CLOSE]
    before = snapshot(tree.source)
    _refused(lambda: mount.files.write(handles[0], 0, b"z"))
    assert mount.files.write(handles[1], 0, b"z") == 1
    assert snapshot(tree.source) == before


def _refused(call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="ledger") as error:
        call()
    assert error.value.errno == errno.EACCES


def test_an_order_that_fails_in_the_guest_is_counted_and_the_next_one_is_made(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=int(Mask.CREATE))
    for name in "abc":
        (tree.source / name).mkdir()
    first, second, third = tree.orders(mount)
    replay_all(mount, [first])
    mount.guest.acknowledge(second.seq, errno.EEXIST)
    replay_all(mount, [third])
    assert mount.guest.counts["failed"] == 1
    assert mount.guest.kinds["failed", int(Mask.CREATE)] == 1
    assert tree.orders(mount) == []
    assert mount.guest.counts["replayed"] == 2


def structure(path: Path, what: str) -> None:
    """Change a name beside ``old``."""
    match what:
        case "create":
            (path / "new").mkdir()
        case "delete":
            (path / "old").rmdir()
        case "rename":
            (path / "old").rename(path / "new")
        case "exchange":
            names = [os.fsencode(path / name) for name in ("old", "other")]
            renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE)


@pytest.mark.parametrize("what", ["create", "delete", "rename", "exchange"])
def test_a_name_whose_order_fails_is_compared_once(world: World, what: str) -> None:
    """Or what watchers were told last would never agree with what is there."""
    for name in ("old", "other"):
        (world.source / name).mkdir()
    mount = world.mount(agent=False)
    guest = mount.guest
    channel = Channel(world.export, "agent", AGENT.pid, guest)
    channel.receive(frames.encode(frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL)))
    world.mark(guest)
    structure(world.source, what)
    (order,) = world.orders(mount)
    channel.receive(frames.encode(frames.Ack(order.seq, errno.EIO)))
    (again,) = world.orders(mount)
    assert again._replace(seq=0) == order._replace(seq=0)
    channel.receive(frames.encode(frames.Ack(again.seq, errno.EIO)))
    assert world.orders(mount) == []
    assert (guest.counts["failed"], guest.counts["repeated"]) == (2, 1)


def test_a_name_whose_order_failed_and_that_is_as_before(world: World) -> None:
    """Nothing is to be said of it any more."""
    mount = world.mount(agent=False)
    channel = Channel(world.export, "agent", AGENT.pid, mount.guest)
    channel.receive(frames.encode(frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL)))
    world.mark(mount.guest)
    (world.source / "new").mkdir()
    (order,) = world.orders(mount)
    (world.source / "new").rmdir()
    (removal,) = world.orders(mount)
    channel.receive(frames.encode(frames.Ack(order.seq, errno.EIO)))
    assert removal.op == Op.REMOVE
    assert world.orders(mount) == []


def test_orders_of_an_agent_that_died_wait_for_the_next(tree: World) -> None:
    mount = tree.mount()
    tree.mark(mount.guest, mask=int(Mask.CREATE))
    for name in "abc":
        (tree.source / name).mkdir()
    orders = tree.orders(mount)
    replay_all(mount, orders[:1])
    mount.guest.disconnect()
    (tree.source / "d").mkdir()
    tree.pump()
    mount.guest.connect(AGENT.pid, frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL))
    rest = tree.orders(mount)
    assert [order.name for order in rest] == [b"b", b"c", b"d"]
    assert replay_all(mount, rest) == 3


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_sequence_of_calls_changes_anything(tree: World, data: st.DataObject) -> None:
    """Whatever is in the ledger, and whatever the replayer does."""
    mount = tree.services[0] if tree.services else tree.mount()
    tree.mark(mount.guest, mask=ALL)
    tree.mark(mount.guest, "dir", mask=ALL)
    host = data.draw(st.lists(st.sampled_from("cwdm"), max_size=5), label="host")
    for step in host:
        path = tree.source / data.draw(st.sampled_from(["new", "dir/new"]))
        if step == "c":
            path.touch()
        elif step == "w":
            path.write_text("x")
        elif step == "d":
            path.unlink(missing_ok=True)
        elif path.exists():
            os.rename(path, path.with_name("moved"))
    tree.orders(mount)
    before = snapshot(tree.source)
    names = [b"new", b"file", b"moved", b"inner", b"x", b"empty", b"dir"]
    nodes = [1, at(tree, "dir"), at(tree, "file"), STAGING, ALIAS, FSD_DIR, CONTROL, 77]
    name, node = st.sampled_from(names), st.sampled_from(nodes)
    for _ in range(data.draw(st.integers(1, 8))):
        call = data.draw(
            st.sampled_from(
                ["mknod", "mkdir", "symlink", "unlink", "rmdir", "rename", "setattr", "open"]
            )
        )
        n, what = data.draw(node), data.draw(name)
        try:
            if call == "mknod":
                mount.mknod(AGENT, n, what, stat.S_IFREG | 0o600, 0)
            elif call == "mkdir":
                mount.mkdir(AGENT, n, what, 0o777)
            elif call == "symlink":
                mount.symlink(AGENT, n, what, b"?")
            elif call == "unlink":
                mount.unlink(AGENT, n, what)
            elif call == "rmdir":
                mount.rmdir(AGENT, n, what)
            elif call == "rename":
                mount.rename(AGENT, n, what, data.draw(node), data.draw(name), 0)
            elif call == "setattr":
                mount.setattr(AGENT, n, Changes(size=0, mode=0), None)
            elif n != CONTROL:
                mount.files.release(mount.files.open(AGENT, n, os.O_RDWR | os.O_TRUNC))
        except OSError:
            pass
    assert snapshot(tree.source) == before


def test_publishing_interest_changes_nothing(tree: World) -> None:
    """Taking listings to compare with reads directories: their atime stays what it was."""
    for name in ("dir", "empty", ""):
        os.utime(tree.source / name, (1, 2))  # so old that relatime would set it anew
    before = snapshot(tree.source)
    observer = tree.observer()
    for path in ("", "dir", "empty", "file"):
        tree.mark(observer, path)
    tree.export.recovery.resync(tree.export.watcher.inodes())
    tree.pump()
    assert snapshot(tree.source) == before


@pytest.mark.parametrize("name", [b".", b".."])
def test_the_replayers_kernel_may_not_search_for_a_directory(world: World, name: bytes) -> None:
    """open_by_handle_at of a dropped dentry would read the parent, where watchers would see it."""
    (world.source / "d").mkdir()
    mount = world.mount()
    node = world.node("d")
    with pytest.raises(OSError, match="Stale") as error:
        mount.lookup(AGENT, node.nodeid, name)
    assert error.value.errno == errno.ESTALE
    assert mount.lookup(USER, node.nodeid, name).inode in (node, world.root)


def test_an_agent_that_waits_for_more_is_done(world: World) -> None:
    """An event is replayed when the agent asks again, not when it is answered."""
    mount = world.mount(agent=False)
    channel = Channel(world.export, "agent", AGENT.pid, mount.guest)
    file = ChannelFile(channel)
    channel.receive(frames.encode(frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL)))
    world.mark(mount.guest)
    (world.source / "x").mkdir()
    world.pump()
    assert file.is_ready
    file.read(1 << 20)
    mount.mkdir(AGENT, 1, b"x", 0o755)
    assert mount.guest.counts["replayed"] == 0
    file.wait(lambda: None)
    assert mount.guest.counts["replayed"] == 1
    assert mount.guest.depth == 0


def test_what_it_opened_before_it_was_the_replayer_has_no_data_for_it(world: World) -> None:
    """The libfuse transport does not learn which process reads and writes."""
    (world.source / "file").write_text("host")
    (world.source / "d").mkdir()
    mount = world.mount(agent=False)
    file, directory = world.node("file").nodeid, world.node("d").nodeid
    fh, listed = mount.files.open(AGENT, file, os.O_RDWR), mount.files.opendir(AGENT, directory)
    made = mount.create(AGENT, world.root.nodeid, b"made", 0o600, os.O_RDWR)[1]
    theirs = mount.files.open(USER, file, os.O_RDWR)
    hello = frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL)
    mount.guest.connect(AGENT.pid, hello)
    before = snapshot(world.source)
    calls: list[Callable[[], object]] = [
        lambda: mount.files.write(fh, 0, b"REPL"),
        lambda: mount.files.write(made, 0, b"REPL"),
        lambda: mount.files.read(fh, 0, 4),
        lambda: mount.files.read_into(fh, [memoryview(bytearray(4))], 0),
        lambda: mount.files.copy_file_range(USER, fh, 0, theirs, 0, 4),
        lambda: mount.files.copy_file_range(USER, theirs, 0, fh, 0, 4),
        lambda: mount.files.fallocate(USER, fh, 0, 0, 100),
        lambda: mount.files.names(listed, 0),
    ]
    for call in calls:
        with pytest.raises(OSError, match="not in the ledger"):
            call()
    assert snapshot(world.source) == before
    assert mount.guest.counts["refused"] == len(calls)
    assert mount.files.write(theirs, 0, b"user") == 4


@pytest.mark.parametrize("opens", [False, True])
def test_what_the_replayers_kernel_has_kept_is_asked_for_anew(tree: World, opens: bool) -> None:
    """Of a name kept from before the watch no look-up comes: ESTALE makes the kernel send one."""
    mount = tree.mount()
    tree.mark(mount.guest, mask=int(Mask.MODIFY | Mask.CLOSE_WRITE))
    node = mount.lookup(USER, 1, b"file").inode.nodeid
    (tree.source / "file").write_text("changed")
    order = next(o for o in tree.orders(mount) if o.op == (Op.OPEN if opens else Op.TOUCH))
    while mount.guest.ledger.tasks[0].order is not order:
        mount.guest.acknowledge(mount.guest.ledger.tasks[0].order.seq, errno.EIO)
    for directory in (1, at(tree, "dir")):  # on the way to it, or to another order's
        mount.getattr(AGENT, directory)
    with pytest.raises(OSError, match="not looked up") as error:
        mount.getattr(AGENT, node)
    assert error.value.errno == errno.ESTALE
    call = CHANGING["open" if opens else "utime"]
    with pytest.raises(OSError, match="not looked up") as error:
        call(tree, mount)
    assert error.value.errno == errno.ESTALE
    mount.getattr(USER, node)
    mount.lookup(AGENT, 1, b"file")
    mount.getattr(AGENT, node)
    replay_all(mount, [order])


@pytest.mark.parametrize(("can", "mask"), [(False, ALL), (True, ALL), (True, Mask.CLOSE_WRITE)])
def test_a_close_without_an_open(tree: World, can: bool, mask: int) -> None:
    """If the agent can make it: by what stands in for the file, until the agent reports it done."""
    mount = tree.mount()
    mount.guest.makes_lone_closes = can
    file = tree.node("file")
    with open(tree.source / "file", "a"):
        tree.mark(mount.guest, mask=mask)
    orders = tree.orders(mount)
    if not can or mask != ALL:  # else nobody sees the OPEN
        assert [order.op for order in orders] == [Op.OPEN, Op.CLOSE]
        return
    (order,) = orders
    assert (order.op, order.name, order.arg) == (Op.LONE_CLOSE, b"file", 1)
    for _ in range(2):  # the kernel may hold the file under its name, and asks once more
        entry = mount.lookup(AGENT, 1, b"file")
        assert stat.S_ISFIFO(entry.attr.st_mode)
        assert entry.inode is not file
    with pytest.raises(OSError, match="ledger"):
        mount.files.open(AGENT, file.nodeid, os.O_WRONLY)
    mount.guest.acknowledge(order.seq, 0)
    assert mount.lookup(AGENT, 1, b"file").inode is file
    assert mount.guest.counts["replayed"] == 1


def test_a_file_with_another_name_is_closed_once_where_it_was_opened(tree: World) -> None:
    """Its own mark and the name that it had each report the close: one close is both."""
    mount = tree.mount()
    source = tree.source
    os.link(source / "file", source / "empty/link")
    (source / "other").touch()
    tree.mark(mount.guest, mask=ALL)
    tree.mark(mount.guest, "file", mask=ALL)
    with open(source / "file", "rb", buffering=0) as file:
        file.read(1)
        os.rename(source / "other", source / "file")
        file.read(1)
    orders = [(order.op, order.name) for order in tree.orders(mount)]
    assert [op for op, _ in orders if op in (Op.OPEN, Op.CLOSE)] == [Op.OPEN, Op.CLOSE], orders


TYPICAL = int(Mask.CREATE | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.DELETE)


def test_a_created_file_stays_open_until_its_close(tree: World) -> None:
    """One look-up for all events of a file, if the agent can and nobody sees the OPEN."""
    mount = tree.mount()
    mount.guest.keeps_created = True
    tree.mark(mount.guest, mask=TYPICAL)
    (tree.source / "new").write_text("x")
    before = snapshot(tree.source)
    create, touch, close = tree.orders(mount)
    assert (create.op, create.arg) == (Op.CREATE, 1)
    assert (touch.op, touch.arg, touch.nodeid2) == (Op.TOUCH, Mask.MODIFY, create.seq)
    assert (close.op, close.arg) == (Op.CLOSE, create.seq)
    with pytest.raises(FileNotFoundError):
        mount.lookup(AGENT, 1, b"new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    entry, fh = mount.create(AGENT, 1, b"new", 0o600, flags)
    assert entry.inode is tree.node("new")
    mount.getattr(AGENT, entry.inode.nodeid)  # the kernel may check the open within the call
    assert mount.files.write(fh, 0, b"\0") == 1
    mount.files.release(fh)
    assert not tree.orders(mount)
    assert mount.guest.counts["replayed"] == 3
    assert not mount.guest.counts["refused"]
    assert snapshot(tree.source) == before


def test_it_is_not_kept_open_if_the_agent_cannot_or_watchers_see_that(tree: World) -> None:
    mount = tree.mount()
    for can, mask in ((False, TYPICAL), (True, ALL)):
        mount.guest.keeps_created = can
        tree.mark(mount.guest, mask=mask)
        (tree.source / "new").write_text("x")
        (tree.source / "new").unlink()
        orders = tree.orders(mount)
        assert [order.op for order in orders] == [Op.CREATE, Op.OPEN, Op.TOUCH, Op.CLOSE, Op.REMOVE]
        assert not orders[0].arg
        assert replay_all(mount, orders) == len(orders)


def test_a_file_without_a_close_to_come_is_not_kept_open(tree: World) -> None:
    mount = tree.mount()
    mount.guest.keeps_created = True
    tree.mark(mount.guest, mask=TYPICAL)
    with (tree.source / "new").open("w") as file:
        file.write("x")
        file.flush()
        create, touch = tree.orders(mount)
        assert (create.op, create.arg) == (Op.CREATE, 0)
        assert (touch.op, touch.nodeid2) == (Op.TOUCH, 0)


def test_a_modified_file_is_opened_before_that_for_its_close(tree: World) -> None:
    """The OPEN, which nobody watches, counts for no event."""
    mount = tree.mount()
    tree.mark(mount.guest, mask=TYPICAL)
    with (tree.source / "file").open("a") as file:
        file.write("x")
    opening, touch, close = orders = tree.orders(mount)
    assert (opening.op, opening.arg) == (Op.OPEN, 1)
    assert (touch.op, touch.arg, touch.nodeid2) == (Op.TOUCH, Mask.MODIFY, opening.seq)
    assert (close.op, close.arg) == (Op.CLOSE, opening.seq)
    assert replay_all(mount, orders) == 3
    assert not tree.orders(mount)
    assert mount.guest.counts["replayed"] == 2


def test_files_kept_open_are_bounded(tree: World) -> None:
    mount = tree.mount()
    mount.guest.keeps_created = True
    tree.mark(mount.guest, mask=TYPICAL)
    files = [(tree.source / f"new{i}").open("w") for i in range(CREATED_LIMIT + 3)]
    for file in files:
        file.write("x")
    for file in files:
        file.close()
    orders = tree.orders(mount)
    created = [order.arg for order in orders if order.op == Op.CREATE]
    assert created == [1] * CREATED_LIMIT + [0] * 3
