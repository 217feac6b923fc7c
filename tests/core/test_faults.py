"""A bug in any handler is EIO for its caller and one traceback in the log; the server lives on.

pyfuse3 would unmount on any exception that is not FUSEError.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import structlog

from fsd.export.channel import Channel
from fsd.fuse.operations import Operations
from fsd.transports.libfuse_operations import LibfuseOperations
from protocol import frames
from protocol.frames import CONTROL, FSD_DIR, SESSION
from protocol.masks import Mask

from .support import ALL, STRUCTURE, USER, World, plain

HANDLERS = sorted(
    name
    for name, member in inspect.getmembers(LibfuseOperations, inspect.iscoroutinefunction)
    if not name.startswith("_") and name in vars(LibfuseOperations)
)
CTX = SimpleNamespace(uid=0, gid=0, pid=1, umask=0)
NO_SERVICE = {"poll"}  # ask nothing of it


class Bug(Exception):
    """What nobody expected."""


def arguments(name: str) -> list[Any]:
    """Plausible arguments of a handler, by its parameters' names."""
    known: dict[str, Any] = {
        "ctx": CTX, "fields": SimpleNamespace(update_mode=False, update_uid=False,
        update_gid=False, update_size=False, update_atime=False, update_mtime=False),
        "attr": pyfuse3.EntryAttributes(), "inode_list": [(5, 1)], "poll_handle": None,
        "datasync": False, "token": None, "buf": b"x",
    }  # fmt: skip
    values = []
    for parameter in inspect.signature(getattr(LibfuseOperations, name)).parameters:
        if parameter == "self":
            continue
        is_name = "name" in parameter or parameter in ("target", "value")
        values.append(known.get(parameter, b"x" if is_name else 1))
    return values


class Broken(Operations):
    """A service of which every method raises."""

    error: Exception

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattribute__(self, name: str) -> Any:
        if name in ("error", "__class__", "__dict__"):
            return super().__getattribute__(name)
        if name in ("files", "handles", "access", "slow"):  # of which every method raises, too
            return self
        if name == "use_threads":  # at the transport's making
            return lambda *_: None

        def method(*args: object, **keywords: object) -> object:
            raise self.error

        return method


def test_there_are_handlers() -> None:
    assert {"lookup", "forget", "getattr", "read", "write", "readdir", "statfs"} <= set(HANDLERS)


@pytest.mark.parametrize("name", [name for name in HANDLERS if name not in NO_SERVICE])
async def test_a_bug_is_eio_and_one_traceback(name: str) -> None:
    transport = LibfuseOperations(Broken(Bug("boom")))
    with structlog.testing.capture_logs() as logs, pytest.raises(pyfuse3.FUSEError) as error:
        await getattr(transport, name)(*arguments(name))
    assert error.value.errno == errno.EIO
    assert [log["event"] for log in logs] == ["request failed"]
    assert logs[0]["exc_info"]


@pytest.mark.parametrize("name", [name for name in HANDLERS if name not in NO_SERVICE])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, None])
async def test_an_oserror_is_its_errno(name: str, number: int | None) -> None:
    failure = OSError("no number") if number is None else OSError(number, "why")
    transport = LibfuseOperations(Broken(failure))
    with structlog.testing.capture_logs() as logs, pytest.raises(pyfuse3.FUSEError) as error:
        await getattr(transport, name)(*arguments(name))
    assert error.value.errno == (number or errno.EIO)
    assert logs == []


def test_every_operation_of_pyfuse3_that_is_ours_is_guarded() -> None:
    """A handler added without the guard would be a way to unmount."""
    ours = {name for name in vars(LibfuseOperations) if hasattr(pyfuse3.Operations, name)}
    ours = {
        name
        for name in ours
        if not name.startswith("__") and callable(vars(LibfuseOperations)[name])
    }
    assert ours | {"poll"} == set(HANDLERS)
    for name in HANDLERS:
        assert hasattr(getattr(LibfuseOperations, name), "__wrapped__"), name


# An event


def test_a_fault_in_one_event_is_counted_and_the_next_is_delivered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = world.observer()
    world.mark(guest, mask=STRUCTURE)
    real = world.export.router.route

    def route(event: Any) -> None:
        if event.name == b"bad":
            raise Bug("boom")
        real(event)

    monkeypatch.setattr(world.export.router, "route", route)
    for name in ("a", "bad", "b"):
        (world.source / name).mkdir()
    with structlog.testing.capture_logs() as logs:
        assert plain(world.take(guest)) == [(b"a", "create,isdir"), (b"b", "create,isdir")]
    assert [log["event"] for log in logs] == ["event failed"]
    assert world.export.counts["faults"] == 1
    world.export.counts["faults"] = 0  # it was meant


# A channel


