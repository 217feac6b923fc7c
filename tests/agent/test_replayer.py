"""Orders of a server that is not to be trusted, on real directories: whatever they say, nothing
outside of the mount changes, no descriptor is left behind, and the next order works.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest_tools import beneath, kernel
from guest_tools.agent.replayer import Replayer
from protocol.frames import ALIAS, CONTROL, FSD_DIR, ROOT, STAGING, Op, Order
from protocol.masks import Mask

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, which only root can")
DIR, FILE, LINK, DEVICE = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR
EXCHANGE = 2
LIMIT = 8


def order(op: int, name: bytes, path: bytes, mode: int = FILE, arg: int = 0, **more: int) -> Order:
    """An order for a name in the directory ``path``, whose handle leads nowhere. A rename goes to
    ``new`` there.
    """
    name2 = b"new" if op == Op.RENAME else b""
    nodeid = 99 if path else ROOT
    fields = {"seq": 1, "nodeid": nodeid, "generation": 0, "nodeid2": nodeid, "generation2": 0}
    fields |= more
    return Order(op=op, mode=mode, arg=arg, name=name, name2=name2, path=path, path2=path, **fields)


def acts(name: bytes, path: bytes) -> Iterator[Order]:
    """Everything that an order can do to a name."""
    for mode in (FILE, DIR, LINK, DEVICE, 0xFFFF_FFFF):
        for op in (Op.CREATE, Op.REMOVE, Op.RENAME, Op.OPEN, Op.LONE_CLOSE):
            yield order(op, name, path, mode)
    yield order(Op.RENAME, name, path, FILE, EXCHANGE)
    yield order(Op.OPEN, name, path, FILE, 1)
    for mask in (Mask.ACCESS, Mask.MODIFY, Mask.ATTRIB):
        yield order(Op.TOUCH, name, path, FILE, int(mask))


def picture(top: Path) -> dict[str, tuple[object, ...]]:
    """All that is below, with its times."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(top):
        for name in (".", *names, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            read = 0 if stat.S_ISDIR(status.st_mode) else status.st_atime_ns  # we list directories
            times = status.st_mtime_ns, status.st_ctime_ns, read
            found[path] = (status.st_ino, status.st_mode, status.st_size, *times)
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=[True, False], ids=["openat2", "step by step"])
def places(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Path, Path]:
    """The mount, and what lies outside; both have the same names."""
    has: bool = request.param
    monkeypatch.setattr(beneath, "has_openat2", lambda: has)
    share, outside = tmp_path / "share", tmp_path / "outside"
    for top in (share / "d", outside):
        (top / "dir").mkdir(parents=True)
        (top / "file").write_text("content")
    for hidden in ("staging", "alias"):
        (share / ".fsd" / hidden).mkdir(parents=True)
    return share, outside


@pytest.fixture
def replayer(places: tuple[Path, Path]) -> Iterator[Replayer]:
    share, _ = places
    root, channel = os.open(share, os.O_PATH), os.open(share, os.O_RDONLY)

    def visible() -> int:
        return os.open(share, os.O_PATH | os.O_DIRECTORY)

    before = descriptors() - 1
    replayer = Replayer(root, visible, channel, LIMIT)
    yield replayer
    replayer.close()
    assert descriptors() == before
    os.close(channel)


def hurts_nobody(replayer: Replayer, share: Path, outside: Path, orders: Iterator[Order]) -> None:
    before = picture(outside)
    for hostile in orders:
        open_ones = descriptors()
        assert replayer.execute(hostile) != 0, hostile
        assert picture(outside) == before, hostile
        assert replayer.execute(order(Op.CREATE, b"honest", b"")) == 0
        (share / "honest").unlink()
        replayer.batch_done()
        assert descriptors() <= open_ones


def test_links_lead_nowhere(places: tuple[Path, Path], replayer: Replayer) -> None:
    share, outside = places
    (share / "link").symlink_to(outside)
    (share / "d/up").symlink_to("../..")
    for path in (b"link", b"d/up/outside"):
        for name in (b"file", b"dir", b"made"):
            hurts_nobody(replayer, share, outside, acts(name, path))


