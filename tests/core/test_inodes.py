"""Identity: (nodeid, generation) is one host object for ever; reference counts are exact."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fsd.files import successors
from fsd.files.caller import Caller
from fsd.files.changes import Changes
from fsd.files.table import LookupCountError
from fsd.linux import syscalls
from protocol.handles import NodeKey
from protocol.masks import Mask

from .support import ALL, STRUCTURE, USER, World, plain


def reuse(world: World, kind: str = "file") -> tuple[NodeKey, NodeKey, int]:
    """Remove x and make it again until the host reuses its inode number; keys before and after.

    Only the guest's kernel holds the first x.
    """
    path = world.source / "x"
    make, remove = (path.touch, path.unlink) if kind == "file" else (path.mkdir, path.rmdir)
    for _ in range(200):
        make()
        old = world.export.fs.lookup(world.root, b"x").inode
        key, ino = old.key, old.identity.ino
        remove()
        make()
        if path.stat().st_ino == ino:
            return key, world.export.fs.lookup(world.root, b"x").inode.key, ino
        world.table.forget(key.nodeid, 1)
        remove()
    raise AssertionError("this file system does not reuse inode numbers: the test proves nothing")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_reused_inode_number_is_another_node(world: World, kind: str) -> None:
    """Requests name only the nodeid: while the guest's kernel holds the old one, it keeps it."""
    old, new, ino = reuse(world, kind)
    assert old.nodeid == ino
    assert new.nodeid != ino
    inode = world.table.find(new)
    assert inode.is_dir == (kind == "directory")
    assert world.export.fs.getattr(inode).st_ino == ino
    with pytest.raises(OSError, match=r"Stale|No such"):
        world.export.fs.getattr(world.table.find(old))
    world.table.forget(old.nodeid, 1)
    world.table.forget(new.nodeid, 1)
    assert len(world.table) == 1
    again = world.node("x")
    assert again.nodeid == ino
    assert again.key != old


def test_a_mark_on_the_old_object_is_not_one_on_the_new(world: World) -> None:
    path = world.source / "x"
    guest = world.observer()
    for _ in range(200):
        path.touch()
        old = world.mark(guest, "x")
        path.unlink()
        path.touch()
        new = world.node("x")
        if path.stat().st_ino == old.identity.ino:
            break
        path.unlink()
    else:
        raise AssertionError("this file system does not reuse inode numbers")
    assert new is not old
    assert new.key != old.key
    world.take(guest)
    path.write_text("x")
    assert world.take(guest) == []
    world.mark(guest, "x", int(Mask.MODIFY))
    with open(path, "a") as file:
        file.write("x")
    assert plain(world.take(guest)) == [(b"x", "modify")]


def test_late_requests_for_the_old_object_fail(world: World) -> None:
    """A mark that is published late must not reach the new object through its number."""
    old, new, ino = reuse(world)
    world.table.forget(old.nodeid, 1)
    world.table.forget(new.nodeid, 1)
    assert world.node("x").nodeid == ino
    with pytest.raises(OSError, match="generation"):
        world.export.update(world.observer(), old, ALL)


def test_an_unlinked_file_is_not_found_by_its_name(world: World) -> None:
    (world.source / "x").write_text("old")
    inode = world.node("x")
    os.replace(_written(world, "new"), world.source / "x")
    with pytest.raises(OSError, match=r"Stale|No such") as error:
        world.export.fs.getattr(inode)
    assert error.value.errno in (errno.ESTALE, errno.ENOENT)
    with pytest.raises(OSError, match=r"Stale|No such"):
        world.export.fs.setattr(inode, Changes(size=0), None, lambda change, fd, _: change(fd))
    assert (world.source / "x").read_text() == "new"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_what_has_replaced_a_file_is_not_opened(world: World, flags: int) -> None:
    """The caller's kernel has checked the permissions of the file that it looked up."""
    (world.source / "x").write_text("old")
    inode = world.node("x")
    os.replace(_written(world, "new"), world.source / "x")
    mount = world.mount()
    with pytest.raises(OSError, match="Stale") as error:
        mount.files.open(USER, inode.nodeid, flags)
    assert error.value.errno == errno.ESTALE
    with pytest.raises(OSError, match="Stale"):
        mount.getattr(USER, inode.nodeid)  # nor are its owner and mode given for the other's
    assert (world.source / "x").read_text() == "new"


