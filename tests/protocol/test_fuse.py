"""FUSE messages: against the kernel's header as the C compiler lays it out, and on any input."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol import fuse
from protocol.fuse import DecodeError, Fattr, Fopen, Init, Opcode, Wire

HEADER = Path("/usr/include/linux/fuse.h")
NAMES = {  # where the layout's own tuple does not say them
    "INIT_OUT": "major minor max_readahead flags max_background congestion_threshold max_write "
    "time_gran max_pages map_alignment flags2 max_stack_depth request_timeout",
    "INIT_FLAGS2": "flags2",
    "FORGET_IN": "nlookup",
    "BATCH_FORGET_IN": "count",
    "RENAME_IN": "newdir",
    "LINK_IN": "oldnodeid",
    "GETXATTR_IN": "size",
    "ACCESS_IN": "mask",
    "INTERRUPT_IN": "unique",
    "LK_IN": "fh owner lk.start lk.end lk.type lk.pid lk_flags",
    "ATTR": "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid "
    "rdev blksize flags",
    "ENTRY_OUT": "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec",
    "ATTR_OUT": "attr_valid attr_valid_nsec",
    "STATX_OUT": "attr_valid attr_valid_nsec flags stat.mask stat.blksize stat.attributes "
    "stat.nlink stat.uid stat.gid stat.mode stat.ino stat.size stat.blocks stat.attributes_mask "
    "stat.atime.tv_sec stat.atime.tv_nsec stat.btime.tv_sec stat.btime.tv_nsec "
    "stat.ctime.tv_sec stat.ctime.tv_nsec stat.mtime.tv_sec stat.mtime.tv_nsec "
    "stat.rdev_major stat.rdev_minor stat.dev_major stat.dev_minor",
    "OPEN_OUT": "fh open_flags backing_id",
    "WRITE_OUT": "size",
    "STATFS_OUT": "st.blocks st.bfree st.bavail st.files st.ffree st.bsize st.namelen st.frsize",
    "GETXATTR_OUT": "size",
    "LK_OUT": "lk.start lk.end lk.type lk.pid",
    "IOCTL_OUT": "result flags in_iovs out_iovs",
    "POLL_OUT": "revents",
    "LSEEK_OUT": "offset",
    "COPY_FILE_RANGE_OUT": "bytes_copied",
    "DIRENT": "ino off namelen type",
    "NOTIFY_INVAL_INODE_OUT": "ino off len",
    "NOTIFY_INVAL_ENTRY_OUT": "parent namelen flags",
    "NOTIFY_POLL_OUT": "kh",
    "EXT_HEADER": "size type",
    "SUPP_GROUPS": "nr_groups",
}
SINCE = {  # FUSE 7.x, where younger than the oldest header that Debian 12 has
    "SUPP_GROUPS": 39,  # 38 by its list of changes, which 38 was released without
    "FUSE_EXT_GROUPS": 39,
    "STATX_IN": 39, "STATX_OUT": 39, "OPEN_OUT.backing_id": 40, "INIT_OUT.max_stack_depth": 40,
    "INIT_OUT.request_timeout": 43, "COPY_FILE_RANGE_OUT": 45, Opcode.STATX: 39,
    Opcode.COPY_FILE_RANGE_64: 45,
}  # fmt: skip
PARTS = {"INIT_IN", "INIT_FLAGS2", "ENTRY_OUT", "ATTR_OUT"}
"""Layouts of a part of their struct."""
WIRES: dict[str, Wire[Any]] = {
    name: value for name, value in vars(fuse).items() if isinstance(value, Wire)
}


def fields(name: str) -> list[str]:
    if name in NAMES:
        return NAMES[name].split()
    return list(WIRES[name]._make.__self__._fields)  # type: ignore[attr-defined]


def places(wire: Wire[Any], count: int) -> list[tuple[int, int]]:
    """Offset and size of each field, as ``pack`` puts them."""
    found = []
    for index in range(count):
        for ones in (-1, (1 << 64) - 1, (1 << 32) - 1, (1 << 16) - 1):  # -1: signed
            try:
                data = wire.pack(*(ones * (index == other) for other in range(count)))
            except struct.error:
                continue
            break
        assert data.count(0xFF) == len(data.strip(b"\0"))
        found.append((len(data) - len(data.lstrip(b"\0")), data.count(0xFF)))
    return found


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """What the C compiler makes of the header: (offset, size) of fields, (size,) of structs, the
    values of constants."""
    if not HEADER.exists():
        pytest.skip(f"there is no {HEADER}: script/bootstrap installs it")
    lines: list[str] = []

    def line(since: int, key: str, *values: str) -> None:
        form = " ".join(["%s", *(["%lld"] * len(values))])
        numbers = ", ".join(f"(long long)({value})" for value in values)
        print_it = f'printf("{form}\\n", "{key}", {numbers});'
        lines.extend([f"#if FUSE_KERNEL_MINOR_VERSION >= {since}", print_it, "#endif"])

    for name, wire in WIRES.items():
        kind = "struct " + wire.name.partition(".")[0]
        since = SINCE.get(name, 0)
        line(since, name, f"sizeof({kind})")
        for field in fields(name):
            key = f"{name}.{field}"
            place = f"offsetof({kind}, {field})", f"sizeof((({kind} *)0)->{field})"
            line(SINCE.get(key, since), key, *place)
    for opcode in Opcode:
        line(SINCE.get(opcode, 0), f"Opcode.{opcode.name}", f"FUSE_{opcode.name}")
    for flags, prefix in ((Init, "FUSE"), (Fattr, "FATTR"), (Fopen, "FOPEN")):
        for flag in flags:
            macro = f"{prefix}_{flag.name}"
            lines.append(f"#ifdef {macro}")
            line(0, f"{flags.__name__}.{flag.name}", macro)
            lines.append("#endif")
    for macro in CONSTANTS:
        line(SINCE.get(macro, 0), macro, macro)
    line(0, "minor", "FUSE_KERNEL_MINOR_VERSION")
    folder = tmp_path_factory.mktemp("header")
    source = folder / "layout.c"
    includes = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/fuse.h>\n"
    source.write_text(includes + "int main(void) {\n" + "\n".join(lines) + "\n}\n")
    subprocess.run(["gcc", "-o", folder / "layout", source], check=True, timeout=60)
    output = subprocess.run([folder / "layout"], capture_output=True, check=True, text=True).stdout
    rows = [row.split() for row in output.splitlines()]
    return {key: tuple(map(int, values)) for key, *values in rows}


CONSTANTS = {
    "FUSE_GETATTR_FH": fuse.GETATTR_FH,
    "FUSE_WRITE_CACHE": fuse.WRITE_CACHE,
    "FUSE_WRITE_LOCKOWNER": fuse.WRITE_LOCKOWNER,
    "FUSE_WRITE_KILL_SUIDGID": fuse.WRITE_KILL_SUIDGID,
    "FUSE_RELEASE_FLUSH": fuse.RELEASE_FLUSH,
    "FUSE_RELEASE_FLOCK_UNLOCK": fuse.RELEASE_FLOCK_UNLOCK,
    "FUSE_LK_FLOCK": fuse.LK_FLOCK,
    "FUSE_FSYNC_FDATASYNC": fuse.FSYNC_FDATASYNC,
    "FUSE_OPEN_KILL_SUIDGID": fuse.OPEN_KILL_SUIDGID,
    "FUSE_SETXATTR_ACL_KILL_SGID": fuse.SETXATTR_ACL_KILL_SGID,
    "FUSE_ATTR_SUBMOUNT": fuse.ATTR_SUBMOUNT,
    "FUSE_IOCTL_COMPAT": fuse.IOCTL_COMPAT,
    "FUSE_IOCTL_UNRESTRICTED": fuse.IOCTL_UNRESTRICTED,
    "FUSE_IOCTL_32BIT": fuse.IOCTL_32BIT,
    "FUSE_IOCTL_DIR": fuse.IOCTL_DIR,
    "FUSE_POLL_SCHEDULE_NOTIFY": fuse.POLL_SCHEDULE_NOTIFY,
    "FUSE_NOTIFY_POLL": fuse.NOTIFY_POLL,
    "FUSE_MAX_NR_SECCTX": fuse.MAX_NR_SECCTX,
    "FUSE_EXT_GROUPS": fuse.EXT_GROUPS,
    "FUSE_ROOT_ID": fuse.ROOT_ID,
    "FUSE_KERNEL_VERSION": fuse.MAJOR,
}


@pytest.mark.parametrize("name", WIRES)
def test_layouts_are_the_kernels(name: str, kernel: dict[str, tuple[int, ...]]) -> None:
    wire, names = WIRES[name], fields(name)
    if kernel["minor"][0] < SINCE.get(name, 0):
        assert name not in kernel  # the vectors below have it
        return
    if name not in PARTS:
        assert kernel[name] == (wire.size,)
    for field, place in zip(names, places(wire, len(names)), strict=True):
        key = f"{name}.{field}"
        if kernel["minor"][0] >= SINCE.get(key, 0):
            assert key == "INIT_FLAGS2.flags2" or kernel[key] == place, field


def test_the_second_flags_of_init(kernel: dict[str, tuple[int, ...]]) -> None:
    assert kernel["INIT_FLAGS2.flags2"] == (fuse.INIT_IN.size, fuse.INIT_FLAGS2.size)


def test_what_a_struct_has_behind_a_part(kernel: dict[str, tuple[int, ...]]) -> None:
    assert kernel["ENTRY_OUT"] == (fuse.ENTRY_SIZE,)
    assert kernel["ATTR_OUT"] == (fuse.ATTR_OUT.size + fuse.ATTR.size,)


def test_statx_is_as_the_kernel_has_it() -> None:
    """Of Linux 6.6 (7.39), where the header may be older: sizes, and where struct statx is."""
    assert (fuse.STATX_IN.size, fuse.STATX_OUT.size) == (24, 32 + 256)
    wanted = {"stat.mask": 32, "stat.ino": 64, "stat.atime.tv_sec": 96, "stat.rdev_major": 160}
    names = fields("STATX_OUT")
    found = dict(zip(names, places(fuse.STATX_OUT, len(names)), strict=True))
    assert {name: found[name][0] for name in wanted} == wanted


def test_numbers_are_the_kernels(kernel: dict[str, tuple[int, ...]]) -> None:
    mine: dict[str, int] = {f"{type(x).__name__}.{x.name}": x for x in Opcode}
    mine |= {f"{kind.__name__}.{x.name}": x for kind in (Init, Fattr, Fopen) for x in kind}
    mine |= CONSTANTS
    known = {key: value for key, value in mine.items() if key in kernel}
    assert {key: kernel[key][0] for key in known} == known
    assert len(mine) - len(known) <= 12, "the header is too old to say much"


def test_every_opcode_of_the_header_is_known(kernel: dict[str, tuple[int, ...]]) -> None:
    body = re.search(r"enum fuse_opcode \{(.*?)\};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    found = re.findall(r"FUSE_(\w+)\s*=\s*(\d+)", body[1])
    assert len(found) > 40
    theirs = {name: int(number) for name, number in found}
    assert theirs.keys() - {"INIT_BSWAP_RESERVED"} <= Opcode.__members__.keys()


# Round trips, and any input


@pytest.mark.parametrize("name", WIRES)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    wire = WIRES[name]
    raw = data.draw(st.binary(min_size=wire.size, max_size=wire.size))
    made = wire.unpack(raw)
    values = (made,) if isinstance(made, int) else made
    packed = wire.pack(*values)
    assert len(packed) == wire.size
    again = wire.unpack(b"xyz" + packed, 3)
    assert again == made
    for length in {0, wire.size - 1, data.draw(st.integers(0, wire.size - 1))}:
        with pytest.raises(DecodeError, match=wire.name):
            wire.unpack(raw[:length])


NAME = st.binary(max_size=300).map(lambda text: text.replace(b"\0", b"."))


@given(st.lists(NAME, max_size=3), st.binary(max_size=9), st.binary(max_size=9))
def test_names(parts: list[bytes], before: bytes, after: bytes) -> None:
    data = before + b"".join(part + b"\0" for part in parts)
    assert fuse.names(data + after, len(before), len(parts)) == parts
    with pytest.raises(DecodeError):
        fuse.names(data + after.replace(b"\0", b"."), len(before), len(parts) + 1)
    if parts:
        assert fuse.name(data + after, len(before)) == parts[0]
        with pytest.raises(DecodeError):
            fuse.name(data[: len(before) + len(parts[0])], len(before))


U64S = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(U64S, U64S), max_size=40), st.integers(1, 2**32 - 1))
def test_forgets(pairs: list[tuple[int, int]], more: int) -> None:
    body = b"".join(fuse.FORGET_ONE.pack(*pair) for pair in pairs)
    assert fuse.forgets(fuse.BATCH_FORGET_IN.pack(len(pairs)) + body + b"behind") == pairs
    with pytest.raises(DecodeError):
        fuse.forgets(fuse.BATCH_FORGET_IN.pack(min(len(pairs) + more, 2**32 - 1)) + body)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.binary(max_size=24))
def test_groups(groups: list[int], context: bytes) -> None:
    def extension(kind: int, data: bytes) -> bytes:
        data += bytes(-len(data) % 8)
        return fuse.EXT_HEADER.pack(8 + len(data), kind) + data

    listed = struct.pack(f"<I{len(groups)}I", len(groups), *groups)
    whole = extension(1, context) + extension(fuse.EXT_GROUPS, listed)
    assert fuse.supplementary_groups(whole) == tuple(groups)
    assert fuse.supplementary_groups(extension(1, context)) == ()
    lie = extension(fuse.EXT_GROUPS, struct.pack("<I", len(groups) + 4) + listed[4:])
    with pytest.raises(DecodeError):
        fuse.supplementary_groups(lie)


@given(st.binary(max_size=100))
@example(b"\0" * 8)  # an extension of no bytes: no way forward
@example(b"\x07\0\0\0" + bytes(4))
@example(b"\xff" * 16)
@example(fuse.EXT_HEADER.pack(9, 1) + b"x")
def test_any_extensions(data: bytes) -> None:
    try:
        groups = fuse.supplementary_groups(data)
    except DecodeError:
        return
    assert len(groups) * 4 <= len(data)


@given(U64S, U64S, st.integers(0, 15), NAME)
def test_directory_entries(ino: int, off: int, kind: int, name: bytes) -> None:
    entry = fuse.dirent(ino, off, kind, name)
    assert len(entry) % 8 == 0
    assert fuse.DIRENT.unpack(entry) == (ino, off, len(name), kind)
    assert entry[fuse.DIRENT.size :].rstrip(b"\0") == name.rstrip(b"\0")
    assert len(entry) - fuse.DIRENT.size - len(name) < 8
