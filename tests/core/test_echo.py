"""Own echo: what a guest does is delivered to every other interested guest, and never to itself.

By attribution, not by time: what others do in the same moment is not mistaken for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fsd.events import reading
from fsd.files.changes import Changes
from fsd.fuse.operations import Operations
from fsd.guests.guest import Guest
from fsd.linux import directories
from fsd.linux.syscalls import RENAME_EXCHANGE
from protocol.frames import Op
from protocol.masks import Mask

from .support import ALL, USER, WHOLE, World, merged, plain, settle

Step = Callable[[World, Operations], None]


def nodeid(world: World, path: str = "") -> int:
    return world.node(path).nodeid


def create(world: World, mount: Operations) -> None:
    _, fh = mount.create(USER, nodeid(world), b"new", 0o644, os.O_RDWR | os.O_CREAT)
    mount.files.release(fh)


def write(world: World, mount: Operations) -> None:
    fh = mount.files.open(USER, nodeid(world, "file"), os.O_RDWR)
    mount.files.write(fh, 0, b"x")
    mount.files.read(fh, 0, 1)
    mount.files.release(fh)


def open_truncating(world: World, mount: Operations) -> None:
    mount.files.release(mount.files.open(USER, nodeid(world, "file"), os.O_WRONLY | os.O_TRUNC))


def truncate(world: World, mount: Operations) -> None:
    mount.setattr(USER, nodeid(world, "file"), Changes(size=1), None)


def chmod(world: World, mount: Operations) -> None:
    mount.setattr(USER, nodeid(world, "file"), Changes(mode=0o600), None)


def utime(world: World, mount: Operations) -> None:
    mount.setattr(USER, nodeid(world, "file"), Changes(atime_ns=1, mtime_ns=1), None)


def xattr(world: World, mount: Operations) -> None:
    mount.setxattr(USER, nodeid(world, "file"), b"user.x", b"y", 0)
    mount.removexattr(USER, nodeid(world, "file"), b"user.x")


def mkdir(world: World, mount: Operations) -> None:
    mount.mkdir(USER, nodeid(world), b"new", 0o755)


def fifo(world: World, mount: Operations) -> None:
    mount.mknod(USER, nodeid(world), b"new", 0o010644, 0)


def symlink(world: World, mount: Operations) -> None:
    mount.symlink(USER, nodeid(world), b"new", b"file")


def link(world: World, mount: Operations) -> None:
    mount.link(USER, nodeid(world, "file"), nodeid(world), b"new")


def unlink(world: World, mount: Operations) -> None:
    mount.lookup(USER, nodeid(world), b"file")
    mount.unlink(USER, nodeid(world), b"file")


def rmdir(world: World, mount: Operations) -> None:
    mount.lookup(USER, nodeid(world), b"empty")
    mount.rmdir(USER, nodeid(world), b"empty")


def rename(world: World, mount: Operations) -> None:
    mount.rename(USER, nodeid(world), b"file", nodeid(world, "dir"), b"moved", 0)


def replace(world: World, mount: Operations) -> None:
    mount.lookup(USER, nodeid(world), b"file")
    mount.lookup(USER, nodeid(world, "dir"), b"inner")
    mount.rename(USER, nodeid(world), b"file", nodeid(world, "dir"), b"inner", 0)


def exchange(world: World, mount: Operations) -> None:
    inner = nodeid(world, "dir")
    mount.rename(USER, nodeid(world), b"file", inner, b"inner", RENAME_EXCHANGE)


def rename_directory(world: World, mount: Operations) -> None:
    mount.lookup(USER, nodeid(world), b"empty")
    mount.rename(USER, nodeid(world), b"empty", nodeid(world), b"new", 0)


def read_directory(world: World, mount: Operations) -> None:
    fh = mount.files.opendir(USER, nodeid(world, "dir"))
    mount.files.names(fh, 0)
    mount.files.release(fh)


STEPS: list[Step] = [
    create, write, open_truncating, truncate, chmod, utime, xattr, mkdir, fifo, symlink, link,
    unlink, rmdir, rename, replace, exchange, rename_directory, read_directory,
]  # fmt: skip


@pytest.fixture
def tree(world: World) -> World:
    (world.source / "dir").mkdir()
    (world.source / "empty").mkdir()
    (world.source / "file").write_text("content")
    (world.source / "dir/inner").write_text("inner")
    return world


def interested(world: World, guest: Guest) -> None:
    """Marks on all there is, directories and files."""
    for path in ("", "dir", "empty", "file", "dir/inner"):
        world.mark(guest, path)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_not_seen_by_its_own_mount_and_once_by_others(tree: World, step: Step) -> None:
    own, other = tree.mount("own"), tree.mount("other", agent=False)
    observer = tree.observer()
    for guest in (own.guest, other.guest, observer):
        interested(tree, guest)
    native_top = os.path.join(os.path.dirname(tree.source), "plain")
    native = natively(native_top, step)
    step(tree, own)
    assert tree.orders(own) == []
    assert own.guest.counts["echo"] >= 1
    seen = tree.taken(observer)
    assert merged(seen) == native, "another guest gets what a native watcher sees"
    assert tree.orders(other), "another mount replays it"


def natively(directory: str, step: Step) -> list[tuple[bytes, str]]:
    """The same step, made by a process that is not interested: all of it, as it was."""
    os.mkdir(directory)
    other = World(Path(directory))
    try:
        (other.source / "dir").mkdir()
        (other.source / "empty").mkdir()
        (other.source / "file").write_text("content")
        (other.source / "dir/inner").write_text("inner")
        observer = other.observer()
        interested(other, observer)
        maker = other.mount("maker", agent=False)
        step(other, maker)
        return merged(other.take(observer))
    finally:
        other.close()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_host_doing_the_same_later_is_seen(tree: World, step: Step) -> None:
    """Expectations of one call do not outlive it, whether or not all of them came."""
    own = tree.mount("own")
    interested(tree, own.guest)
    step(tree, own)
    assert tree.orders(own) == []
    (tree.source / "later").write_text("x")
    (tree.source / "later").unlink()
    ops = [Op(order.op) for order in tree.orders(own)]
    assert ops == [Op.CREATE, Op.OPEN, Op.TOUCH, Op.CLOSE, Op.REMOVE]


def test_the_hosts_events_queued_before_a_call_stay_the_hosts(tree: World) -> None:
    own = tree.mount("own")
    interested(tree, own.guest)
    (tree.source / "by host").touch()
    mkdir(tree, own)
    (tree.source / "by host too").mkdir()
    names = [order.name for order in tree.orders(own) if order.op == Op.CREATE]
    assert names == [b"by host", b"by host too"]


def test_the_host_at_the_same_name_in_the_same_moment(
    tree: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two like events during one call, one is the call's; of unlike ones, only the like."""
    own = tree.mount("own")
    interested(tree, own.guest)
    real = os.mkdir

    def slow(path: bytes, mode: int, *, dir_fd: int) -> None:
        (tree.source / "elsewhere").mkdir(0o700, False, False)
        os.chmod(tree.source / "file", 0o640)
        real(path, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", _only(b"new", slow, real))
        mkdir(tree, own)
    orders = [(Op(order.op), order.name) for order in tree.orders(own)]
    assert orders == [(Op.CREATE, b"elsewhere"), (Op.TOUCH, b"file")]


def _only(name: bytes, then: Callable[..., None], real: Callable[..., None]) -> Callable[..., None]:
    def call(path: object, *args: int, **keywords: int) -> None:
        (then if path == name else real)(path, *args, **keywords)

    return call


def test_a_call_that_fails_attributes_nothing(tree: World) -> None:
    own = tree.mount("own")
    interested(tree, own.guest)
    with pytest.raises(FileExistsError):
        mount_mkdir_over_file(tree, own)
    (tree.source / "x").mkdir()
    assert [order.name for order in tree.orders(own)] == [b"x"]


def mount_mkdir_over_file(world: World, mount: Operations) -> None:
    mount.mkdir(USER, nodeid(world), b"file", 0o755)


def test_the_servers_own_look_at_a_directory_is_nobodys_event(tree: World) -> None:
    """Taking listings opens and reads directories that are watched for just that."""
    observer = tree.observer()
    settle(tree.source)
    tree.export.update(observer, WHOLE, ALL)
    tree.export.recovery.resync(tree.export.watcher.inodes())
    assert tree.take(observer) == []


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("module", "call"), [(reading, "_open_quietly"), (directories, "read"), (os, "close")]
)
def test_a_listing_of_the_host_during_the_servers_is_delivered(
    tree: World, monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: str, is_first: bool
) -> None:
    """On a busy machine such a call of the server may take long."""
    observer = tree.observer()
    mask = int(Mask.OPEN | Mask.ACCESS | Mask.CLOSE_NOWRITE)
    inode = tree.mark(observer, "dir", mask)
    tree.mark(observer, "", mask)
    tree.take(observer)
    real = getattr(module, call)

    def beside(*arguments: Any) -> Any:
        if not tree.export.watcher._is_attributing:
            return real(*arguments)
        monkeypatch.undo()
        if is_first:
            os.listdir(tree.source / "dir")
        try:
            return real(*arguments)
        finally:
            if not is_first:
                os.listdir(tree.source / "dir")

    monkeypatch.setattr(module, call, beside)
    list(tree.export.reader.names_in(inode))
    assert getattr(module, call) is real
    seen = merged(tree.take(observer))
    assert seen == [(b"dir", f"{kind},isdir") for kind in ("open", "access", "close_nowrite")]