def test_what_has_replaced_a_link_is_not_read(world: World) -> None:
    (world.source / "x").symlink_to("old")
    inode = world.node("x")
    (world.source / "tmp").symlink_to("new")
    os.replace(world.source / "tmp", world.source / "x")
    with pytest.raises(OSError, match="Stale"):
        world.mount().readlink(inode.nodeid)


def test_a_replaced_file_is_lost_once_only(world: World) -> None:
    """The kernel answers ESTALE with one more look-up and one more open, and reports to the program
    a second one. So what the second look-up finds is opened, replaced again or not.
    """
    mount = world.mount()
    (world.source / "x").write_text("0")
    entry = mount.lookup(USER, 1, b"x")
    for number in range(1, 30):
        os.replace(_written(world, f"{number}"), world.source / "x")
        with pytest.raises(OSError, match="Stale"):
            mount.files.open(USER, entry.inode.nodeid, os.O_RDONLY)
        again = mount.lookup(USER, 1, b"x")
        os.replace(_written(world, f"{number}+"), world.source / "x")
        assert mount.getattr(USER, again.inode.nodeid)[1].st_size == len(str(number))
        fh = mount.files.open(USER, again.inode.nodeid, os.O_RDONLY)
        assert mount.files.read(fh, 0, 10) == b"%d" % number
        mount.files.release(fh)
        assert not _open_files(world.source)
        world.export.fs.successors.close()  # as after a second in which nobody has lost any
        entry = mount.lookup(USER, 1, b"x")


def test_what_nobody_opens_is_let_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(successors, "HOLD", 2.0)  # also where the machine is busy
    mount = world.mount()
    for number in range(successors.HELD_LIMIT + 10):
        name = b"%d" % number
        path = world.source / name.decode()
        path.write_text("old")
        entry = mount.lookup(USER, 1, name)
        os.replace(_written(world, "new"), path)
        with pytest.raises(OSError, match="Stale"):
            mount.files.open(USER, entry.inode.nodeid, os.O_RDONLY)
        mount.lookup(USER, 1, name)
        assert 1 <= len(_open_files(world.source)) <= successors.HELD_LIMIT
    world.pump()
    deadline = world.export.next_deadline
    assert deadline <= time.monotonic() + successors.HOLD
    while _open_files(world.source):
        assert time.monotonic() < deadline + 30
        world.pump()
    assert world.export.next_deadline > deadline


def _open_files(source: Path) -> list[str]:
    """What the process has open below a directory."""
    paths = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in paths if path.startswith(f"{source}/")]


def test_a_sticky_directory_protects_what_has_taken_a_name(world: World) -> None:
    """The guest's kernel knows a file of the caller's there; it is somebody else's by now."""
    shared = world.source / "tmp.d"
    shared.mkdir()
    shared.chmod(0o1777)
    mount = world.mount(agent=False)
    user = Caller(1000, 1000, 4242, ())
    for name in ("x", "y", "d"):
        (shared / name).mkdir() if name == "d" else (shared / name).touch()
    node = mount.lookup(user, 1, b"tmp.d").inode.nodeid
    (world.source / "mine").touch()
    with pytest.raises(PermissionError):
        mount.unlink(user, node, b"x")
    with pytest.raises(PermissionError):
        mount.rmdir(user, node, b"d")
    with pytest.raises(PermissionError):
        mount.rename(user, node, b"x", node, b"z", 0)
    with pytest.raises(PermissionError):
        mount.rename(user, 1, b"mine", node, b"y", 0)
    for name in ("x", "d"):
        os.chown(shared / name, 1000, 1000)
    mount.rename(user, node, b"x", node, b"z", 0)
    mount.unlink(user, node, b"z")
    mount.rmdir(user, node, b"d")
    assert os.listdir(shared) == ["y"]


