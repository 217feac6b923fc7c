"""Every POSIX case over a native directory, the oracle, and over the mount, without exclusions; as
root also under an ordinary user's ids. (test_libfuse.py has the same map over the other transport,
test_posix_user.py over an ordinary user's mounts.) Then what needs the mount's own surroundings:
its root, and ways out of it.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.mounts import mounted, wait_until
from tests.mount.posix_cases import CASES, run_case
from tests.mount.posix_parameters import PARAMETERS
from tests.mount.posix_support import (
    RENAME_EXCHANGE,
    Child,
    User,
    fails,
    mkdir,
    opened,
    renameat2,
    write,
)
from tests.mount.sides import Sides, two_sides

ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def oracle() -> Iterator[Sides]:
    with two_sides() as both:
        yield both


@pytest.fixture(scope="module", params=["never", "coherent"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    """By --cache. Natively and over the other transports: see the tests of those."""
    with two_sides(f"--cache={request.param}") as both:
        yield both


@pytest.mark.parametrize(("name", "user"), PARAMETERS)
def test_native(name: str, user: User | None, oracle: Sides) -> None:
    """A case that fails here is wrong itself."""
    d = oracle.native / name
    try:
        run_case(CASES[name], d, d, user)
    finally:
        shutil.rmtree(d)


@pytest.mark.parametrize(("name", "user"), PARAMETERS)
def test_mount(name: str, user: User | None, sides: Sides) -> None:
    d, host = sides.mount.mountpoint / name, sides.mount.source / name
    try:
        run_case(CASES[name], d, host, user)
    finally:
        sides.check_alive()
        shutil.rmtree(d)
    assert not host.exists()


# -- the root of the mount, and ways out of it -----------------------------------------------------


def test_root_inode(sides: Sides) -> None:
    mount = sides.mount
    assert mount.mountpoint.stat().st_ino == mount.source.stat().st_ino
    assert mount.mountpoint.stat().st_dev != mount.source.stat().st_dev
    assert os.path.ismount(mount.mountpoint)
    with opened(mount.mountpoint) as fd:
        assert os.fstat(fd).st_ino == mount.source.stat().st_ino


def test_dotdot_of_the_root(sides: Sides) -> None:
    """It is the guest's own parent; the server is never asked for the source's."""
    mount = sides.mount
    secret = write(mount.source.parent / "outside", b"x")
    assert (mount.mountpoint / "..").samefile(mount.mountpoint.parent)
    with opened(mount.mountpoint) as fd, opened("..", at=fd) as parent:
        assert os.fstat(parent).st_ino == mount.mountpoint.parent.stat().st_ino
        assert "mount" in os.listdir(parent)
    secret.unlink()


def test_nothing_moves_across_the_mount(sides: Sides) -> None:
    mount = sides.mount
    inside, outside = write(mount.mountpoint / "f"), write(mount.source.parent / "outside")
    for old, new in ((inside, outside.parent / "g"), (outside, mount.mountpoint / "g")):
        with fails(errno.EXDEV):
            old.rename(new)
        with fails(errno.EXDEV):
            os.link(old, new)
    inside.unlink()
    outside.unlink()


def _with_a_secret(base: Path) -> tuple[Path, Path]:
    """A source and a mountpoint at different depths, and a secret beside the source: a relative
    link to it leads nowhere in the guest."""
    write(mkdir(base / "secret") / "f", b"secret")
    mkdir(base / "guest")
    return mkdir(base / "source"), mkdir(base / "guest" / "mount")


def test_symlinks_lead_where_the_guest_sees_them(tmp_path: Path) -> None:
    source, mountpoint = _with_a_secret(tmp_path)
    write(mkdir(tmp_path / "guest" / "known") / "f", b"the guest's own")
    with mounted(source, mountpoint):
        (mountpoint / "out").symlink_to("../secret")
        (source / "out2").symlink_to("../secret/f")
        (source / "own").symlink_to("../known/f")
        assert (source / "out" / "f").read_bytes() == b"secret"  # so the host would be led there
        for path in (mountpoint / "out" / "f", mountpoint / "out2"):
            for call in (os.stat, os.listdir, lambda path: os.open(path, os.O_RDWR)):
                with fails(errno.ENOENT):
                    call(path)
        with fails(errno.ENOENT):
            (mountpoint / "out" / "made").mkdir()
        assert (mountpoint / "own").read_bytes() == b"the guest's own"
        assert os.readlink(mountpoint / "out2") == "../secret/f"
        os.chmod(mountpoint / "own", 0o600)
        os.lchown(mountpoint / "out2", os.geteuid(), os.getegid())
    assert os.listdir(tmp_path / "secret") == ["f"]


def test_a_swap_between_lookup_and_open_leads_nowhere(tmp_path: Path) -> None:
    """The host keeps exchanging a directory, and a file, for links out of the share."""
    source, mountpoint = _with_a_secret(tmp_path)
    _make_links_out(source)
    files = mountpoint / "dir" / "f", mountpoint / "file"
    with (
        mounted(source, mountpoint, "--no-agent", "--cache=never"),
        opened(mountpoint / "dir", os.O_PATH) as held,
    ):
        for i in range(200):
            for path in files:
                if i % 2:  # the link stands there
                    with fails(errno.ENOENT):
                        path.read_bytes()
                else:
                    assert path.read_bytes() == b"share"
            _exchange(source)
            with opened("f", at=held) as fd:
                assert os.read(fd, 100) == b"share"
        with _exchanging(source):
            for _ in range(1000):
                for path in files:
                    _read_or_miss(path)
    assert (tmp_path / "secret" / "f").read_bytes() == b"secret"


def test_a_busy_host_leaves_time_for_the_guest(tmp_path: Path) -> None:
    """Names that the guest has just looked up are exchanged as fast as the host can."""
    source, mountpoint = _with_a_secret(tmp_path)
    _make_links_out(source)
    with mounted(source, mountpoint), _exchanging(source):
        start = time.monotonic()
        for i in range(200):
            _read_or_miss(mountpoint / "dir" / "f")
            assert time.monotonic() - start < 20, f"{i} files opened in 20 s"


def _make_links_out(source: Path) -> None:
    write(mkdir(source / "dir") / "f", b"share")
    write(source / "file", b"share")
    (source / "dirlink").symlink_to("../secret")
    (source / "filelink").symlink_to("../secret/f")


def _exchange(source: Path) -> None:
    renameat2(source / "dir", source / "dirlink", RENAME_EXCHANGE)
    renameat2(source / "file", source / "filelink", RENAME_EXCHANGE)


@contextmanager
def _exchanging(source: Path) -> Iterator[None]:
    """A process of the host's that does nothing else during the block."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def exchange() -> None:
        os.close(writer)  # so that the end of the block, or of the parent, can be read
        while True:
            _exchange(source)
            try:
                os.read(reader, 1)
                return
            except BlockingIOError:
                continue

    child = Child(exchange)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        child.join()


def _read_or_miss(path: Path) -> None:
    """Read a file that may be a link to nowhere, or below one, at any moment."""
    try:
        with opened(path, os.O_RDWR) as fd:
            assert os.read(fd, 100) == b"share"
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ESTALE):
            raise


# -- at the end ------------------------------------------------------------------------------------


def test_no_descriptor_is_left(sides: Sides) -> None:
    """After all the cases above the server holds what it held when it was new."""
    held = Path(f"/proc/{sides.mount.process.pid}/fd")

    def links() -> list[str]:
        found = []
        for fd in held.iterdir():
            try:
                found.append(os.readlink(fd))
            except FileNotFoundError:
                continue
        return [target for target in found if target.startswith(f"{sides.mount.source}/")]

    wait_until(lambda: not links(), 10, f"open in the server: {links()[:20]}")
