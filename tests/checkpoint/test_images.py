"""Images that are not what was written: always a clear error, never a crash, never a watch."""

from __future__ import annotations

import importlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guest_tools.watcher import images as stored
from guest_tools.watcher import watcher_pb2 as pb
from guest_tools.watcher.notify import Owner
from guest_tools.watcher.restore import Restorer
from guest_tools.watcher.show import as_json, as_text
from guest_tools.watcher.state import (
    Descriptor,
    Epoll,
    Fanotify,
    FileSystem,
    FileSystemMark,
    Identity,
    Inotify,
    MountMark,
    Object,
    ObjectMark,
    Queue,
    State,
    Target,
    Watch,
)
from protocol import images
from protocol.images import ImageError
from tests.test_pyz import PYTHONS

from .remote import guest, remote, restored, save

ROOT = Path(__file__).parents[2]
NAMES = ("process", "files", "fdinfo")
PURE = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
i31 = st.integers(0, 2**31 - 1)
PATHS = st.binary(max_size=20).map(lambda b: b"/" + b.replace(b"\0", b"")) | st.just(b"")
OWNERS = st.builds(
    Owner, u32, u32, i31 | st.just(0), st.integers(0, 3), i31 | st.sampled_from((0, 7))
)
IDENTITIES = st.builds(Identity, u32, u64, i31, st.binary(max_size=128))
OBJECTS = st.builds(
    lambda identity, decodable, path, deleted: Object(
        identity, decodable and bool(identity.handle), path, deleted
    ),
    IDENTITIES, st.booleans(), PATHS, st.booleans(),
)  # fmt: skip
EVENT = struct.pack("=iIII", 3, 0x100, 0, 16) + b"name".ljust(16, b"\0")
QUEUES = st.builds(lambda size: Queue(size, b""), u32) | st.just(Queue(32, EVENT))
WATCHES = st.lists(
    st.builds(Watch, st.integers(1, 2**31 - 1), u32, u32, OBJECTS), unique_by=lambda w: w.wd
)
MARKS = st.builds(ObjectMark, u32, u32, u32, OBJECTS) | st.builds(
    MountMark, u32, u32, u32, u32, u32, PATHS
)
SB_MARKS = st.builds(FileSystemMark, u32, u32, u32, u32)
TARGETS = st.builds(
    lambda tfd, toff, events, data, pos, ino, sdev, pid, what: Target(
        tfd, toff, events, data, pos, ino, sdev, pid, 3 if pid else 0, 1 if pid else 0, what
    ),
    i31, i31, u32, u64, u64, u64, u32, i31, st.binary(max_size=20),
)  # fmt: skip
FILESYSTEMS = st.builds(FileSystem, u32, st.binary(max_size=9), st.binary(max_size=9), u64)
STATES = st.builds(
    lambda flags, owner, watches, queue, marks, sb_marks, targets, filesystems: State(
        7,
        b"\xff name",
        "6.1",
        filesystems,
        [
            Inotify(1, flags, owner, watches, queue),
            Fanotify(2, 0, owner, 4, 2, [*marks, *sb_marks], Queue(0, b"")),
            Epoll(3, 2, owner, targets),
        ],
        [Descriptor(3, True, 1), Descriptor(4, False, 2), Descriptor(9, False, 3)],
    ),
    u32, OWNERS, WATCHES, QUEUES, st.lists(MARKS, max_size=3), st.lists(SB_MARKS, max_size=3),
    st.lists(TARGETS, max_size=3), st.lists(FILESYSTEMS, max_size=2),
)  # fmt: skip
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of a real watcher, which ends with the tests."""
    top = tmp_path_factory.mktemp("sample")
    with remote() as watcher:
        watcher("inotify(3)")
        watcher("epoll(4)")
        watcher("add(4, 3, 1, 3)")
        for i in range(5):
            (top / str(i)).mkdir()
            watcher(f"watch(3, {str(top / str(i))!r}, 0x100, {i * 1000 + 1})")
        save(watcher, top / "saved")
        yield top / "saved"


@pytest.fixture
def copy(sample: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample, tmp_path / "copy"))


def bodies(directory: Path) -> dict[str, bytes]:
    """What is in the envelopes."""
    return {
        name: images.unpack((directory / f"{name}.img").read_bytes(), name, stored.VERSION)
        for name in NAMES
    }


@settings(max_examples=150)
@given(STATES)
def test_states_come_back(state: State) -> None:
    written = dict(zip(NAMES, stored.bodies(state), strict=True))
    again = stored.parse(*(written[name] for name in NAMES))
    assert again == state
    assert as_json(again)["pid"] == 7
    assert list(as_text(again))


@pytest.mark.parametrize("name", NAMES)
@quick
@given(data=st.data())
def test_damage(copy: Path, name: str, data: st.DataObject) -> None:
    path = copy / f"{name}.img"
    good = path.read_bytes()
    damage: Callable[[bytes], bytes] = data.draw(
        st.integers(0, len(good) - 1).map(lambda n: lambda b: b[:n])
        | st.integers(0, len(good) * 8 - 1).map(
            lambda n: lambda b: b[: n // 8] + bytes([b[n // 8] ^ 1 << n % 8]) + b[n // 8 + 1 :]
        )
        | st.binary(min_size=1, max_size=9).map(lambda more: lambda b: b + more)
    )
    path.write_bytes(damage(good))
    try:
        with pytest.raises(ImageError, match=f"{name}.img: "):
            stored.read(str(copy))
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", NAMES)
def test_other_versions_and_kinds(copy: Path, name: str) -> None:
    path = copy / f"{name}.img"
    body = bodies(copy)[name]
    for kind, version, says in (
        (name, stored.VERSION + 1, f"version {stored.VERSION + 1}, this program reads"),
        (name, stored.VERSION - 1, f"version {stored.VERSION - 1}, this program reads"),
        ("server", stored.VERSION, "of kind 'server'"),
    ):
        path.write_bytes(images.pack(kind, version, body))
        done = guest("restore", copy, "--", "echo", "run")
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert str(path) in done.stderr
        assert says in done.stderr
    path.unlink()
    done = guest("show", copy)
    assert (done.returncode, done.stderr) == (1, f"fsd-guest: {path}: No such file or directory\n")


def test_of_two_checkpoints(copy: Path, tmp_path: Path) -> None:
    with remote() as watcher:
        watcher("inotify(3)")
        watcher("epoll(4)")
        save(watcher, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "files.img", copy)
    with pytest.raises(ImageError, match="the images are of different checkpoints"):
        stored.read(str(copy))


# With a right checksum: what a faulty or malicious program might write


def forged(process: bytes, files: bytes, fdinfo: bytes) -> State:
    """Parse bodies as if their digests were right."""
    message = pb.process_entry()
    message.ParseFromString(process)
    message.files_sha256, message.fdinfo_sha256 = stored.digests(files, fdinfo)
    return stored.parse(message.SerializeToString(), files, fdinfo)


@settings(max_examples=300)
@given(STATES, st.data())
def test_forged_bytes(state: State, data: st.DataObject) -> None:
    """Whatever is accepted can be shown, and is in range."""
    parts = list(stored.bodies(state))
    for _ in range(data.draw(st.integers(1, 3))):
        which = data.draw(st.integers(1, 2))
        body = bytearray(parts[which])
        at = data.draw(st.integers(8, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
        parts[which] = bytes(body)
    try:
        accepted = forged(*parts)
    except ImageError:
        return
    assert as_json(accepted)
    assert list(as_text(accepted))
    for file in accepted.files:
        if isinstance(file, Inotify):
            assert all(0 < watch.wd < 2**31 for watch in file.watches)


@pytest.mark.parametrize("which", [0, 1])
def test_a_string_that_is_not_utf_8(sample: Path, which: int) -> None:
    parts = list(bodies(sample).values())
    old = (os.uname().release.encode(), os.fsencode(sample.parent))[which]
    new = old[:1] + b"\xff" + old[2:]
    assert old in parts[which]
    parts[which] = parts[which].replace(old, new)
    with pytest.raises(ImageError, match=r"not UTF-8|cannot be read"):
        stored.parse(*parts) if which == 0 else forged(*parts)


@given(st.binary(max_size=200), st.binary(max_size=100))
def test_rubbish(files: bytes, fdinfo: bytes) -> None:
    process = pb.process_entry(
        pid=1, command=b"x", kernel="6", files_sha256=b"", fdinfo_sha256=b""
    ).SerializeToString()
    heads = [struct.pack("<II", 0x54564319, magic) for magic in (0x56303138, 0x56213732)]
    for pair in ((files, fdinfo), (heads[0] + files, heads[1] + fdinfo)):
        try:
            accepted = forged(process, *pair)
        except ImageError:
            continue
        assert accepted.files == []


def _with(sample: Path, watch: Callable[[Watch], Watch]) -> State:
    state = stored.read(str(sample))
    (file,) = (file for file in state.files if isinstance(file, Inotify))
    changed = file._replace(watches=[watch(old) for old in file.watches])
    return state._replace(files=[changed if old == file else old for old in state.files])


@pytest.mark.parametrize("what", ["ino", "sdev", "handle", "handle type", "path", "one file"])
def test_a_forged_watch_is_on_no_other_file(sample: Path, tmp_path: Path, what: str) -> None:
    """Device, number, handle and path that do not belong together lead to no watch."""
    state = stored.read(str(sample))
    (file,) = (file for file in state.files if isinstance(file, Inotify))
    first = file.watches[0]

    def change(watch: Watch) -> Watch:
        thing, identity = watch.object, watch.object.identity
        other = first.object if watch.wd != first.wd else file.watches[1].object
        changed = {
            "ino": thing._replace(identity=identity._replace(ino=other.identity.ino)),
            "sdev": thing._replace(identity=identity._replace(sdev=identity.sdev + 1)),
            "handle": thing._replace(identity=identity._replace(handle=other.identity.handle)),
            "handle type": thing._replace(identity=identity._replace(handle_type=77)),
            "path": thing._replace(decodable=False, path=other.path),
            "one file": first.object,
        }
        return watch._replace(object=changed[what])

    stored.write(str(tmp_path / "forged"), _with(sample, change))
    with restored(tmp_path / "forged", "--overflow", "never") as again:
        lines = again.marks(3)
        if what == "one file":
            assert len(lines) == 1
            assert f"ino:{first.object.identity.ino:x} " in lines[0]
            assert again.stderr.count("File exists") == 4
        else:
            assert lines == []
            assert again.stderr.count("watch ") >= 5


@settings(max_examples=25, deadline=None)
@given(STATES)
def test_restoring_anything_ends_well(state: State) -> None:
    """A process that restores what hypothesis thinks of: problems, and nothing worse."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:  # restoring changes descriptors and limits; the tests' own stay as they are
        status = 1
        try:
            os.close(read)
            restorer = Restorer(state._replace(files=_small(state)), "never")
            restorer.restore()
            os.write(write, f"{restorer.watches}".encode())
            status = 0
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            os.write(write, repr(error).encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    assert said == "0"


def _small(state: State) -> list[Inotify | Fanotify | Epoll]:
    """Without numbers that only a greater limit of descriptors allows."""
    return [
        file._replace(targets=[t._replace(tfd=t.tfd % 512) for t in file.targets])
        if isinstance(file, Epoll)
        else file
        for file in state.files
    ]


@pytest.mark.skipif(PURE in os.environ, reason="this is that run")
def test_the_same_in_pure_python(tmp_path: Path) -> None:
    """What the .pyz has reads forged images otherwise than the C library does."""
    words = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        # The usual one closes its parent to other users, who have other tests' files there.
        f"--basetemp={tmp_path / 'nested'}",
        "-k",
        "forged_bytes or rubbish or utf_8",
        __file__,
    )
    environment = {**os.environ, PURE: "python"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout


# The messages


@pytest.mark.parametrize("name", ["guest_tools/watcher/watcher", "fsd/checkpoint/server"])
def test_the_generated_code_is_of_the_definitions(name: str) -> None:
    """What script/proto would make today is what is there."""
    done = subprocess.run(
        ["protoc", "--descriptor_set_out=/dev/stdout", f"{name}.proto"],
        cwd=ROOT, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    from google.protobuf import descriptor_pb2

    (generated,) = descriptor_pb2.FileDescriptorSet.FromString(done.stdout).file
    module = importlib.import_module(f"{name.replace('/', '.')}_pb2")
    present = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    for message in generated.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert generated == present


@pytest.mark.parametrize("python", PYTHONS)
def test_the_archive_writes_the_same(sample: Path, tmp_path: Path, python: str) -> None:
    """The .pyz has protobuf in pure Python."""
    archive = tmp_path / "fsd-guest.pyz"
    subprocess.run([sys.executable, ROOT / "script" / "build", archive], check=True, timeout=60)
    alone = (python, "-I", "-S", archive)
    pid = str(stored.read(str(sample)).pid)
    words = (*alone, "checkpoint", "--pid", pid, tmp_path / "saved")
    subprocess.run(words, check=True, timeout=60)
    for name in NAMES:
        path = f"{name}.img"
        assert (tmp_path / "saved" / path).read_bytes() == (sample / path).read_bytes()
    with remote(*alone, "restore", tmp_path / "saved", "--") as again:
        assert "restored 5 watches and 1 epoll entries; 0 problems" in again.stderr
        assert len(again.marks(3)) == 5
