"""FUSE file handles: the node that a mark is on, all 64 bits of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.handles import (
    FILEID_INO64_GEN,
    FILEID_INO64_GEN_PARENT,
    NodeKey,
    decode_fh,
    encode_fh,
)

from . import vectors
from .strategies import integers

VECTORS = [pytest.param(row, id=row["name"]) for row in vectors.load()["handles"]]
KEYS = st.builds(NodeKey, integers("u64"), integers("u32"))
NATIVE = sys.byteorder


def test_values_are_the_kernels() -> None:
    """include/linux/exportfs.h"""
    assert FILEID_INO64_GEN == 0x81
    assert FILEID_INO64_GEN_PARENT == 0x82


@pytest.mark.parametrize("row", VECTORS)
def test_vectors(row: dict[str, Any]) -> None:
    words = [row["hex"][i : i + 8] for i in range(0, 24, 8)]
    # The vectors are little-endian; a handle is in the order of the machine.
    native = b"".join(bytes.fromhex(w)[:: 1 if NATIVE == "little" else -1] for w in words)
    key = NodeKey(**row["fields"])
    assert encode_fh(key) == native
    assert decode_fh(row["type"], native) == key


def test_as_seen_in_fdinfo_of_a_fuse_root() -> None:
    """The line of a real mount's root on Linux 6.18, x86-64."""
    if NATIVE == "little":
        seen = bytes.fromhex("000000000100000000000000")
        assert decode_fh(0x81, seen) == NodeKey(1, 0)
    assert encode_fh(NodeKey(1, 0)) == b"".join(n.to_bytes(4, NATIVE) for n in (0, 1, 0))


@pytest.mark.parametrize("nodeid", [1 << 32, (1 << 32) - 1, 0xFEDC_BA98_7654_3210, (1 << 64) - 1])
def test_nodeids_are_not_cut(nodeid: int) -> None:
    assert decode_fh(FILEID_INO64_GEN, encode_fh(NodeKey(nodeid, 1))).nodeid == nodeid


def test_high_half_first() -> None:
    data = encode_fh(NodeKey(0x1111_1111_2222_2222, 0x3333_3333))
    assert data.hex() == "1" * 8 + "2" * 8 + "3" * 8


def test_parent_is_passed_over() -> None:
    data = encode_fh(NodeKey(5, 6)) + encode_fh(NodeKey(7, 8))
    assert decode_fh(FILEID_INO64_GEN_PARENT, data) == NodeKey(5, 6)


@pytest.mark.parametrize("kind", [0, 1, 2, 0x4D, 0x80, 0x83, 0xFE, 0xFF, -1, 0x181])
def test_other_kinds_are_refused(kind: int) -> None:
    with pytest.raises(ValueError, match="not a FUSE file handle"):
        decode_fh(kind, bytes(12))


@pytest.mark.parametrize("size", range(12))
def test_short_handles_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="not a FUSE file handle"):
        decode_fh(FILEID_INO64_GEN, bytes(size))


@given(KEYS)
def test_keys_survive(key: NodeKey) -> None:
    assert decode_fh(FILEID_INO64_GEN, encode_fh(key)) == key


@given(st.integers(0, 300), st.binary(max_size=40))
def test_any_bytes_are_a_key_or_a_value_error(kind: int, data: bytes) -> None:
    try:
        key = decode_fh(kind, data)
    except ValueError:
        return
    assert encode_fh(key) == data[:12]