@pytest.mark.parametrize(
    "path",
    [b"..", b"../outside", b"/", b"/etc", b"d/..", b"d/../../outside", b".", b"d//dir", b"d/",
     b"\0", b"d\0", b"n" * 5000, b"d/" * 3000],
)  # fmt: skip
def test_paths_that_no_honest_server_gives(
    places: tuple[Path, Path], replayer: Replayer, path: bytes
) -> None:
    hurts_nobody(replayer, *places, acts(b"file", path))


@pytest.mark.parametrize(
    "name", [b".", b"..", b"/", b"../outside/file", b"../../outside/dir", b"dir/x", b"a\0b", b"\0"]
)
def test_names_that_no_honest_server_gives(
    places: tuple[Path, Path], replayer: Replayer, name: bytes
) -> None:
    share, outside = places
    hurts_nobody(replayer, share, outside, acts(name, b"d"))
    to = order(Op.RENAME, b"file", b"d")._replace(name2=name)
    hurts_nobody(replayer, share, outside, iter([to]))
    for hidden in (STAGING, ALIAS):
        there = (one._replace(nodeid=hidden, nodeid2=hidden) for one in acts(name, b""))
        hurts_nobody(replayer, share, outside, there)


def test_what_no_way_leads_to_is_not_the_root(
    places: tuple[Path, Path], replayer: Replayer
) -> None:
    """A directory that is gone has no path: what was in it is not looked for in the root."""
    share, outside = places
    for name in ("file", "dir"):
        (share / name).mkdir() if name == "dir" else (share / name).touch()
        lost = (one._replace(nodeid=99, nodeid2=99) for one in acts(name.encode(), b""))
        hurts_nobody(replayer, share, outside, lost)
        assert (share / name).exists()
    assert replayer.execute(order(Op.REMOVE, b"file", b"", nodeid=99)) == errno.ESTALE
    to_nowhere = order(Op.RENAME, b"file", b"")._replace(nodeid2=99)
    assert replayer.execute(to_nowhere) == errno.ESTALE
    assert sorted(os.listdir(share)) == [".fsd", "d", "dir", "file"]


def test_numbers_that_no_honest_server_gives(places: tuple[Path, Path], replayer: Replayer) -> None:
    most = (1 << 64) - 1
    strange = [
        order(Op.CREATE, b"", b"d"),
        order(Op.REMOVE, b"", b"d", DIR),
        order(Op.RENAME, b"", b"d", DIR),
        *(order(op, b"file", b"d") for op in (0, 7, 255)),
        *(order(Op.RENAME, b"file", b"d", FILE, flags) for flags in (1, 3, 4, 6, 1 << 32, most)),
        *(order(Op.REMOVE, b"file", b"", FILE, nodeid=n) for n in (CONTROL, FSD_DIR + 99, most)),
        order(Op.REMOVE, b"none", b"none", FILE, generation=most),
        order(Op.RENAME, b"file", b"d", FILE, nodeid2=most),
    ]
    hurts_nobody(replayer, *places, iter(strange))
    assert replayer.execute(order(Op.CLOSE, b"", b"", arg=most)) == 0


def test_the_last_component_is_not_followed(places: tuple[Path, Path], replayer: Replayer) -> None:
    share, outside = places
    before = picture(outside)
    (share / "d/to").symlink_to(outside / "file")
    for mask in (Mask.ACCESS, Mask.MODIFY, Mask.ATTRIB):
        assert replayer.execute(order(Op.TOUCH, b"to", b"d", LINK, int(mask))) == 0
    assert replayer.execute(order(Op.OPEN, b"to", b"d")) != 0
    assert replayer.execute(order(Op.RENAME, b"to", b"d", LINK)) == 0
    assert os.readlink(share / "d/new") == str(outside / "file")
    assert replayer.execute(order(Op.REMOVE, b"new", b"d", LINK)) == 0
    assert not os.path.lexists(share / "d/new")
    assert picture(outside) == before


def test_devices_are_not_opened(places: tuple[Path, Path], replayer: Replayer) -> None:
    share, _ = places
    os.mkfifo(share / "d/pipe")
    if os.geteuid() == 0:
        os.mknod(share / "d/device", DEVICE | 0o600, os.makedev(1, 3))
    for name in (b"pipe", b"device"):
        for writing in (0, 1):
            assert replayer.execute(order(Op.OPEN, name, b"d", FILE, writing)) != 0


