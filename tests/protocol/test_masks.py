"""Mask algebra: the kernel's values, the laws of a requested mask, words and back."""

from __future__ import annotations

import errno
import re
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import masks
from protocol.masks import EVENTS, Mask, MaskError, describe, names, parse, requested

from . import norm, vectors

HEADER = Path("/usr/include/linux/inotify.h")
VALUES = {
    "IN_ACCESS": 0x1, "IN_MODIFY": 0x2, "IN_ATTRIB": 0x4, "IN_CLOSE_WRITE": 0x8,
    "IN_CLOSE_NOWRITE": 0x10, "IN_OPEN": 0x20, "IN_MOVED_FROM": 0x40, "IN_MOVED_TO": 0x80,
    "IN_CREATE": 0x100, "IN_DELETE": 0x200, "IN_DELETE_SELF": 0x400, "IN_MOVE_SELF": 0x800,
    "IN_UNMOUNT": 0x2000, "IN_Q_OVERFLOW": 0x4000, "IN_IGNORED": 0x8000,
    "IN_EXCL_UNLINK": 0x0400_0000, "IN_ISDIR": 0x4000_0000, "IN_ONESHOT": 0x8000_0000,
}  # fmt: skip
FLAGS = {"IN_ONLYDIR", "IN_DONT_FOLLOW", "IN_MASK_CREATE", "IN_MASK_ADD"}
"""Of inotify_add_watch(2) alone: no mark and no event has them."""
STRIPPED = (
    Mask.IGNORED | Mask.UNMOUNT | Mask.Q_OVERFLOW | Mask.ONESHOT | Mask.EXCL_UNLINK
    | Mask.EVENT_ON_CHILD | Mask.ISDIR
)  # fmt: skip
ALL = EVENTS | STRIPPED

EVENT_SETS = st.lists(st.sampled_from([m for m in Mask if m & EVENTS])).map(
    lambda bits: reduce(or_, bits, Mask(0))
)
STRIPPED_SETS = st.lists(st.sampled_from([m for m in Mask if m & STRIPPED])).map(
    lambda bits: reduce(or_, bits, Mask(0))
)
ANY = st.integers(0, (1 << 64) - 1) | st.integers(0, 0xFFFF) | EVENT_SETS.map(int)


def kernel_values() -> dict[str, int]:
    """What this machine's kernel header defines; the known values where it is not installed."""
    if not HEADER.exists():
        return VALUES
    found = re.findall(r"#define\s+(IN_\w+)\s+(0x[0-9a-f]+)", HEADER.read_text())
    return {name: int(value, 16) for name, value in found}


# Values


def test_values_are_the_kernels() -> None:
    kernel = {name: bit for name, bit in kernel_values().items() if name not in FLAGS}
    # Not in the user's header but in include/linux/fsnotify_backend.h:
    ours = {f"IN_{mask.name}": int(mask) for mask in Mask if mask is not Mask.EVENT_ON_CHILD}
    assert ours == kernel == VALUES
    assert int(Mask.EVENT_ON_CHILD) == 0x0800_0000


def test_bits_are_single_and_apart() -> None:
    assert all(int(mask).bit_count() == 1 for mask in Mask)
    assert sum(Mask) == ALL


def test_groups() -> None:
    assert EVENTS == 0xFFF
    assert masks.CLOSE == 0x18
    assert masks.MOVE == 0xC0
    assert masks.SELF == 0xC00
    assert masks.STRUCTURE == 0x3C0


def test_the_document_has_every_bit() -> None:
    rows = norm.table("Masks")[1:]
    assert [(int(bit, 16), name) for bit, name, _ in rows] == [(int(m), m.name) for m in Mask]
    stripped = {int(bit, 16) for bit, _, what in rows if what.startswith("stripped")}
    assert sum(stripped) == STRIPPED
    assert sum(int(bit, 16) for bit, _, what in rows if what == "event") == EVENTS


# Requests


@pytest.mark.parametrize("row", vectors.load()["masks"], ids=lambda row: str(row["name"]))
def test_request_vectors(row: dict[str, Any]) -> None:
    if row["result"] is not None:
        assert requested(row["requested"]) == row["result"]
        return
    with pytest.raises(MaskError) as caught:
        requested(row["requested"])
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("bit", [m for m in Mask if m & STRIPPED])
def test_a_bit_of_the_kernels_own_is_stripped_and_asks_for_nothing(bit: Mask) -> None:
    assert requested(Mask.CREATE | bit) == Mask.CREATE
    assert requested(EVENTS | bit) == EVENTS
    with pytest.raises(MaskError):
        requested(bit)