def test_a_directory_of_others_does_not_move_elsewhere(world: World) -> None:
    """The guest's kernel knows one of the caller's by the name."""
    for name in ("from", "to", "from/d", "from/mine"):
        (world.source / name).mkdir()
        if name != "from/d":
            os.chown(world.source / name, 1000, 1000)
    (world.source / "to/f").touch()
    mount = world.mount(agent=False)
    user = Caller(1000, 1000, 4242, ())
    old, new = (mount.lookup(user, 1, name).inode.nodeid for name in (b"from", b"to"))
    with pytest.raises(PermissionError):
        mount.rename(user, old, b"d", new, b"d", 0)
    with pytest.raises(PermissionError):
        mount.rename(user, new, b"f", old, b"d", syscalls.RENAME_EXCHANGE)
    mount.rename(user, old, b"d", old, b"e", 0)  # in its directory it may, as natively
    mount.rename(user, old, b"mine", new, b"mine", 0)


def _written(world: World, text: str) -> str:
    path = world.source / "tmp"
    path.write_text(text)
    return str(path)


def test_an_open_unlinked_file_is_reached_by_its_handle(world: World) -> None:
    mount = world.mount()
    entry, fh = mount.create(USER, 1, b"x", 0o644, os.O_RDWR | os.O_CREAT)
    mount.files.write(fh, 0, b"content")
    mount.unlink(USER, 1, b"x")
    (world.source / "x").write_text("another")
    assert mount.files.read(fh, 0, 100) == b"content"
    assert mount.getattr(USER, entry.inode.nodeid)[1].st_nlink == 0
    mount.setattr(USER, entry.inode.nodeid, Changes(size=3), None)
    assert mount.files.read(fh, 0, 100) == b"con"
    assert (world.source / "x").read_text() == "another"
    mount.files.release(fh)


# Reference counts


def test_a_count_below_zero_is_loud(world: World) -> None:
    (world.source / "x").touch()
    inode = world.node("x")
    with pytest.raises(LookupCountError, match="forgotten more often"):
        world.table.forget(inode.nodeid, 2)


def test_forgetting_what_is_unknown_is_nothing(world: World) -> None:
    world.table.forget(987654, 1)
    assert len(world.table) == 1


def test_every_answer_that_hands_out_a_node_counts_it(world: World) -> None:
    mount = world.mount()
    (world.source / "file").touch()
    entries = [
        mount.lookup(USER, 1, b"file"),
        mount.mkdir(USER, 1, b"d", 0o755),
        mount.mknod(USER, 1, b"n", stat.S_IFREG | 0o644, 0),
        mount.symlink(USER, 1, b"s", b"t"),
        mount.create(USER, 1, b"c", 0o644, os.O_RDWR | os.O_CREAT)[0],
    ]
    file = entries[0].inode
    assert mount.link(USER, file.nodeid, 1, b"l").inode is file
    assert file.lookups == 2
    assert all(entry.inode.lookups == 1 for entry in entries[1:])
    for entry in entries:
        mount.forget(entry.inode.nodeid, entry.inode.lookups)
    mount.close()
    assert len(world.table) == 1


def test_a_look_without_a_reference_stays_without_one(world: World) -> None:
    """Else a directory of a million names would be kept for ever by one readdir."""
    mount = world.mount()
    for i in range(50):
        (world.source / str(i)).touch()
    fh = mount.files.opendir(USER, 1)
    for i in range(50):
        entry = mount.files.entry(fh, b"%d" % i)
        assert entry is not None
        world.table.release(entry.inode)  # as the transport does when the kernel took no reference
    mount.files.release(fh)
    assert len(world.table) == 1


def test_events_hold_nothing_once_delivered(world: World) -> None:
    guest = world.observer()
    world.mark(guest, mask=ALL)
    for i in range(100):
        (world.source / f"f{i}").write_text("x")
        (world.source / f"d{i}").mkdir()
        os.rename(world.source / f"f{i}", world.source / f"d{i}/f")
        (world.source / f"d{i}/f").unlink()
        (world.source / f"d{i}").rmdir()
    assert len(world.take(guest)) > 500
    assert len(world.table) == 1
    assert world.root.pins == 1 + 1 + 1  # its own, the mark's, the watch's


def test_replays_hold_nothing_once_done(world: World) -> None:
    mount = world.mount()
    world.mark(mount.guest, mask=ALL)
    for i in range(50):
        (world.source / f"f{i}").write_text("x")
        os.rename(world.source / f"f{i}", world.source / f"g{i}")
        (world.source / f"g{i}").unlink()
    while world.orders(mount):
        pass
    assert not mount.guest.depth
    assert len(world.table) == 1


