"""Images of the server: what is read back is what was written, or a clear error."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.checkpoint import saved_and_restored
from fsd.checkpoint import image, take
from fsd.checkpoint.file import StateFile, state_directory, state_path
from fsd.checkpoint.restore import Resumption
from fsd.checkpoint.rows import (
    GuestKind,
    SavedEvent,
    SavedExport,
    SavedGuest,
    SavedMissed,
    SavedName,
)
from fsd.checkpoint.saver import Saver, open_export
from fsd.export.export import Export
from fsd.files.recall import recall
from fsd.files.saved import SavedForgotten, SavedInode, SavedLink, SavedTable
from protocol import frames, images
from protocol.images import ImageError
from protocol.masks import EVENTS, Mask

from .support import ALL, World

u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
names = st.binary(max_size=8)
saved_names = st.builds(SavedName, u64, names, u64, u32, u64, u64)
guests = st.builds(
    SavedGuest,
    st.sampled_from(GuestKind), st.text(max_size=5), names, u32, u64,
    st.lists(st.tuples(u64, u32), max_size=3),
    st.lists(st.builds(frames.Event, u64, u32, u64, u32, names), max_size=3),
    st.lists(
        st.builds(SavedEvent, u64, u32, names, u32, u64, u32, u64, names, u64, st.booleans(), u32),
        max_size=3,
    ),
    st.lists(st.builds(SavedMissed, u64, names, u32, st.none() | saved_names), max_size=4),
    st.dictionaries(u64, u64, max_size=3),
)  # fmt: skip
tables = st.builds(
    SavedTable,
    st.lists(
        st.builds(SavedInode, u64, u32, st.integers(-1, 1 << 62), u64, names, u32, u32, u64, names),
        max_size=4,
    ),
    st.lists(st.builds(SavedLink, u64, names, u64), max_size=3),
    st.lists(
        st.builds(SavedForgotten, u64, st.integers(-1, 1 << 62), u64, names, u64, names), max_size=3
    ),
)
exports = st.builds(
    SavedExport,
    st.text(max_size=5), u64, names, u64, u64, tables, st.lists(st.tuples(u64, u32), max_size=3),
    st.lists(u64, max_size=3), st.lists(saved_names, max_size=3), st.lists(guests, max_size=2),
)  # fmt: skip


@given(exports)
def test_comes_back(saved: SavedExport) -> None:
    assert image.decode(image.encode(saved)) == saved


def test_an_image_of_an_older_server() -> None:
    """Fields may get other names, but keep their numbers: this one was written when `has_self` was
    `twin`, and `sent` was `told`.
    """
    events = [
        SavedEvent(1, 2, b"a", 3, 4, 5, 6, b"b", 7, True, 1),
        SavedEvent(1, 2, b"a", 3, 4, 5, 6, b"b", 7, False, 0),
    ]
    frame = frames.Event(1, 2, 3, 4, b"z")
    expected = SavedExport(
        "/s", 1, b"h", 2, 3,
        SavedTable([SavedInode(5, 1, 2, 3, b"h", 4, 1, 1, b"x")], [], []),
        watches=[(5, 1)], listed=[5], names=[SavedName(7, b"n", 8, 9, 10, 11)],
        guests=[
            SavedGuest(GuestKind.MOUNT, "m", events=3, sent=77, held=events, nodes={5: 2}),
            SavedGuest(GuestKind.OBSERVER, "o", b"t" * 16, sent=12345, outbox=[frame]),
        ],
    )  # fmt: skip
    assert image.decode((Path(__file__).parent / "older.image").read_bytes()) == expected


# Images that are damaged, and others that are whole and lie


class Share:
    """A directory with a rich state, its image, and a watcher of what a restored server watches."""

    def __init__(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="fsd-image-"))
        source = self.top / "source"
        (source / "d/e").mkdir(parents=True)
        (self.top / "outside").write_text("x")
        for name in ("f", "d/g", "d/e/h"):
            (source / name).write_text(name)
        os.link(source / "f", source / "d/link")
        world = World(source, outbox_limit=3)
        guest = world.observer()
        guest.keep(b"t" * 16)
        mount = world.mount()
        for path in ("", "d", "d/g", "d/e"):
            world.mark(guest, path, ALL)
            world.mark(mount.guest, path, ALL)
        world.mark(world.export.hand_marks(), "f", ALL)
        (source / "d/new").write_text("x")
        (source / "d/new").rename(source / "d/e/new")
        (source / "d/link").unlink()
        world.table.forget(world.node("d/e/h").nodeid, 1)
        world.pump()
        self.saved = take.take(world.export, {mount.guest: {world.node("d").nodeid: 2}})
        assert self.saved.guests[0].missed
        assert self.saved.guests[1].held
        self.inos = {os.stat(path).st_ino for path in [source, *source.rglob("*")]}
        world.close()
        self.source = source
        self.data = image.encode(self.saved)
        self.body = images.unpack(self.data, image.KIND, image.VERSION)

    def restore(self, data: bytes) -> None:
        """It is restored or refused; whatever is watched then is in the source."""
        export = Export(str(self.source))
        try:
            resumption = Resumption(export, image.decode(data))
            guest = export.add_mount_guest("mount")
            resumption.mount(guest)
            resumption.finish()
            export.process(1 << 20)
            guest.take(1 << 20)
            for nodeid in dict(export.table.forgotten.items()):
                with suppress(OSError):
                    assert recall(export.table, nodeid).identity.ino in self.inos
            for observer in list(export.waiting.values()):
                observer.take(1 << 20)
                export.recovery.catch_up(observer)
            for inode in export.watcher.inodes():
                with export.table.reach.opened(inode) as fd:
                    assert os.fstat(fd).st_ino == inode.identity.ino
                    assert inode.identity.ino in self.inos
            assert not export.counts["faults"]
        except ImageError:
            pass
        finally:
            export.close()


@pytest.fixture(scope="module")
def share() -> Share:
    return Share()


def test_it_is_restored(share: Share) -> None:
    share.restore(share.data)
    export = Export(str(share.source))
    Resumption(export, image.decode(share.data)).finish()
    assert export.waiting.keys() == {b"t" * 16}
    assert len(export.watcher) >= 4
    export.close()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_images_are_refused(share: Share, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["cut", "flip", "longer", "version"]))
    damaged = bytearray(share.data)
    if kind == "cut":
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    elif kind == "flip":
        bit = data.draw(st.integers(0, len(damaged) * 8 - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    elif kind == "longer":
        damaged += data.draw(st.binary(min_size=1, max_size=20))
    else:
        version = data.draw(st.integers(0, 0xFFFF).filter(lambda v: v != image.VERSION))
        damaged = bytearray(images.pack(image.KIND, version, share.body))
    with pytest.raises(ImageError, match=r"\w{3}"):
        image.decode(bytes(damaged))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=400, deadline=None)
def test_whole_images_that_lie(share: Share, data: st.DataObject) -> None:
    """The checksum is right, the body is anyone's: bits flipped, parts cut out or put in twice."""
    body = bytearray(share.body)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                body[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del body[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                body[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                body[at:at] = body[at : at + data.draw(st.integers(1, 64))]
        if not body:
            return
    share.restore(images.pack(image.KIND, image.VERSION, bytes(body)))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=400, deadline=None)
def test_fields_that_lie(share: Share, data: st.DataObject) -> None:
    """Each field is well-formed; some have the value of another row, or a value of no sense."""
    saved = image.decode(share.data)
    lists: list[list[Any]] = [*saved.table, saved.watches, saved.names]
    for guest in saved.guests:
        lists += [guest.marks, guest.outbox, guest.held, guest.missed]
    for _ in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.sampled_from([rows for rows in lists if rows]))
        index = data.draw(st.integers(0, len(rows) - 1))
        row = rows[index]
        field = data.draw(st.integers(0, len(row) - 1))
        old = row[field]
        if isinstance(old, bool) or old is None or isinstance(old, SavedName):
            continue
        if isinstance(old, int):
            value: object = data.draw(
                st.sampled_from([0, 1, 2, 0xFFF, (1 << 31) - 1])
                | st.sampled_from([r[field] for r in rows])
            )
        else:
            value = data.draw(st.sampled_from([b"", b"..", b"a/b", bytes(9), b"x" * 300, b"d"]))
        new = (*row[:field], value, *row[field + 1 :])
        rows[index] = type(row)(*new) if hasattr(row, "_fields") else new
    share.restore(image.encode(saved))


# Files


def test_state_files_are_private_and_atomic(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state" / "x.image")
    assert state.read() is None
    state.write(b"one")
    state.write(b"two")
    assert state.read() == b"two"
    assert os.listdir(tmp_path / "state") == ["x.image"]
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert state.path.stat().st_mode & 0o777 == 0o600


def test_what_others_could_have_written_is_refused(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "x.image")
    state.write(b"data")
    state.path.chmod(0o620)
    with pytest.raises(ImageError, match="another user"):
        state.read()
    state.path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(state.path, 12345, -1)
        with pytest.raises(ImageError, match="another user"):
            state.read()
    state.path.unlink()
    os.mkfifo(state.path)
    with pytest.raises(ImageError, match="regular file"):
        state.read()
    state.path.unlink()
    state.path.symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic"):
        state.read()


def test_where_state_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert state_directory() == Path("/var/lib/one")
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state_directory() == Path("/x/fsd")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state_directory() == Path("/var/lib/fsd")
    paths = {state_path(tmp_path, s, w) for s in ("/a", "/b/a", "/") for w in ("/m", "/n")}
    assert len(paths) == 6
    for path in paths:
        assert path.parent == tmp_path
        assert not path.name.startswith((".", "-"))


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_start_continues_without_a_bad_image(damage: bytes | None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    state = StateFile(tmp_path / "image")
    world = World(source)
    guest = world.observer()
    guest.keep(b"t" * 16)
    world.mark(guest, "", int(Mask.CREATE))
    Saver(world.export, state).save()
    world.close()
    if damage is None:  # whole, and of another directory
        saved = image.decode(state.path.read_bytes())
        state.write(image.encode(dataclasses.replace(saved, root_ino=1)))
    else:
        state.write(damage)
    said: list[str] = []
    export = open_export(lambda: Export(str(source)), state, said.append)
    (line,) = said
    assert line.startswith(f"image {state.path} cannot be restored: ")
    assert line.endswith("; starting without it")
    assert "\n" not in line
    assert export.guests == []
    assert len(export.watcher) == 0
    export.close()


def test_a_start_continues_with_a_good_image(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    state = StateFile(tmp_path / "image")
    world = World(source)
    guest = world.observer()
    guest.keep(b"t" * 16)
    world.mark(guest, "", int(EVENTS))
    saver = Saver(world.export, state)
    assert saver.is_needed
    assert saver.save()["path"] == str(state.path)
    assert not world.export.is_changed
    world.close()
    said: list[str] = []
    export = open_export(lambda: Export(str(source)), state, said.append)
    assert not said
    assert export.reconnect(b"t" * 16, 0) is not None
    assert len(export.watcher) == 1
    export.close()


def test_an_older_state_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    """Images are written in another thread, and on request in this one."""
    source = tmp_path / "source"
    source.mkdir()
    state = StateFile(tmp_path / "image")
    world = World(source)
    saver = Saver(world.export, state)
    write_old = saver.take()
    world.export.hand_marks()
    saver.take()()
    new = state.path.read_bytes()
    write_old()
    assert state.path.read_bytes() == new
    assert len(image.decode(new).guests) == 1
    world.close()


@pytest.mark.slow
def test_many_marks_take_little() -> None:
    """A fifth of what `python -m bench checkpoint` does, in the time that all of it may take; in
    processor time, as other programs may be busy.
    """
    saved, restored, size = saved_and_restored(20_000, time.process_time)
    assert saved + restored < 5
    assert size < 20_000 * 150