# Volumes


def volume(kind: str, places: tuple[Path, Path]) -> Path:
    """Mount something over d, or over a file in it."""
    share, outside = places
    over = share / ("d/file" if kind == "file" else "d")
    what = {"directory": outside, "file": outside / "file", "share": share / ".fsd"}.get(kind)
    how = ["-t", "tmpfs", "volume"] if what is None else ["--bind", str(what)]
    subprocess.run(["mount", *how, over], check=True)
    if kind in ("tmpfs", "share"):
        (over / "dir").mkdir()
        (over / "file").write_text("content")
    return over


@AS_ROOT
@pytest.mark.parametrize("kind", ["tmpfs", "directory", "share", "file"])
def test_a_volume_is_left_alone(places: tuple[Path, Path], replayer: Replayer, kind: str) -> None:
    """Where there is no private copy of the mount."""
    share, _ = places
    over = volume(kind, places)
    try:
        before = picture(over) if over.is_dir() else os.stat(over)
        for name in (b"file", b"dir", b"made") if kind != "file" else (b"file",):
            for act in acts(name, b"d"):
                if kind == "file" and act.op == Op.CREATE:
                    continue
                assert replayer.execute(act) != 0, act
                now = picture(over) if over.is_dir() else os.stat(over)
                assert now == before, act
    finally:
        replayer.batch_done()
        subprocess.run(["umount", over], check=True)
    assert replayer.execute(order(Op.REMOVE, b"file", b"d")) == 0
    assert not (share / "d/file").exists()


@AS_ROOT
@pytest.mark.parametrize("kind", ["tmpfs", "directory", "share", "file"])
@pytest.mark.parametrize("visibly", [True, False])
def test_what_a_volume_covers_is_reached_privately(
    places: tuple[Path, Path], kind: str, visibly: bool
) -> None:
    share, _ = places
    subprocess.run(["mount", "--bind", share, share], check=True)
    private, channel = kernel.clone_mount(str(share)), os.open(share, os.O_RDONLY)
    below = os.open("d", os.O_RDONLY, dir_fd=private)
    replayer = Replayer(private, lambda: os.open(share, os.O_PATH), channel, LIMIT, is_copy=True)
    over = volume(kind, places)
    try:
        before = picture(over) if over.is_dir() else os.stat(over)
        replayer.visibly = visibly
        replayer.batch_begins([])
        assert replayer.execute(order(Op.TOUCH, b"file", b"d", FILE, int(Mask.MODIFY))) == 0
        assert replayer.execute(order(Op.OPEN, b"file", b"d")) == 0
        assert replayer.execute(order(Op.CLOSE, b"", b"", arg=1)) == 0
        assert replayer.execute(order(Op.RENAME, b"dir", b"d", DIR)) == 0
        assert replayer.execute(order(Op.CREATE, b"made", b"d")) == 0
        if kind != "file":
            assert replayer.execute(order(Op.REMOVE, b"file", b"d")) == 0
            assert sorted(os.listdir(below)) == ["made", "new"]
        assert (picture(over) if over.is_dir() else os.stat(over)) == before
        # Elsewhere it continues through the mountpoint, if it is to.
        assert replayer.execute(order(Op.CREATE, b"beside", b"")) == 0
        assert (share / "beside").exists()
    finally:
        replayer.close()
        for fd in (below, channel):
            os.close(fd)
        subprocess.run(["umount", over], check=True)
        subprocess.run(["umount", share], check=True)


