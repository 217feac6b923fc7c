"""The envelope of images: all that is not exactly what was written is refused, and says why."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.images import ImageError, pack, unpack

IMAGE = pack("server", 3, b"body")


@given(st.binary(max_size=300), st.integers(0, 0xFFFF))
def test_comes_back(body: bytes, version: int) -> None:
    assert unpack(pack("watcher", version, body), "watcher", version) == body


def test_layout() -> None:
    assert IMAGE[:8] == b"fsdimage"
    assert struct.unpack_from("<HH", IMAGE, 8) == (1, 3)
    assert IMAGE[12:32] == b"server".ljust(20, b"\0")
    assert struct.unpack_from("<Q", IMAGE, 32) == (4,)
    assert len(IMAGE) == 40 + 32 + 4


@pytest.mark.parametrize("size", range(len(IMAGE)))
def test_cut_short(size: int) -> None:
    with pytest.raises(ImageError, match="cut short"):
        unpack(IMAGE[:size], "server", 3)


@pytest.mark.parametrize("bit", range(len(IMAGE) * 8))
def test_every_bit_counts(bit: int) -> None:
    damaged = bytearray(IMAGE)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ImageError):
        unpack(bytes(damaged), "server", 3)


@pytest.mark.parametrize(
    ("data", "kind", "version", "words"),
    [
        (b"PK\3\4" + bytes(100), "server", 3, "not an fsd image"),
        (IMAGE + b"x", "server", 3, "1 bytes after its end"),
        (IMAGE[:-1] + b"Y", "server", 3, "checksum"),
        (IMAGE, "watcher", 3, "of kind 'server', not 'watcher'"),
        (IMAGE, "server", 2, "has version 3, this program reads version 2"),
        (IMAGE[:8] + b"\2\0" + IMAGE[10:], "server", 3, "header has version 2"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, kind: str, version: int, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        unpack(data, kind, version)


@given(st.binary(max_size=200))
def test_rubbish(data: bytes) -> None:
    for prefix in (b"", IMAGE[:8], IMAGE[:12]):
        with pytest.raises(ImageError):
            unpack(prefix + data, "server", 3)


@pytest.mark.parametrize("kind", ["", "x" * 21])
def test_a_kind_that_does_not_fit(kind: str) -> None:
    with pytest.raises(ValueError, match="1 to 20"):
        pack(kind, 1, b"")
