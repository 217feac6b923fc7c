"""The fdinfo parser: the kernel's documented lines, any text, and this machine's own marks."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.fdinfo import (
    MarkInfo,
    TargetInfo,
    parse_fanotify,
    parse_fdinfo,
    parse_flags,
    parse_targets,
)
from protocol.handles import NodeKey, decode_fh, encode_fh
from protocol.masks import EVENTS, Mask

from . import kernel
from .strategies import integers

NO_HANDLE = (0, b"")
# The first four from Documentation/filesystems/proc.rst, the FUSE one as seen on Linux 6.18.
TABLE: list[tuple[str, list[MarkInfo]]] = [
    (
        "inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 "
        "fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d",
        [MarkInfo("inotify", 3, 0x9E7E, 0x800013, 0, 0x800AFCE, 0, 1,
                  bytes.fromhex("7e9e0000640d1b6d"))],
    ),
    ("fanotify flags:10 event-flags:0", []),
    (
        "fanotify mnt_id:12 mflags:40 mask:38 ignored_mask:40000003",
        [MarkInfo("fanotify", -1, 0, 0, 0x12, 0x38, 0x4000_0003, *NO_HANDLE, 0x40)],
    ),
    (
        "fanotify ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:40000000 "
        "fhandle-bytes:8 fhandle-type:1 f_handle:69f90400c275b5b4",
        [MarkInfo("fanotify", -1, 0x4F969, 0x800013, 0, 0x3B, 0x4000_0000, 1,
                  bytes.fromhex("69f90400c275b5b4"))],
    ),
    (
        "inotify wd:1 ino:1 sdev:27 mask:fff ignored_mask:0 "
        "fhandle-bytes:c fhandle-type:81 f_handle:000000000100000000000000",
        [MarkInfo("inotify", 1, 1, 0x27, 0, 0xFFF, 0, 0x81,
                  bytes.fromhex("000000000100000000000000"))],
    ),
    (
        "fanotify sdev:27 mflags:0 mask:100003b ignored_mask:0",
        [MarkInfo("fanotify", -1, 0, 0x27, 0, 0x100003B, 0, *NO_HANDLE)],
    ),
    # Of a file system without handles, the rest of the line is missing.
    (
        "inotify wd:1 ino:2 sdev:3 mask:4 ignored_mask:0 ",
        [MarkInfo("inotify", 1, 2, 3, 0, 4, 0, *NO_HANDLE)],
    ),
    ("pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t1057\n", []),
    ("eventfd-count:                0\neventfd-id: 3", []),
    ("tfd:        5 events:       19 data: 5 pos:0 ino:61af sdev:7", []),
    ("", []),
    # What a later kernel might write: no mark is better than a wrong one.
    ("inotify wd:1 ino:zz sdev:3 mask:4 ignored_mask:0", []),
    ("inotify wd:1 ino:2 sdev:3 mask: ignored_mask:0", []),
    ("inotify wd:1 ino:2 sdev:3 mask:4 f_handle:abc", []),
    ("inotify2 wd:1 ino:2 sdev:3 mask:4", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "marks"), TABLE)
def test_table(text: str, marks: list[MarkInfo]) -> None:
    assert list(parse_fdinfo(text)) == marks


def test_all_of_the_table_in_one_file() -> None:
    text = "\n".join(text for text, _ in TABLE)
    assert list(parse_fdinfo(text)) == [mark for _, marks in TABLE for mark in marks]


def line(mark: MarkInfo) -> str:
    """As the kernel writes an inode mark."""
    head = f"inotify wd:{mark.wd:x}" if mark.family == "inotify" else "fanotify"
    mflags = "" if mark.family == "inotify" else "mflags:0 "
    return (
        f"{head} ino:{mark.ino:x} sdev:{mark.sdev:x} {mflags}mask:{mark.mask:x} "
        f"ignored_mask:{mark.ignored_mask:x} fhandle-bytes:{len(mark.handle):x} "
        f"fhandle-type:{mark.handle_type:x} f_handle:{mark.handle.hex()}\n"
    )


MARKS = st.builds(
    lambda inotify, wd, ino, sdev, mask, ignored, kind, handle: MarkInfo(
        "inotify" if inotify else "fanotify", wd if inotify else -1, ino, sdev, 0, mask,
        0 if inotify else ignored, kind, handle,
    ),
    st.booleans(), st.integers(0, (1 << 31) - 1), integers("u64"), integers("u32"),
    integers("u32"), integers("u32"), integers("u8"), st.binary(max_size=128),
)  # fmt: skip


@given(st.lists(MARKS, max_size=5))
def test_marks_survive(marks: list[MarkInfo]) -> None:
    text = "pos:\t0\nflags:\t00\n" + "".join(map(line, marks))
    assert list(parse_fdinfo(text)) == marks


@given(integers("u64"), integers("u32"))
def test_a_fuse_node_comes_out_of_its_line(nodeid: int, generation: int) -> None:
    key = NodeKey(nodeid, generation)
    mark = MarkInfo("inotify", 1, 1, 0x27, 0, 0xFFF, 0, 0x81, encode_fh(key))
    (found,) = parse_fdinfo(line(mark))
    assert decode_fh(found.handle_type, found.handle) == key


WORDS = st.sampled_from(
    ["inotify", "fanotify", "wd:", "ino:", "sdev:", "mask:", "ignored_mask:", "fhandle-type:",
     "f_handle:", " ", "\n", "0", "f", "fff", "-", "\t", ":", "mask:1", " mask:"]
)  # fmt: skip


@given(st.text() | st.lists(WORDS).map("".join) | st.lists(WORDS).map(" ".join))
def test_any_text_gives_marks_and_never_an_error(text: str) -> None:
    for mark in parse_fdinfo(text):
        assert mark.family in ("inotify", "fanotify")


# Other lines

SET = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n"


def test_entries_of_an_epoll_set() -> None:
    text = (
        f"{SET}tfd:       20 events:       19 data: fedcba9876543210  pos:0 ino:40e sdev:10\n"
        "tfd:       20 events: c0000001 data:                2  pos:-1 ino:40f sdev:fe00000\n"
        "tfd: x events: 1 data: 2  pos:0 ino:40f sdev:f\n"
    )
    assert list(parse_targets(text)) == [
        TargetInfo(20, 0x19, 0xFEDC_BA98_7654_3210, 0, 0x40E, 0x10),
        TargetInfo(20, 0xC000_0001, 2, -1, 0x40F, 0xFE0_0000),
    ]
    assert list(parse_fdinfo(text)) == []


def test_flags() -> None:
    assert parse_flags(SET) == os.O_CLOEXEC | os.O_RDWR
    group = f"{SET}fanotify flags:26 event-flags:8002\n"
    assert parse_fanotify(group) == (0x26, 0x8002)
    for text in ("", "flags:\tx\n", "fanotify flags: event-flags:\n"):
        with pytest.raises(ValueError, match="flags in fdinfo"):
            parse_flags(text)
        with pytest.raises(ValueError, match="flags in fdinfo"):
            parse_fanotify(text)


@given(st.text() | st.lists(WORDS).map(" ".join))
def test_any_text_gives_entries_and_never_another_error(text: str) -> None:
    assert all(entry.tfd >= 0 for entry in parse_targets(text))


def test_an_epoll_set_of_this_kernel() -> None:
    with kernel.inotify() as fd, select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        (entry,) = parse_targets(kernel.fdinfo(epoll.fileno()))
        assert (entry.tfd, entry.data & 0xFFFF_FFFF) == (fd, fd)
        assert entry.ino == os.fstat(fd).st_ino
        assert parse_flags(kernel.fdinfo(epoll.fileno())) & os.O_CLOEXEC


# This kernel


def sdev(path: Path) -> int:
    device = path.stat().st_dev
    return os.major(device) << 20 | os.minor(device)


def test_inotify_marks_of_this_kernel() -> None:
    with kernel.directory() as path, kernel.inotify() as fd:
        file = path / "file"
        file.touch()
        wanted: dict[int, tuple[Path, int]] = {}
        asked = {path: EVENTS, file: Mask.MODIFY | Mask.CLOSE_WRITE | Mask.EXCL_UNLINK}
        for place, mask in asked.items():
            wanted[kernel.add_watch(fd, place, mask)] = place, int(mask)
        marks = list(parse_fdinfo(kernel.fdinfo(fd)))
        assert sorted(mark.wd for mark in marks) == sorted(wanted)
        for mark in marks:
            place, bits = wanted[mark.wd]
            assert mark.family == "inotify"
            assert mark.ino == place.stat().st_ino
            assert mark.sdev == sdev(place)
            assert mark.mask & EVENTS == bits & EVENTS
            assert (mark.handle_type, mark.handle) == kernel.file_handle(place)


def test_a_modified_and_a_removed_mark_of_this_kernel() -> None:
    with kernel.directory() as path, kernel.inotify() as fd:
        wd = kernel.add_watch(fd, path, Mask.CREATE)
        assert kernel.add_watch(fd, path, Mask.DELETE) == wd
        (mark,) = parse_fdinfo(kernel.fdinfo(fd))
        assert mark.mask & EVENTS == Mask.DELETE
        path.rmdir()
        assert list(parse_fdinfo(kernel.fdinfo(fd))) == []
        path.mkdir()  # for the clean-up


def test_fanotify_inode_mark_of_this_kernel() -> None:
    with kernel.directory() as path, kernel.fanotify() as fd:
        kernel.fanotify_mark(fd, 0, Mask.MODIFY, path)
        (mark,) = parse_fdinfo(kernel.fdinfo(fd))
        assert (mark.family, mark.wd, mark.mnt_id) == ("fanotify", -1, 0)
        assert (mark.ino, mark.sdev) == (path.stat().st_ino, sdev(path))
        assert mark.mask & EVENTS == Mask.MODIFY
        assert (mark.handle_type, mark.handle) == kernel.file_handle(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mount and superblock marks take CAP_SYS_ADMIN")
def test_fanotify_mount_and_superblock_marks_of_this_kernel() -> None:
    with kernel.directory() as path, kernel.fanotify() as fd:
        kernel.fanotify_mark(fd, kernel.FAN_MARK_MOUNT, Mask.MODIFY, path)
        (mount,) = parse_fdinfo(kernel.fdinfo(fd))
        assert (mount.ino, mount.sdev) == (0, 0)
        assert mount.mnt_id == kernel.mount_id(path)
        assert mount.mask & EVENTS == Mask.MODIFY
    with kernel.directory() as path, kernel.fanotify() as fd:
        kernel.fanotify_mark(fd, kernel.FAN_MARK_FILESYSTEM, Mask.MODIFY, path)
        (superblock,) = parse_fdinfo(kernel.fdinfo(fd))
        assert (superblock.ino, superblock.mnt_id) == (0, 0)
        assert superblock.sdev == sdev(path)
        assert superblock.mask & EVENTS == Mask.MODIFY
