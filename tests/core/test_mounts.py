"""Mounts below the share: each object is reached through its own mount, with that mount's flags.

What the host mounts, remounts and unmounts counts at once, also for what a guest has looked up.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from fsd.checkpoint.restore_inodes import RestoredTable
from fsd.files.caller import Caller
from fsd.files.changes import Changes
from fsd.files.saved import inode_table
from fsd.fuse.operations import Operations
from protocol import fuse
from protocol.fuse import Opcode
from protocol.masks import Mask

from .fuse_guest import GuestKernel
from .support import ALL, STRUCTURE, USER, World, plain

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts take root")
READING, WRITING = os.O_RDONLY, os.O_RDWR


class Tree:
    """Mounts of a test. What is mounted last goes first."""

    def __init__(self) -> None:
        self._mounted: list[Path] = []

    def tmpfs(self, where: Path, options: str = "size=1M") -> Path:
        return self._mount(where, "-t", "tmpfs", "-o", options, "none")

    def bind(self, what: Path, where: Path, options: str = "") -> Path:
        self._mount(where, "--bind", str(what))
        if options:
            subprocess.run(["mount", "-o", f"remount,bind,{options}", where], check=True)
        return where

    def _mount(self, where: Path, *arguments: str) -> Path:
        subprocess.run(["mount", *arguments, str(where)], check=True)
        self._mounted.append(where)
        return where

    def unmount(self, where: Path) -> None:
        """Raises where the server still holds something there."""
        subprocess.run(["umount", where], check=True)
        self._mounted.reverse()
        self._mounted.remove(where)
        self._mounted.reverse()

    def close(self) -> None:
        for where in reversed(self._mounted):
            subprocess.run(["umount", "-l", where], check=True)


@pytest.fixture
def tree(world: World) -> Iterator[Tree]:
    del world  # it is closed after the mounts
    tree = Tree()
    yield tree
    tree.close()


@pytest.fixture
def mount(world: World) -> Operations:
    return world.mount(agent=False)


def node(mount: Operations, path: str, who: Caller = USER) -> int:
    """Looked up as a guest's kernel does."""
    nodeid = 1
    for name in path.split("/"):
        nodeid = mount.lookup(who, nodeid, name.encode()).inode.nodeid
    return nodeid


def names(mount: Operations, fh: int) -> list[bytes]:
    """Of an open directory."""
    found = [entry.name for entry in mount.files.names(fh, 0, 4096)[1]]
    return [name for name in found if name not in (b".", b"..")]