# What cannot be reached


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"nul\0byte", b"/etc"])
def test_a_name_is_one_component(world: World, name: bytes) -> None:
    mount = world.mount()
    for call in (
        lambda: mount.mkdir(USER, 1, name, 0o755),
        lambda: mount.unlink(USER, 1, name),
        lambda: mount.rename(USER, 1, b"x", 1, name, 0),
        lambda: mount.symlink(USER, 1, name, b"t"),
    ):
        with pytest.raises((OSError, ValueError)):
            call()
    assert os.listdir(world.source) == []


def test_dotdot_of_the_root_is_the_root(world: World) -> None:
    mount = world.mount()
    assert mount.lookup(USER, 1, b"..").inode is world.root


def test_a_symlink_leads_nowhere(world: World) -> None:
    outside = world.source.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    (world.source / "link").symlink_to(outside)
    mount = world.mount()
    entry = mount.lookup(USER, 1, b"link")
    assert stat.S_ISLNK(entry.attr.st_mode)
    with pytest.raises(OSError, match="directory"):
        mount.lookup(USER, entry.inode.nodeid, b"secret")
    with pytest.raises(OSError, match=r"symbolic|Too many"):
        mount.files.open(USER, entry.inode.nodeid, os.O_RDONLY)


def test_a_directory_replaced_by_a_symlink_in_a_race(world: World) -> None:
    """Known by handle, not by path: the old directory is meant, not where the link points."""
    outside = world.source.parent / "outside"
    outside.mkdir()
    (world.source / "d").mkdir()
    mount = world.mount()
    node = world.node("d")
    os.rename(world.source / "d", world.source / "aside")
    (world.source / "d").symlink_to(outside)
    mount.mkdir(USER, node.nodeid, b"made", 0o755)
    assert os.listdir(outside) == []
    assert os.listdir(world.source / "aside") == ["made"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_is_reached_after_its_directory_moved(world: World, is_replaced: bool) -> None:
    """Its path as last known leads nowhere, or to another file."""
    (world.source / "d").mkdir()
    (world.source / "d/f").write_text("own")
    mount = world.mount()
    node = world.node("d/f")
    os.rename(world.source / "d", world.source / "moved")
    if is_replaced:
        (world.source / "d").mkdir()
        (world.source / "d/f").write_text("another's")
    assert mount.getattr(USER, node.nodeid)[1].st_size == len("own")
    fh = mount.files.open(USER, node.nodeid, os.O_RDONLY)
    assert mount.files.read(fh, 0, 10) == b"own"


def test_a_directory_above_a_file_replaced_by_a_symlink(world: World) -> None:
    outside = world.source.parent / "outside"
    outside.mkdir()
    (world.source / "d").mkdir()
    (world.source / "d/f").write_text("own")
    os.link(world.source / "d/f", outside / "f")
    node = world.node("d/f")
    os.rename(world.source / "d", world.source / "moved")
    (world.source / "d").symlink_to(outside)
    with world.table.reach.opened(node) as fd:
        assert syscalls.shown_path(fd) == os.fsencode(world.source / "moved/f")


def test_hard_links_are_one_inode_with_two_names(world: World) -> None:
    (world.source / "one").write_text("x")
    os.link(world.source / "one", world.source / "two")
    assert world.node("one") is world.node("two")
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE | int(Mask.MODIFY))
    with open(world.source / "one", "a") as file:
        file.write("y")
    (world.source / "one").unlink()
    with open(world.source / "two", "a") as file:
        file.write("y")
    assert plain(world.take(guest)) == [(b"one", "modify"), (b"one", "delete"), (b"two", "modify")]
    assert (world.source / "two").read_bytes() == b"xyy"
    assert world.export.fs.getattr(world.node("two")).st_nlink == 1


def test_a_handle_is_of_one_object(world: World) -> None:
    """The host's own file handle is the identity: it changes where the inode number is reused."""
    (world.source / "x").touch()
    fd = os.open(world.source / "x", os.O_PATH)
    handle = syscalls.file_handle(fd)
    os.close(fd)
    assert handle == world.node("x").identity.handle