def connected(world: World, mount: Operations | None = None) -> Channel:
    channel = Channel(world.export, "test", 77, mount.guest if mount is not None else None)
    role = frames.Role.OBSERVER if mount is None else frames.Role.REPLAYER
    channel.receive(frames.encode(frames.Hello(frames.VERSION, role, ALL)))
    (welcome,) = answers(channel)
    assert isinstance(welcome, frames.Welcome)
    return channel


def answers(channel: Channel) -> list[frames.Message]:
    reader = frames.FrameReader()
    while channel.has_outgoing:
        reader.feed(channel.outgoing(7))  # any size will do
    return list(reader)


def send(channel: Channel, message: frames.Message) -> frames.Message:
    channel.receive(frames.encode(message))
    (answer,) = answers(channel)
    return answer


BAD = {
    "a second hello": frames.encode(frames.Hello(frames.VERSION, frames.Role.OBSERVER, 1)),
    "an order": frames.encode(frames.Order(1, 1, 0, 1, 0, 0, 0, 0, b"x", b"", b"", b"")),
    "an acknowledgement": frames.encode(frames.Ack(1, 0)),
    "the end of a scan": frames.encode(frames.ScanEnd(1, 1)),
    "garbage": b"\x09\0\0\0\xff\xff\0\0x",
    "a length below the header's": b"\x01\0\0\0\x02\0\0\0",
    "a length beyond the limit": b"\xff\xff\xff\xff\x02\0\0\0",
    "a body too short": b"\x09\0\0\0\x02\0\0\0x",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_frame_is_one_typed_error(world: World, what: str) -> None:
    channel = connected(world)
    with pytest.raises(frames.ProtocolError):
        channel.receive(BAD[what])
    channel.close()
    assert world.export.guests == []


@pytest.mark.parametrize(
    "message",
    [
        frames.Update(1, 1, 0, 1), frames.Resolve(1, b""), frames.List(1, 1, 0),
        frames.Ack(1, 0), frames.ScanEnd(1, 0),
        frames.Hello(frames.VERSION + 1, frames.Role.OBSERVER, ALL),
        frames.Hello(frames.VERSION, frames.Role.REPLAYER, ALL), frames.Hello(frames.VERSION, 9, 1),
    ],
)  # fmt: skip
def test_before_hello_and_a_wrong_hello(world: World, message: frames.Message) -> None:
    channel = Channel(world.export, "test", 1)
    with pytest.raises(frames.ProtocolError):
        channel.receive(frames.encode(message))
    channel.close()


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (frames.Update(5, 1, 0, int(Mask.ONESHOT)), errno.EINVAL),
        (frames.Update(5, 1, 0, 1 << 50), errno.EINVAL),
        (frames.Update(5, 4711, 0, 1), errno.ESTALE),
        (frames.Update(5, 1, 3, 1), errno.ESTALE),
        (frames.Update(5, CONTROL, 1, 1), errno.ESTALE),
        (frames.Resolve(5, b"not/there"), errno.ENOENT),
        (frames.Resolve(5, b"file/below"), errno.ENOTDIR),
        (frames.Resolve(5, b"nul\0"), errno.EINVAL),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_answered_with_an_errno(
    world: World, message: frames.Message, number: int
) -> None:
    (world.source / "file").touch()
    channel = connected(world)
    answer = send(channel, message)
    assert isinstance(answer, frames.Result)
    assert (answer.request, answer.errno) == (5, number)
    done = send(channel, frames.Update(6, 1, 0, int(Mask.CREATE)))
    assert isinstance(done, frames.Result)
    assert done.errno == 0
    channel.close()
    assert len(world.export.watcher) == 0


def test_resolve_does_not_leave_the_export(world: World) -> None:
    outside = world.source.parent / "outside"
    outside.mkdir()
    (world.source / "link").symlink_to(outside)
    channel = connected(world)
    for path in (b"..", b"../outside", b"/..", b"../../../etc"):
        answer = send(channel, frames.Resolve(1, path))
        assert isinstance(answer, frames.Result)
        assert answer.errno or answer.nodeid == 1
    below = send(channel, frames.Resolve(1, b"link/x"))
    assert isinstance(below, frames.Result)
    assert below.errno == errno.ENOTDIR
    channel.close()


def test_a_session_leaks_no_inodes(world: World) -> None:
    """Not even those on the way to what it asked for."""
    (world.source / "a/b/c").mkdir(parents=True)
    (world.source / "a/x").touch()
    channel = connected(world)
    for path in (b"a/b/c", b"a/x", b"a/b/c", b"a/nothing"):
        channel.receive(frames.encode(frames.Resolve(1, path)))
    answers(channel)
    channel.receive(frames.encode(frames.List(2, 1, 0)))
    channel.close()
    assert len(world.table) == 1


def test_what_a_guest_can_make_grow_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.export.channel.RESOLVED_LIMIT", 3)
    channel = connected(world)
    results = []
    for i in range(5):
        (world.source / str(i)).mkdir()
        results.append(send(channel, frames.Resolve(1, b"%d" % i)))
    numbers = [r.errno for r in results if isinstance(r, frames.Result)]
    assert numbers == [0, 0, 0, errno.ENOSPC, errno.ENOSPC]
    channel.close()


def test_events_that_a_guest_cannot_use_are_not_sent(world: World) -> None:
    channel = Channel(world.export, "test", 1)
    hello = frames.Hello(frames.VERSION, frames.Role.OBSERVER, int(Mask.CREATE))
    channel.receive(frames.encode(hello))
    (welcome,) = answers(channel)
    assert isinstance(welcome, frames.Welcome)
    assert welcome.events == int(Mask.CREATE)
    send(channel, frames.Update(1, 1, 0, STRUCTURE))
    (world.source / "x").touch()
    (world.source / "x").unlink()
    world.pump()
    assert [m.mask for m in answers(channel) if isinstance(m, frames.Event)] == [int(Mask.CREATE)]
    channel.close()


def test_stats_come_in_parts_of_one_json(world: World) -> None:
    channel = connected(world)
    for i in range(600):
        (world.source / f"directory number {i}").mkdir()
        world.mark(channel.guest, f"directory number {i}", 1)  # type: ignore[arg-type]
    channel.receive(frames.encode(frames.StatsRequest(9)))
    parts: list[frames.Stats] = []
    for _ in range(1000):  # turns: a busy machine needs more than one
        parts += [m for m in answers(channel) if isinstance(m, frames.Stats)]
        if parts and not parts[-1].more:
            break
        world.export.process(64)
    assert len(parts) > 1
    assert [part.more for part in parts] == [1] * (len(parts) - 1) + [0]
    state = json.loads(b"".join(part.json for part in parts))
    assert state["guests"][0]["marks"] == 600
    channel.close()


# The hidden directory


def test_a_second_agent_is_ebusy_and_the_first_continues(world: World) -> None:
    mount = world.mount(agent=False)
    first = mount.files.open(USER, CONTROL, os.O_RDWR)
    with pytest.raises(OSError, match="connected") as error:
        mount.files.open(USER, CONTROL, os.O_RDWR)
    assert error.value.errno == errno.EBUSY
    mount.files.release(first)
    mount.files.release(mount.files.open(USER, CONTROL, os.O_RDWR))


def test_other_users_do_not_see_it(world: World) -> None:
    mount = world.mount()
    other = USER._replace(uid=12345)
    for call in (
        lambda: mount.lookup(other, 1, b".fsd"),
        lambda: mount.lookup(other, FSD_DIR, b"control"),
        lambda: mount.files.open(other, CONTROL, os.O_RDWR),
        lambda: mount.files.open(other, SESSION, os.O_RDWR),
        lambda: mount.files.opendir(other, FSD_DIR),
    ):
        with pytest.raises(FileNotFoundError):
            call()


def test_it_is_never_listed_and_cannot_be_changed(world: World) -> None:
    mount = world.mount()
    assert stat_name(mount)
    fh = mount.files.opendir(USER, 1)
    assert [entry.name for entry in mount.files.names(fh, 0)[1]] == [b".", b".."]
    mount.files.release(fh)
    for call in (
        lambda: mount.mkdir(USER, 1, b".fsd", 0o755),
        lambda: mount.unlink(USER, 1, b".fsd"),
        lambda: mount.rmdir(USER, 1, b".fsd"),
        lambda: mount.rename(USER, 1, b".fsd", 1, b"x", 0),
        lambda: mount.mkdir(USER, FSD_DIR, b"x", 0o755),
        lambda: mount.create(USER, FSD_DIR, b"x", 0o644, os.O_RDWR | os.O_CREAT),
        lambda: mount.unlink(USER, FSD_DIR, b"control"),
        lambda: mount.setxattr(USER, CONTROL, b"user.x", b"", 0),
        lambda: mount.readlink(CONTROL),
    ):
        with pytest.raises(PermissionError):
            call()
    with pytest.raises(OSError, match=r"unknown nodeid|No such|Operation"):
        mount.link(USER, CONTROL, 1, b"x")
    assert os.listdir(world.source) == []


def stat_name(mount: Operations) -> bool:
    return mount.lookup(USER, 1, b".fsd").inode.nodeid == FSD_DIR


def test_a_real_name_of_the_same_kind_on_the_host_is_hidden(world: World) -> None:
    (world.source / ".fsd").mkdir()
    (world.source / ".fsd/control").write_text("mine")
    mount = world.mount()
    assert stat_name(mount)
    observer = world.observer()
    world.mark(observer, mask=ALL)
    (world.source / ".fsd").chmod(0o700)
    assert world.take(observer) == []