@pytest.mark.parametrize("bit", [m for m in Mask if m & EVENTS])
def test_a_single_event_is_kept(bit: Mask) -> None:
    assert requested(bit) == bit


@pytest.mark.parametrize("position", [p for p in range(64) if not 1 << p & ALL])
def test_a_bit_that_does_not_exist_is_refused(position: int) -> None:
    with pytest.raises(MaskError):
        requested(1 << position)
    with pytest.raises(MaskError):
        requested(EVENTS | 1 << position)


@pytest.mark.parametrize("bits", [-1, -(1 << 70), 1 << 64, 1 << 200])
def test_no_mask_at_all(bits: int) -> None:
    """The RFC's server crashed on a bad mask; here it is one typed error with EINVAL."""
    with pytest.raises(MaskError) as caught:
        requested(bits)
    assert caught.value.errno == errno.EINVAL


@given(ANY)
def test_request_is_idempotent_or_refused(bits: int) -> None:
    try:
        mask = requested(bits)
    except MaskError:
        assert bits
        assert bits & ~int(ALL) or not bits & EVENTS
        return
    assert requested(mask) == mask == bits & EVENTS
    assert bool(mask) == bool(bits)


@given(EVENT_SETS, STRIPPED_SETS)
def test_stripped_bits_change_nothing(events: Mask, own: Mask) -> None:
    if events:
        assert requested(events | own) == events
    elif own:
        with pytest.raises(MaskError):
            requested(own)
    else:
        assert requested(0) == 0


@given(EVENT_SETS, EVENT_SETS)
def test_requests_aggregate(one: Mask, other: Mask) -> None:
    """The OR of two requests is a request for both."""
    assert requested(one | other) == requested(one) | requested(other)


# Words


WORDS = [
    ("create", Mask.CREATE),
    ("create,delete", Mask.CREATE | Mask.DELETE),
    ("IN_CREATE|IN_ISDIR", Mask.CREATE | Mask.ISDIR),
    (" Modify , in_attrib ", Mask.MODIFY | Mask.ATTRIB),
    ("close", masks.CLOSE),
    ("move", masks.MOVE),
    ("all", EVENTS),
    ("IN_ALL_EVENTS", EVENTS),
    ("IN_CLOSE|create,create", masks.CLOSE | Mask.CREATE),
]


@pytest.mark.parametrize(("text", "mask"), WORDS)
def test_parse(text: str, mask: Mask) -> None:
    assert parse(text) == mask


@pytest.mark.parametrize("text", ["", ",", "create,", "created", "IN_", "in_in_create", "0x100"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(MaskError):
        parse(text)


def test_parse_names_the_unknown_word() -> None:
    with pytest.raises(MaskError, match="'renamed'"):
        parse("create,renamed")


NAMED = [
    (0, [], "0"),
    (0x100, ["create"], "IN_CREATE"),
    (0x4000_0100, ["create", "isdir"], "IN_CREATE|IN_ISDIR"),
    (0x18, ["close_write", "close_nowrite"], "IN_CLOSE_WRITE|IN_CLOSE_NOWRITE"),
    (0x1000, ["0x1000"], "IN_0X1000"),
    (0x1_0000_0002, ["modify", "0x100000000"], "IN_MODIFY|IN_0X100000000"),
]


@pytest.mark.parametrize(("bits", "words", "text"), NAMED)
def test_names(bits: int, words: list[str], text: str) -> None:
    assert names(bits) == words
    assert describe(bits) == text


@given(st.sets(st.sampled_from(list(Mask)), min_size=1))
def test_words_come_back(bits: set[Mask]) -> None:
    mask = reduce(or_, bits)
    assert parse(",".join(names(mask))) == mask
    assert parse("|".join(names(mask)).upper()) == mask
    assert parse(describe(mask)) == mask
    assert len(names(mask)) == len(bits)


@given(st.integers(0, (1 << 64) - 1))
def test_names_hide_no_bit(bits: int) -> None:
    known = {mask.name.lower(): int(mask) for mask in Mask if mask.name}
    assert sum(known[word] if word in known else int(word, 16) for word in names(bits)) == bits


@given(st.text())
def test_any_words_are_a_mask_or_a_mask_error(text: str) -> None:
    with suppress(MaskError):
        assert parse(text)