def failure(call: Callable[[], object]) -> int:
    """The errno of a call; 0 where it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def changes(mount: Operations, directory: int, file: int) -> dict[str, Callable[[], object]]:
    """Every request that changes something, on a file `f` of a directory."""
    return {
        "open": lambda: mount.files.open(USER, file, WRITING),
        "truncate": lambda: mount.files.open(USER, file, os.O_WRONLY | os.O_TRUNC),
        "create": lambda: mount.create(USER, directory, b"n", 0o644, WRITING | os.O_CREAT),
        "create what is there": lambda: mount.create(USER, directory, b"f", 0o644, WRITING),
        "tmpfile": lambda: mount.tmpfile(USER, directory, 0o644, WRITING),
        "mknod": lambda: mount.mknod(USER, directory, b"n", 0o100644, 0),
        "mkdir": lambda: mount.mkdir(USER, directory, b"n", 0o755),
        "symlink": lambda: mount.symlink(USER, directory, b"n", b"f"),
        "link": lambda: mount.link(USER, file, directory, b"n"),
        "unlink": lambda: mount.unlink(USER, directory, b"f"),
        "rmdir": lambda: mount.rmdir(USER, directory, b"d"),
        "rename": lambda: mount.rename(USER, directory, b"f", directory, b"n", 0),
        "rename in": lambda: mount.rename(USER, 1, b"outside", directory, b"n", 0),
        "rename out": lambda: mount.rename(USER, directory, b"f", 1, b"n", 0),
        "chmod": lambda: mount.setattr(USER, file, Changes(mode=0o600), None),
        "chown": lambda: mount.setattr(USER, file, Changes(uid=1), None),
        "size": lambda: mount.setattr(USER, file, Changes(size=0), None),
        "times": lambda: mount.setattr(USER, file, Changes(atime_ns=1, mtime_ns=1), None),
        "chmod of the directory": lambda: mount.setattr(USER, directory, Changes(mode=0), None),
        "setxattr": lambda: mount.setxattr(USER, file, b"user.x", b"1", 0),
        "removexattr": lambda: mount.removexattr(USER, file, b"user.x"),
    }


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("look", ["before the mount", "after the mount"])
def test_a_read_only_bind_mount(
    world: World, mount: Operations, tree: Tree, depth: int, look: str
) -> None:
    """Whether it is there when the guest looks, or comes later."""
    top = world.source.joinpath(*"abc"[:depth])
    (top / "d").mkdir(parents=True)
    (top / "f").write_text("text")
    (world.source / "outside").touch()
    path = "/".join("abc"[:depth])
    known = node(mount, path), node(mount, f"{path}/f")
    tree.bind(top, top, "ro")
    nodes = known if look.startswith("before") else (node(mount, path), node(mount, f"{path}/f"))
    expected = {errno.EROFS, errno.EXDEV}
    if look.startswith("before"):  # these are masked now
        expected = {errno.ENOENT, errno.ESTALE}
    found = {name: failure(call) for name, call in changes(mount, *nodes).items()}
    assert set(found.values()) <= expected, found
    assert sorted(os.listdir(top)) == ["d", "f"]
    assert (top / "f").read_text() == "text"
    fh = mount.files.open(USER, node(mount, f"{path}/f"), READING)
    assert mount.files.read(fh, 0, 9) == b"text"
    mount.files.release(fh)


def test_a_mount_that_becomes_read_only(world: World, mount: Operations, tree: Tree) -> None:
    a = world.source / "a"
    (a / "d").mkdir(parents=True)
    (a / "f").write_text("text")
    (world.source / "outside").touch()
    tree.bind(a, a)
    nodes = node(mount, "a"), node(mount, "a/f")
    mount.setattr(USER, nodes[1], Changes(mode=0o640), None)
    subprocess.run(["mount", "-o", "remount,bind,ro", a], check=True)
    found = {name: failure(call) for name, call in changes(mount, *nodes).items()}
    assert set(found.values()) <= {errno.EROFS, errno.EXDEV}, found


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_mount_masks_is_not_reached(
    world: World, mount: Operations, tree: Tree, warm: bool
) -> None:
    a = world.source / "a"
    (a / "sub").mkdir(parents=True)
    (a / "d").mkdir()
    for name in ("f", "sub/f"):
        (a / name).write_text("masked")
    (a / "link").symlink_to("masked")
    (world.source / "outside").touch()
    a_node, sub, file, link = (node(mount, path) for path in ("a", "a/sub", "a/sub/f", "a/link"))
    top_file = node(mount, "a/f")
    for directory in (a_node, sub):
        world.table.get(directory).warm_until *= warm
    tree.tmpfs(a)
    (a / "f").write_text("visible")
    gone = {errno.ENOENT, errno.ESTALE}
    for pair in ((a_node, top_file), (sub, file)):
        found = {name: failure(call) for name, call in changes(mount, *pair).items()}
        assert set(found.values()) <= gone, found
    for number in (file, top_file):
        assert failure(partial(mount.files.open, USER, number, READING)) in gone
        assert failure(partial(mount.getattr, USER, number)) in gone
        assert failure(partial(mount.listxattr, number)) in gone
    assert failure(lambda: mount.readlink(link)) in gone
    for directory in (a_node, sub):
        fh = mount.files.opendir(USER, directory)
        assert names(mount, fh) == []
        mount.files.release(fh)
        assert failure(partial(mount.lookup, USER, directory, b"f")) in gone
    fh = mount.files.open(USER, node(mount, "a/f"), READING)
    assert mount.files.read(fh, 0, 9) == b"visible"
    mount.files.release(fh)
    tree.unmount(a)
    assert sorted(os.listdir(a)) == ["d", "f", "link", "sub"]
    fh = mount.files.open(USER, file, READING)  # as ever, once it is visible again
    assert mount.files.read(fh, 0, 9) == b"masked"
    mount.files.release(fh)


def test_the_upper_of_two_mounts_is_seen(world: World, mount: Operations, tree: Tree) -> None:
    a = world.source / "a"
    a.mkdir()
    tree.tmpfs(a)
    (a / "f").write_text("lower")
    lower = node(mount, "a/f")
    tree.tmpfs(a)
    assert failure(lambda: mount.files.open(USER, lower, READING)) == errno.ESTALE
    assert failure(lambda: node(mount, "a/f")) == errno.ENOENT
    (a / "f").write_text("upper")
    upper = node(mount, "a/f")
    assert upper != lower
    tree.unmount(a)
    assert failure(lambda: mount.files.open(USER, upper, READING)) == errno.ESTALE
    assert node(mount, "a/f") == lower
    fh = mount.files.open(USER, lower, READING)
    assert mount.files.read(fh, 0, 9) == b"lower"
    mount.files.release(fh)
    tree.unmount(a)


def test_one_file_bound_over_another(world: World, mount: Operations, tree: Tree) -> None:
    (world.source / "f").write_text("masked")
    (world.source / "other").write_text("other")
    masked, other = node(mount, "f"), node(mount, "other")
    tree.bind(world.source / "other", world.source / "f", "ro")
    bound = node(mount, "f")
    assert len({masked, other, bound}) == 3
    assert failure(lambda: mount.files.open(USER, masked, READING)) == errno.ESTALE
    assert failure(lambda: mount.setattr(USER, masked, Changes(size=0), None)) == errno.ESTALE
    assert failure(lambda: mount.files.open(USER, bound, WRITING)) == errno.EROFS
    assert failure(lambda: mount.setattr(USER, bound, Changes(size=0), None)) == errno.EROFS
    assert failure(lambda: mount.unlink(USER, 1, b"f")) == errno.EBUSY
    assert failure(lambda: mount.link(USER, bound, 1, b"n")) in (errno.EXDEV, errno.EROFS)
    mount.setattr(USER, other, Changes(mode=0o640), None)  # by its own name it may be changed
    tree.unmount(world.source / "f")
    assert (world.source / "f").read_text() == "masked"


def test_flags_of_a_mount(world: World, mount: Operations, tree: Tree) -> None:
    a = world.source / "a"
    a.mkdir()
    (a / "f").touch()
    os.utime(a / "f", ns=(1, 1))
    tree.bind(a, a, "noatime,nodev")
    fh = mount.files.open(USER, node(mount, "a/f"), READING)
    mount.files.read(fh, 0, 1)
    mount.files.release(fh)
    assert (a / "f").stat().st_atime_ns == 1
    assert os.ST_NOATIME & mount.statfs(node(mount, "a")).f_flag
    assert not os.ST_NOATIME & mount.statfs(1).f_flag


def test_names_do_not_cross_mounts(world: World, mount: Operations, tree: Tree) -> None:
    for name in ("a", "b"):
        (world.source / name).mkdir()
    (world.source / "a/f").touch()
    (world.source / "g").touch()
    tree.bind(world.source / "a", world.source / "b")
    a, b = node(mount, "a"), node(mount, "b")
    for call in (
        lambda: mount.rename(USER, a, b"f", b, b"g", 0),
        lambda: mount.rename(USER, 1, b"g", b, b"g", 0),
        lambda: mount.link(USER, node(mount, "a/f"), b, b"g"),
        lambda: mount.link(USER, node(mount, "b/f"), a, b"g"),
    ):
        assert failure(call) == errno.EXDEV
    assert failure(lambda: mount.rmdir(USER, 1, b"b")) == errno.EBUSY
    assert failure(lambda: mount.rename(USER, 1, b"b", 1, b"c", 0)) == errno.EBUSY


def test_nothing_that_was_looked_at_keeps_a_mount(
    world: World, guest: GuestKernel, tree: Tree
) -> None:
    a = world.source / "a"
    a.mkdir()
    tree.tmpfs(a)
    (a / "d/e").mkdir(parents=True)
    (a / "d/e/f").write_text("text")
    nodeid = 1
    for name in (b"a", b"d", b"e", b"f"):
        nodeid = guest.lookup(name, nodeid).nodeid
        guest.ok(Opcode.GETATTR, nodeid, fuse.GETATTR_IN.pack(0, 0))
    fh = guest.open(nodeid, READING)
    assert guest.read(nodeid, fh) == b"text"
    guest.release(nodeid, fh)
    inode = world.table.get(nodeid)
    assert inode.parent is not None
    world.mark(world.observer(), b"a/d/e", ALL)
    tree.unmount(a)
    assert guest.ask(Opcode.OPEN, nodeid, fuse.OPEN_IN.pack(READING, 0))[0] == errno.ESTALE
    assert guest.ask(Opcode.LOOKUP, guest.lookup(b"a").nodeid, b"d\0")[0] == errno.ENOENT


def test_a_directory_moved_on_its_mount(world: World, mount: Operations, tree: Tree) -> None:
    """It is the same object still, where it is looked up, or while the guest has it open."""
    a = world.source / "a"
    a.mkdir()
    tree.tmpfs(a)
    (a / "d/e").mkdir(parents=True)
    (a / "d/e/f").write_text("text")
    directory, file = node(mount, "a/d/e"), node(mount, "a/d/e/f")
    (a / "new").mkdir()
    fh = mount.files.opendir(USER, directory)
    (a / "d").rename(a / "new/d")
    mount.mkdir(USER, directory, b"made", 0o755)
    assert sorted(names(mount, fh)) == [b"f", b"made"]
    mount.files.release(fh)
    assert failure(lambda: mount.mkdir(USER, directory, b"other", 0o755)) == errno.ENOENT
    assert (node(mount, "a/new/d/e"), node(mount, "a/new/d/e/f")) == (directory, file)
    fh = mount.files.open(USER, file, WRITING)
    mount.files.write(fh, 0, b"TE")
    mount.files.release(fh)
    assert (a / "new/d/e/f").read_text() == "TExt"
    tree.unmount(a)


def test_free_space_is_that_of_the_node(world: World, mount: Operations, tree: Tree) -> None:
    a = world.source / "a"
    a.mkdir()
    tree.tmpfs(a)
    (a / "f").touch()
    for path in ("a", "a/f"):
        assert mount.statfs(node(mount, path)).f_blocks == os.statvfs(a).f_blocks
    assert mount.statfs(1).f_blocks == os.statvfs(world.source).f_blocks


def listed(guest: GuestKernel, nodeid: int, opcode: Opcode) -> dict[bytes, int]:
    """Names and inode numbers of a directory."""
    fh = fuse.OPEN_OUT.unpack(guest.ok(Opcode.OPENDIR, nodeid, fuse.OPEN_IN.pack(0, 0)))[0]
    data = guest.ok(opcode, nodeid, fuse.READ_IN.pack(fh, 0, 1 << 16, 0, 0, 0))
    guest.ok(Opcode.RELEASEDIR, nodeid, fuse.RELEASE_IN.pack(fh, 0, 0, 0))
    found: dict[bytes, int] = {}
    offset = 0
    while offset < len(data):
        if opcode == Opcode.READDIRPLUS:
            offset += fuse.ENTRY_SIZE
        ino, _, size, _ = fuse.DIRENT.unpack(data[offset : offset + fuse.DIRENT.size])
        start = offset + fuse.DIRENT.size
        found[data[start : start + size]] = ino
        offset = start + (size + 7 & ~7)
    return found


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
def test_inode_numbers_are_unique_and_agree(
    world: World, guest: GuestKernel, tree: Tree, opcode: Opcode
) -> None:
    """Two file systems number their files alike, one in the other; and one is bound elsewhere."""
    a, b, c = (world.source / path for path in ("a", "a/b", "c"))
    a.mkdir()
    c.mkdir()
    (world.source / "own").touch()
    tree.tmpfs(a)
    b.mkdir()
    (a / "f").touch()
    tree.tmpfs(b)
    (b / "f").touch()
    (b / "g").touch()
    tree.bind(b, c)
    numbers: dict[int, str] = {}

    def walk(nodeid: int, path: str, shown: int) -> None:
        below = listed(guest, nodeid, opcode)
        assert below.pop(b".") == shown
        below.pop(b"..")
        for name, ino in below.items():
            place = f"{path}/{name.decode()}"
            entry = guest.lookup(name, nodeid)
            assert entry.attr[0] == ino, place
            attr = guest.ok(Opcode.GETATTR, entry.nodeid, fuse.GETATTR_IN.pack(0, 0))
            assert fuse.ATTR.unpack(attr, fuse.ATTR_OUT.size)[0] == ino, place
            assert ino not in numbers, (place, numbers[ino])
            numbers[ino] = place
            if (world.source / place.lstrip("/")).is_dir():
                walk(entry.nodeid, place, ino)

    walk(1, "", world.source.stat().st_ino)
    assert sorted(numbers.values()) == [
        "/a", "/a/b", "/a/b/f", "/a/b/g", "/a/f", "/c", "/c/f", "/c/g", "/own",
    ]  # fmt: skip
    assert numbers[(world.source / "own").stat().st_ino] == "/own"


def test_one_directory_at_two_places(world: World, tree: Tree) -> None:
    """Two nodes: a watcher of one, or both, gets every change, as natively."""
    for name in ("a", "b", "up", "up/loop"):
        (world.source / name).mkdir()
    (world.source / "a/f").touch()
    tree.bind(world.source / "a", world.source / "b")
    tree.bind(world.source / "up", world.source / "up/loop")
    mount = world.mount(agent=False)
    assert len({node(mount, path) for path in ("a", "b")}) == 2
    assert len({node(mount, path) for path in ("a/f", "b/f")}) == 2
    assert len({node(mount, path) for path in ("up", "up/loop", "up/loop/loop")}) == 3
    watchers = {name: world.observer(name) for name in ("a", "b")}
    for name, watcher in watchers.items():
        world.mark(watcher, name, STRUCTURE)
    (world.source / "b/new").touch()
    (world.source / "a/f").rename(world.source / "a/g")
    events = [(b"new", "create"), (b"f", "moved_from"), (b"g", "moved_to")]
    for name, watcher in watchers.items():
        expected = [(f"{name}/".encode() + child, mask) for child, mask in events]
        assert plain(world.take(watcher)) == expected
    # What a guest does at one place is its own echo there, and news at the other.
    mount.mkdir(USER, node(mount, "b"), b"dir", 0o755)
    for name, watcher in watchers.items():
        assert plain(world.take(watcher)) == [(f"{name}/dir".encode(), "create,isdir")]
    world.mark(watchers["a"], "a", 0)
    (world.source / "a/last").mkdir()
    assert plain(world.take(watchers["a"])) == []
    assert plain(world.take(watchers["b"])) == [(b"b/last", "create,isdir")]


def test_the_end_of_a_file_system_ends_its_watches(world: World, tree: Tree) -> None:
    a = world.source / "a"
    a.mkdir()
    tree.tmpfs(a)
    (a / "d").mkdir()
    (a / "f").touch()
    watcher = world.observer()
    for path in ("", "a", "a/d", "a/f"):
        world.mark(watcher, path, STRUCTURE | int(Mask.DELETE_SELF))
    world.take(watcher)
    old = world.node("a")
    tree.unmount(a)
    seen = plain(world.take(watcher))
    assert sorted(seen) == [(path, "delete_self") for path in (b"a", b"a/d", b"a/f")]
    world.mark(watcher, "a", STRUCTURE)
    (a / "x").mkdir()
    assert plain(world.take(watcher)) == [(b"a/x", "create,isdir")]
    tree.tmpfs(a)
    assert world.node("a") is not old
    world.mark(watcher, "a", STRUCTURE)
    (a / "y").mkdir()
    assert plain(world.take(watcher)) == [(b"a/y", "create,isdir")]


# The server after this one, whose mounts may have other numbers


@pytest.fixture
def restart(make_world: Callable[[], World]) -> Callable[[World], World]:
    """Saves a world's table and gives it to a new one, which guests hold all of."""

    def again(world: World) -> World:
        saved, now = inode_table(world.table), time.time_ns()
        world.close()
        new = make_world()
        restored = RestoredTable(new.table, saved, now)
        for inode in restored.inodes.values():
            inode.lookups += 1
        restored.release()
        return new

    return again


