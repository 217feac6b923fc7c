"""Other people's file system tests over the mount: libfuse's test_syscalls, stress-ng's stressors,
fio's verification. Each runs on a native directory first: what fails there does not count.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.debian import source_files
from tests.mount.exclusions import STRESSORS as EXCLUDED
from tests.mount.posix_support import ALICE, User
from tests.mount.sides import Sides, two_sides

SECONDS = 60  # none takes more than a few; so that a hung mount differs from a slow one

USERS = [pytest.param(None, id="root" if os.geteuid() == 0 else "self")]
if os.geteuid() == 0:
    USERS.append(pytest.param(ALICE, id="user"))


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    with two_sides() as both:
        yield both


@pytest.fixture
def native(sides: Sides, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty native directory."""
    path = sides.native / _plain(request)
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shared(sides: Sides, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """An empty directory as the mount and as the host show it."""
    name = _plain(request)
    path, host = sides.mount.mountpoint / name, sides.mount.source / name
    host.mkdir()
    yield path, host
    sides.check_alive()
    shutil.rmtree(path)


@pytest.fixture
def seen_at_once(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """The same of a mount that shows the host's changes to the very next call."""
    with two_sides("--cache=never") as sides:
        mount = sides.mount
        yield mount.mountpoint, mount.source
        sides.check_alive()


def _plain(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


def _run(user: User | None, *command: str | Path, cwd: Path | None = None) -> tuple[int, str]:
    """Exit code and output of a command; it must end within SECONDS."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=user.groups if user else None,
        start_new_session=True,  # a group to end as a whole
    )
    with process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"not done within {SECONDS} s: {command}") from None
    return process.returncode, output.decode(errors="replace")


# -- libfuse's test_syscalls -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def syscalls_binary(sides: Sides) -> Path:
    source = source_files("fuse3", ["test/test_syscalls.c"]) / "test_syscalls.c"
    build = sides.native / "build"
    build.mkdir()
    (build / "fuse_config.h").write_text("#define HAVE_COPY_FILE_RANGE 1\n")
    binary = build / "test_syscalls"
    command = ["gcc", "-w", "-O1", f"-I{build}", str(source), "-o", str(binary)]
    subprocess.run(command, check=True, timeout=60)
    build.chmod(0o755)
    return binary


@pytest.mark.parametrize("user", USERS)
def test_libfuse_syscalls(
    user: User | None, syscalls_binary: Path, native: Path, seen_at_once: tuple[Path, Path]
) -> None:
    path, host = seen_at_once
    if user is not None:
        for directory in (native, host):
            os.chown(directory, user.uid, user.gid)
    code, output = _run(user, syscalls_binary, native)
    assert code == 0, f"natively: {output}"
    passed = re.findall(r"^ *\d+ (\[.*\]) OK$", output, re.MULTILINE)
    assert len(passed) > 50
    code, output = _run(user, syscalls_binary, path, f":{host}")
    assert code == 0, output
    assert re.findall(r"^ *\d+ (\[.*\]) OK$", output, re.MULTILINE) == passed


# -- stress-ng -------------------------------------------------------------------------------------

STRESSORS = {
    "access": "",
    "aio": "",
    "aiol": "",
    # When the time runs out in the middle of it, it leaves a file behind that cannot be removed.
    "chattr": "--chattr-ops 50 --timeout 20",
    "chdir": "--chdir-dirs 64",
    "chmod": "",
    "chown": "",
    "dentry": "--dentries 64",
    "dir": "--dir-dirs 64",
    "dirdeep": "--dirdeep-dirs 2 --dirdeep-files 2 --dirdeep-inodes 100",
    "dirmany": "",
    "dnotify": "",
    "fallocate": "--fallocate-bytes 1M",
    "fcntl": "",
    "fiemap": "",
    "file-ioctl": "",
    "filename": "--timeout 4",  # tries every byte before its first operation
    "flock": "",
    "fpunch": "",
    # Its stand-in for fallocate is not right when the time runs out in the middle of it.
    "fsize": "--fsize-ops 10 --timeout 20",
    "fstat": "",
    "hdd": "--hdd-bytes 1M --hdd-opts wr-rnd,rd-rnd",
    "inotify": "",
    "io-uring": "",
    "iomix": "--iomix-bytes 4M",
    "lease": "",
    "link": "",
    "locka": "",
    "lockf": "",
    "lockofd": "",
    "mknod": "",
    "msync": "--msync-bytes 1M",
    "open": "",
    "readahead": "--readahead-bytes 4M",
    "rename": "",
    "revio": "",
    "seek": "--seek-size 1M",
    "sendfile": "",
    "splice": "",
    "symlink": "",
    "sync-file": "--sync-file-bytes 1M",
    "touch": "",
    "utime": "",
    "xattr": "",
}
AS_USER = [
    *("access", "chmod", "chown", "dir", "filename"),
    *("open", "rename", "touch", "utime"),
]


def _stress(name: str, directory: Path, user: User | None) -> str:
    """What is wrong, or an empty string. (The exit code alone is 0 after most failures.)"""
    options = STRESSORS[name].split()
    if name == "fstat":
        (directory / "files").mkdir()
        for i in range(50):
            (directory / "files" / str(i)).touch()
        options += ["--fstat-dir", str(directory / "files")]
    if user is not None:
        os.chown(directory, user.uid, user.gid)
    for seconds in (1, 10):  # other programs may have the processors for the first second
        common = f"--timeout {seconds} --verify --metrics-brief --no-rand-seed --{name} 1"
        command = ["stress-ng", "--temp-path", ".", *common.split(), f"--{name}-ops", "500"]
        code, output = _run(user, *command, *options, cwd=directory)
        lines = output.splitlines()
        bad = [line for line in lines if re.search(r"stress-ng: (fail|error)|skip", line)]
        done = [line for line in lines if re.search(rf"\] {name} +[1-9]", line)]
        if code or bad or done:
            break
    if code == 0 and not bad and done:
        return ""
    return "\n".join(bad) or f"exit code {code}, {len(done)} operations\n{output}"


@pytest.mark.parametrize(
    ("name", "user"),
    [pytest.param(name, None, id=name) for name in STRESSORS]
    + [pytest.param(name, ALICE, id=f"{name}-user") for name in AS_USER if len(USERS) == 2],
)
def test_stress_ng(name: str, user: User | None, native: Path, shared: tuple[Path, Path]) -> None:
    path, host = shared
    if wrong := _stress(name, native, user):
        pytest.skip(f"fails natively too: {wrong}")
    if user is not None:
        os.chown(host, user.uid, user.gid)
    wrong = _stress(name, path, user)
    if name in EXCLUDED:
        assert wrong, "it passes now: take it off the list"
    else:
        assert not wrong, wrong
        left = sorted(p.name for p in host.iterdir() if p.name != "files")
        assert not left, f"left behind: {left}"


def test_exclusions_name_stressors() -> None:
    assert set(EXCLUDED) <= set(STRESSORS)


# -- fio -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--bs=4k", id="4k"),
        pytest.param("--bs=512 --size=512k", id="512"),
        pytest.param("--bs=1m --size=16m", id="1m"),
        pytest.param("--bsrange=1k-200k --bs_unaligned=1", id="unaligned"),
        pytest.param("--bs=64k --direct=1", id="64k-direct"),
        pytest.param("--bs=16k --ioengine=mmap", id="mmap"),
        pytest.param("--bs=16k --ioengine=libaio --iodepth=8 --direct=1", id="libaio"),
        pytest.param("--bs=8k --numjobs=3 --size=1m --fsync=16", id="three-jobs"),
    ],
)
def test_fio(options: str, native: Path, shared: tuple[Path, Path]) -> None:
    """Random writes, then every block is read back; the host has what the mount shows."""
    path, host = shared
    job = (
        "fio --name=job --rw=randwrite --size=4m --verify=crc32c --do_verify=1 --verify_fatal=1 "
        "--ioengine=psync --randseed=7 --group_reporting --thread --fallocate=none "
    )
    command = [*job.split(), *options.split()]
    code, output = _run(None, *command, f"--directory={native}", cwd=native)
    assert code == 0, f"natively: {output}"
    code, output = _run(None, *command, f"--directory={path}", cwd=native)
    assert code == 0, output
    files = sorted(host.iterdir())
    assert files
    for file in files:
        assert file.read_bytes() == (path / file.name).read_bytes()