def test_observers_get_what_guests_of_two_mounts_do(tree: World) -> None:
    """The review asked for guests' operations to reach other guests without host support."""
    first, second = tree.mount("first"), tree.mount("second")
    for guest in (first.guest, second.guest):
        tree.export.update(guest, tree.root.key, int(Mask.CREATE))
    mkdir(tree, first)
    assert [order.name for order in tree.orders(second)] == [b"new"]
    assert tree.orders(first) == []
    second.mkdir(USER, nodeid(tree), b"back", 0o755)
    assert [order.name for order in tree.orders(first)] == [b"back"]
    assert tree.orders(second) == []


def test_hand_marks_and_observers_have_no_echo(tree: World) -> None:
    own, observer = tree.mount("own"), tree.observer()
    tree.export.update(observer, tree.root.key, int(Mask.CREATE))
    hand = tree.export.hand_marks()
    tree.export.update(hand, tree.root.key, int(Mask.CREATE))
    mkdir(tree, own)
    assert plain(tree.take(observer)) == [(b"new", "create,isdir")]
    assert hand.counts["replayed"] == 1


def test_the_events_of_a_call_are_not_expected_within_anothers(world: World) -> None:
    """The inner one, or a look at the queue, would take the outer one's for the host's."""
    guest = world.observer()
    world.mark(guest)
    watcher = world.export.watcher
    for inner in (watcher.drain, lambda: list(world.export.reader.names_in(world.root))):
        with watcher.attributed(guest, (world.root, b"new", Mask(ALL))):
            (world.source / "new").touch()
            with pytest.raises(RuntimeError):
                inner()
        assert not world.take(guest)
        (world.source / "new").unlink()
        assert plain(world.take(guest))[-1:] == [(b"new", "delete")]
