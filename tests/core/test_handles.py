"""File handles of the mount: LOOKUP of "." and ".." for nodes that the guest has forgotten."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsd.files import forgotten as forgotten_objects
from fsd.files.inode import Inode
from fsd.fuse.operations import Operations
from protocol.handles import NodeKey

from .support import USER, World


@pytest.fixture(params=["handles", "paths"])
def mount(request: pytest.FixtureRequest, world: World) -> Operations:
    """The host's file system opens handles, or only makes them."""
    world.table.reach.by_handle = request.param == "handles"
    return world.mount(agent=False)


def forgotten(mount: Operations, path: str) -> NodeKey:
    """The key of a path, looked up step by step and forgotten in the order of a shrinking cache."""
    held: list[Inode] = []
    for name in path.encode().split(b"/"):
        above = held[-1].nodeid if held else 1
        held.append(mount.lookup(USER, above, name).inode)
    key = held[-1].key
    for inode in reversed(held):
        mount.forget(inode.nodeid, 1)
    assert len(mount.export.table) == 1
    return key


def recalled(mount: Operations, key: NodeKey) -> Inode:
    inode = mount.lookup(USER, key.nodeid, b".").inode
    if inode.key != key:  # the kernel's own comparison (fs/fuse/inode.c, fuse_get_dentry)
        mount.forget(inode.nodeid, 1)
        raise OSError(errno.ESTALE, "another generation")
    return inode


def refused(mount: Operations, key: NodeKey) -> None:
    before = len(mount.export.table)
    with pytest.raises(OSError, match=r".") as error:
        recalled(mount, key)
    assert error.value.errno == errno.ESTALE
    assert len(mount.export.table) == before


def test_a_forgotten_node_is_found_again(mount: Operations, world: World) -> None:
    (world.source / "a/b").mkdir(parents=True)
    (world.source / "a/b/f").write_text("x")
    for path in ("a/b/f", "a/b", "a"):
        key = forgotten(mount, path)
        inode = recalled(mount, key)
        assert inode.path() == path.encode()
        assert world.export.fs.getattr(inode).st_ino == (world.source / path).stat().st_ino
        mount.forget(inode.nodeid, 1)
        assert len(world.table) == 1


def test_its_directories_too(mount: Operations, world: World) -> None:
    (world.source / "a/b").mkdir(parents=True)
    key = forgotten(mount, "a/b")
    inode = recalled(mount, key)
    above = mount.lookup(USER, inode.nodeid, b"..").inode
    assert above.path() == b"a"
    assert mount.lookup(USER, above.nodeid, b"..").inode is world.root
    above_forgotten = mount.lookup(USER, forgotten_again(mount, inode, above), b"..").inode
    assert above_forgotten.path() == b"a"


def forgotten_again(mount: Operations, inode: Inode, above: Inode) -> int:
    mount.forget(inode.nodeid, 1)
    mount.forget(above.nodeid, 1)
    mount.forget(1, 1)
    assert len(mount.export.table) == 1
    return inode.nodeid


@pytest.mark.parametrize("path", ["a/b/f", "a/b"])
def test_where_the_host_has_moved_it(path: str, mount: Operations, world: World) -> None:
    (world.source / "a/b").mkdir(parents=True)
    (world.source / "a/b/f").write_text("x")
    key = forgotten(mount, path)
    (world.source / path).rename(world.source / "moved")
    if not world.table.reach.by_handle:
        refused(mount, key)  # nothing leads to it; a look-up of its name does
        assert world.node("moved").key == key
        return
    inode = recalled(mount, key)
    assert inode.path() == b"moved"
    assert mount.lookup(USER, key.nodeid, b"..").inode is world.root


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_removed_is_stale(kind: str, mount: Operations, world: World) -> None:
    path = world.source / "x"
    make, remove = (path.touch, path.unlink) if kind == "file" else (path.mkdir, path.rmdir)
    make()
    key = forgotten(mount, "x")
    remove()
    refused(mount, key)
    make()  # often with the same inode number
    refused(mount, key)


def test_what_left_the_export_is_stale(mount: Operations, world: World, tmp_path: Path) -> None:
    (world.source / "f").touch()
    (world.source / "d").mkdir()
    for name in ("f", "d"):
        key = forgotten(mount, name)
        (world.source / name).rename(tmp_path / name)
        refused(mount, key)
        (world.source / "held").mkdir(exist_ok=True)
        held = mount.lookup(USER, 1, b"held").inode
        (world.source / "held").rename(tmp_path / f"held-{name}")
        refused(mount, held.key)  # not even while it is held
        mount.forget(held.nodeid, 1)


def test_unknown_nodes_are_stale(mount: Operations) -> None:
    for nodeid in (2, 4711, 1 << 62, (1 << 63) - 1):
        with pytest.raises(OSError, match=r".") as error:
            mount.lookup(USER, nodeid, b".")
        assert error.value.errno == errno.ESTALE


def test_memory_is_bounded(
    mount: Operations, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten_objects, "FORGOTTEN_LIMIT", 3)
    keys = []
    for name in "abcde":
        (world.source / name).touch()
        keys.append(forgotten(mount, name))
    for key in keys[:2]:
        refused(mount, key)
    for key in keys[2:]:
        mount.forget(recalled(mount, key).nodeid, 1)


def test_synthetic_nodeids_are_stable(mount: Operations, world: World) -> None:
    """An object whose number was taken when it came keeps its own nodeid, also when forgotten."""
    (world.source / "x").touch()
    old = mount.lookup(USER, 1, b"x").inode
    for _ in range(100):
        (world.source / "x").unlink()
        (world.source / "x").touch()
        if (world.source / "x").stat().st_ino == old.identity.ino:
            break
    else:
        pytest.skip("this file system does not reuse inode numbers")
    new = mount.lookup(USER, 1, b"x").inode
    key = new.key
    assert key.nodeid != old.nodeid
    mount.forget(key.nodeid, 1)
    assert recalled(mount, key).key == key
    mount.forget(key.nodeid, 1)
    mount.forget(old.nodeid, 1)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A file system that makes handles and opens none (overlayfs without nfs_export)."""
    if os.geteuid() != 0:
        pytest.skip("mounts an overlay")
    for name in ("lower", "upper", "work", "source"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{n}dir={tmp_path / n}" for n in ("lower", "upper", "work"))
    options += ",nfs_export=off"
    subprocess.run(
        [
            "mount",
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"{options},nfs_export=off",
            tmp_path / "source",
        ],
        check=True,
    )
    try:
        yield tmp_path / "source"
    finally:
        subprocess.run(["umount", tmp_path / "source"], check=True)


def test_a_file_system_that_only_makes_handles(overlay: Path) -> None:
    world = World(overlay)
    try:
        assert not world.table.reach.by_handle
        mount = world.mount(agent=False)
        (overlay / "d").mkdir()
        (overlay / "d/f").touch()
        key = forgotten(mount, "d/f")
        inode = recalled(mount, key)
        assert inode.identity.handle, "no handle at all"
        assert inode.key == key
        mount.forget(inode.nodeid, 1)
        generations = set()
        for _ in range(20):
            (overlay / "d/f").unlink()
            (overlay / "d/f").touch()
            generations.add(forgotten(mount, "d/f"))
            refused(mount, key)
        assert len(generations) == 20
    finally:
        world.close()
