"""What the kernel or the server reads for itself is nobody's event, where directories move and the
kernel has dropped their dentries. On a file system of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsd.files.inode import Inode
from fsd.guests.guest import Observer
from fsd.pacing import windows
from harness.dentries import drop_dentries

from .support import World, plain

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and drop dentries")
PATHS = ("", "a", "a/b", "a/b/c", "d")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 8 MiB."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        for path in PATHS:
            (disk / path).mkdir(exist_ok=True, parents=True)
            (disk / path / "file").touch()
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def tree(disk: Path) -> Iterator[World]:
    world = World(disk)
    yield world
    world.close()


@pytest.mark.parametrize("warm", [0.0, 3600.0], ids=["used long ago", "just used"])
def test_a_directory_is_reached_without_a_trace_above_it(
    tree: World, monkeypatch: pytest.MonkeyPatch, warm: float
) -> None:
    """By its handle alone the kernel would look for its names, in directories that are watched."""
    monkeypatch.setattr(windows, "WARM", warm)
    mount = tree.mount()
    directories = [tree.mark(mount.guest, path) for path in PATHS]
    tree.orders(mount)
    drop_dentries(tree.source)
    seen = tree.export.watcher.events_in
    for directory in reversed(directories):
        tree.export.fs.lookup(directory, b"file")
    tree.pump()
    assert tree.export.watcher.events_in == seen


def _all_marked(tree: World) -> tuple[Observer, dict[str, Inode]]:
    observer = tree.observer()
    marked = {path: tree.mark(observer, path) for path in PATHS}
    assert not tree.take(observer)
    return observer, marked


def _kinds(tree: World, observer: Observer) -> set[str]:
    return {kinds for _, kinds in plain(tree.take(observer))}


MOVES = {"moved_from,isdir", "moved_to,isdir", "move_self", "move_self,isdir"}


def test_the_names_of_a_directory_that_moved_are_read_without_an_event(tree: World) -> None:
    """Those of the watch on the directory that it is in now have its new name."""
    observer, marked = _all_marked(tree)
    directory = marked["a/b/c"]
    (tree.source / "a/b/c").rename(tree.source / "d/moved")
    for names in tree.export.reader.names_in(directory):
        assert b"file" in names
        (tree.source / "d/moved").rename(tree.source / "a/again")
    assert _kinds(tree, observer) <= MOVES


def test_others_look_at_directories_meanwhile(tree: World) -> None:
    """That is the host's."""
    observer, marked = _all_marked(tree)
    directory = marked["a/b/c"]
    for _ in tree.export.reader.names_in(directory):
        os.listdir(tree.source / "d")
    assert "open,isdir" in _kinds(tree, observer)