@AS_ROOT
@pytest.mark.parametrize("kind", ["pipe", "link", "device"])
def test_a_private_copy_opens_nothing_but_files_and_directories(
    places: tuple[Path, Path], kind: str
) -> None:
    share, outside = places
    place = share / "d/place"
    make: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(place),
        "link": lambda: os.symlink(outside, place),
        "device": lambda: os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    }
    make[kind]()
    subprocess.run(["mount", "--bind", share, share], check=True)
    private, channel = kernel.clone_mount(str(share)), os.open(share, os.O_RDONLY)
    replayer = Replayer(private, lambda: os.open(share, os.O_PATH), channel, LIMIT, is_copy=True)
    try:
        assert os.fstatvfs(private).f_flag & os.ST_NODEV
        assert not os.statvfs(share).f_flag & os.ST_NODEV  # of the copy alone
        before = descriptors()
        refused = (errno.EINVAL, errno.ELOOP, errno.EACCES)
        assert replayer.execute(order(Op.OPEN, b"place", b"d")) in refused
        assert descriptors() <= before
        assert replayer.execute(order(Op.OPEN, b"file", b"d")) == 0
    finally:
        replayer.close()
        os.close(channel)
        subprocess.run(["umount", share], check=True)


# Descriptors


def test_open_files_are_bounded(places: tuple[Path, Path], replayer: Replayer) -> None:
    for seq in range(1, LIMIT + 1):
        assert replayer.execute(order(Op.OPEN, b"file", b"d", seq=seq)) == 0
    assert replayer.execute(order(Op.OPEN, b"file", b"d", seq=50)) == errno.EMFILE
    closing = order(Op.CLOSE, b"", b"", arg=51)
    replayer.batch_begins([closing])
    assert replayer.execute(order(Op.OPEN, b"file", b"d", seq=50)) == errno.EMFILE
    assert replayer.execute(order(Op.OPEN, b"file", b"d", seq=51)) == 0  # its CLOSE is at hand
    assert replayer.execute(closing) == 0
    assert replayer.execute(order(Op.CLOSE, b"", b"", arg=1)) == 0
    assert replayer.execute(order(Op.OPEN, b"file", b"d", seq=52)) == 0
    before = descriptors()
    assert replayer.execute(order(Op.OPEN, b"file", b"d", seq=52)) == errno.EMFILE
    assert descriptors() <= before


def test_directories_of_a_batch_are_bounded(places: tuple[Path, Path], replayer: Replayer) -> None:
    share, _ = places
    before = descriptors()
    for number in range(200):
        (share / f"d{number}").mkdir()
        path = b"d%d" % number
        assert replayer.execute(order(Op.CREATE, b"x", path, nodeid=1000 + number)) == 0
    assert descriptors() - before < 100
    replayer.batch_done()
    assert descriptors() == before


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EIO])
@pytest.mark.parametrize(
    "wrapper",
    ["os.open", "os.mkdir", "os.mknod", "os.symlink", "os.unlink", "os.rmdir", "kernel.touch",
     "kernel.renameat2", "kernel.kind_of", "kernel.mount_id", "beneath.openat2"],
)  # fmt: skip
def test_a_call_that_fails(
    places: tuple[Path, Path], replayer: Replayer, monkeypatch: pytest.MonkeyPatch,
    wrapper: str, number: int,
) -> None:  # fmt: skip
    """Each order that needs it fails with that error, none escapes as an exception."""
    share, outside = places
    owner = {"os": os, "kernel": kernel, "beneath": beneath}[wrapper.partition(".")[0]]
    before = picture(outside)
    fds = descriptors()

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    def each(check: Callable[[int], bool]) -> None:
        for mode, name in ((FILE, b"file"), (DIR, b"dir"), (LINK, b"link")):
            for one in (
                order(Op.CREATE, b"x" + name, b"d", mode),
                order(Op.TOUCH, name, b"d", mode, int(Mask.ATTRIB)),
                order(Op.RENAME, b"x" + name, b"d", mode)._replace(name2=b"y" + name),
                order(Op.REMOVE, b"y" + name, b"d", mode),
            ):
                assert check(replayer.execute(one)), one
        assert check(replayer.execute(order(Op.OPEN, b"file", b"d")))
        replayer.execute(order(Op.CLOSE, b"", b"", arg=1))

    (share / "d/link").symlink_to("file")
    replayer.batch_begins([])
    with monkeypatch.context() as context:
        context.setattr(owner, wrapper.partition(".")[2], fail)
        each(lambda result: result in (0, number, errno.ENOENT, errno.EEXIST))
        replayer.batch_done()
    for left in (share / "d").glob("[xy]*"):
        left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()
    replayer.batch_done()
    each(lambda result: result == 0)
    replayer.batch_done()
    assert picture(outside) == before
    assert descriptors() == fds