def test_nodes_of_other_mounts_come_back(
    world: World, tree: Tree, restart: Callable[[World], World]
) -> None:
    """By their path, and as what they were: on the mount that is there now."""
    a, b = world.source / "a", world.source / "b"
    for path in (a, b):
        path.mkdir()
    tree.tmpfs(a)
    (a / "d").mkdir()
    (a / "f").write_text("text")
    tree.bind(a, b)
    operations = world.mount(agent=False)
    paths = ("a", "a/d", "a/f", "b", "b/d", "b/f")
    before = {path: node(operations, path) for path in paths}
    numbers = {path: world.table.get(before[path]).number for path in paths}
    tree.unmount(b)
    tree.bind(a, b, "ro")
    new = restart(world)
    operations = new.mount(agent=False)
    assert {path: new.table.get(before[path]).number for path in paths} == numbers
    operations.setattr(USER, before["a/f"], Changes(mode=0o640), None)
    change = partial(operations.setattr, USER, before["b/f"], Changes(mode=0o600), None)
    assert failure(change) == errno.EROFS
    assert {path: node(operations, path) for path in paths} == before
    assert len(set(before.values())) == len(paths)
    new.close()
    tree.unmount(b)  # nothing keeps it


def test_nodes_of_a_mount_that_has_gone_do_not_come_back(
    world: World, tree: Tree, restart: Callable[[World], World]
) -> None:
    a = world.source / "a"
    a.mkdir()
    (a / "f").write_text("masked")
    masked = node(world.mount(agent=False), "a/f")
    tree.tmpfs(a)
    (a / "f").write_text("first")
    first = node(world.mount("other", agent=False), "a/f")
    tree.unmount(a)
    tree.tmpfs(a)
    (a / "f").write_text("second")
    operations = restart(world).mount(agent=False)
    for nodeid in (first, masked):
        assert failure(partial(operations.files.open, USER, nodeid, READING)) in (
            errno.ESTALE,
            errno.ENOENT,
        )
    fh = operations.files.open(USER, node(operations, "a/f"), READING)
    assert operations.files.read(fh, 0, 9) == b"second"
    operations.files.release(fh)
