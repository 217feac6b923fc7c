"""A real server without descriptors, and one that may not look: neither says that things are gone.

The table of all calls that may fail is test_failing_calls; here they fail by the kernel's own word.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fsd.events import reading
from fsd.export import watches
from fsd.files.recall import recall
from fsd.linux import directories
from protocol.masks import Mask

from .support import ALL, USER, WHOLE, World, plain, settle

NOBODY = 65534
AS_NOBODY = """
import os, sys
from pathlib import Path
from tests.core.support import ALL, World, plain
os.setgroups([]); os.setgid(65534); os.setuid(65534)
world = World(Path(sys.argv[1]))
guest = world.observer()
sub = world.mark(guest, "sub")
os.chmod(world.source / "sub", int(sys.argv[2], 8))
world.take(guest)
world.export.recovery.resync(world.export.watcher.inodes())
reported = plain(world.take(guest))
assert not [event for event in reported if "delete" in event[1]], reported
assert (sub in world.export.watches.unwatched) == (sys.argv[2] != "0755")
os.chmod(world.source / "sub", 0o755)
(world.source / "sub/new").touch()
world.pump()
world.export.watches.look_again_at = 0.0
reported = plain(world.take(guest))
assert (b"sub/new", "create") in reported, reported
assert not [event for event in reported if "delete" in event[1]], reported
assert not world.export.watches.unwatched
world.close()
print("done")
"""


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Every one is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    try:
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def tree(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two directories with files; what is refused is tried again at once."""
    for directory in ("sub", "other"):
        (world.source / directory).mkdir()
        for name in "abc":
            (world.source / directory / name).write_text("x")
    monkeypatch.setattr(watches, "COMPARE_EVERY", 0.0)
    return world


def test_a_comparison_without_descriptors(tree: World) -> None:
    guest = tree.observer()
    sub = tree.mark(guest, "sub")
    file = tree.mark(guest, "sub/a")
    tree.take(guest)
    settle(tree.source)
    tree.export.recovery.resync(tree.export.watcher.inodes())
    tree.take(guest)
    with no_descriptors():
        tree.export.recovery.resync(tree.export.watcher.inodes())
        assert tree.export.watches.unwatched[sub] == os.strerror(errno.EMFILE)
        assert tree.export.counts["looks_failed"]
        assert not tree.taken(guest)
    assert not tree.take(guest)
    assert not tree.export.watches.unwatched
    assert tree.host_mask(file)
    (tree.source / "sub/new").touch()
    (tree.source / "sub/a").unlink()
    reported = plain(tree.take(guest))
    assert {(b"sub/new", "create"), (b"sub/a", "delete")} <= set(reported)


def test_a_mark_that_is_set_without_descriptors(tree: World) -> None:
    """It holds; the guest learns that it is not watched yet, and it is as soon as possible."""
    guest, other = tree.observer(), tree.node("other")
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files") as caught:
            tree.export.update(guest, other.key, ALL)
        assert caught.value.errno == errno.ENOSPC
        assert not tree.host_mask(other)
    tree.take(guest)
    assert tree.host_mask(other)
    (tree.source / "other/new").touch()
    assert (b"other/new", "create") in plain(tree.take(guest))


def test_a_tree_that_is_covered_without_descriptors(tree: World) -> None:
    """Interest in the whole file system reaches all directories in the end."""
    guest = tree.observer()
    tree.node("sub")
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        tree.export.update(guest, WHOLE, int(Mask.CREATE))
    tree.take(guest)
    assert not tree.export.watches.unwatched
    for directory in ("sub", "other"):
        (tree.source / directory / "new").touch()
    reported = plain(tree.take(guest))
    assert {(b"sub/new", "create"), (b"other/new", "create")} <= set(reported)


def test_requests_without_descriptors(tree: World) -> None:
    """They fail for that reason, and names stay in listings."""
    mount = tree.mount(agent=False)
    sub, file = tree.node("sub"), tree.node("sub/a")
    fh = mount.files.opendir(USER, sub.nodeid)
    with no_descriptors():
        requests: list[Callable[[], object]] = [
            lambda: mount.lookup(USER, sub.nodeid, b"b"),
            lambda: mount.files.open(USER, file.nodeid, os.O_RDONLY),
            lambda: mount.mkdir(USER, sub.nodeid, b"new", 0o755),
            lambda: mount.unlink(USER, sub.nodeid, b"a"),
            lambda: recall(tree.table, sub.nodeid),
        ]
        for request in requests:
            with pytest.raises(OSError, match="Too many open files"):
                request()
        names = {entry.name for entry in mount.files.names(fh, 0)[1]}
        assert names == {b".", b"..", b"a", b"b", b"c"}
        assert mount.files.entry(fh, b"a") is None
    mount.files.release(fh)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", ["0300", "0444", "0000", "0755"])
def test_a_directory_that_an_ordinary_users_server_may_not_read(mode: str) -> None:
    with TemporaryDirectory() as top:
        source = Path(top)
        (source / "sub").mkdir()
        for name in "abc":
            (source / "sub" / name).touch()
        for path in (source, source / "sub"):
            os.chown(path, NOBODY, NOBODY)
        line = [sys.executable, "-c", AS_NOBODY, top, mode]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == "done\n", done.stderr


def test_a_name_of_unknown_type_is_a_name(tree: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems that say no types, in a directory that may be read and not entered."""
    sub = tree.mark(tree.observer(), "sub")
    fd = os.open(tree.source / "sub", os.O_RDONLY)
    real = directories.read

    def typeless(fd: int, size: int) -> list[directories.DirEntry]:
        return [entry._replace(type=0) for entry in real(fd, size)]

    monkeypatch.setattr(directories, "read", typeless)
    monkeypatch.setattr(reading, "_kind", lambda *_: 0)
    names = reading.read(fd)
    os.close(fd)
    assert set(names) == {b"a", b"b", b"c"}
    assert {known.kind for known in names.values()} == {0}
    guest = tree.observer("after")
    tree.export.update(guest, sub.key, ALL)
    tree.export.recovery.resync(tree.export.watcher.inodes())
    assert not [event for event in plain(tree.take(guest)) if "delete" in event[1]]
