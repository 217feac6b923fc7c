"""What must have happened to a file between a look-up and the arrival of its mark."""

from __future__ import annotations

import os

import pytest

from fsd.export.seen import GONE, Seen, look, missing
from protocol.masks import Mask

from .support import World

ATTRIB, MODIFY, MOVE_SELF, DELETE_SELF = (
    int(mask) for mask in (Mask.ATTRIB, Mask.MODIFY, Mask.MOVE_SELF, Mask.DELETE_SELF)
)
ONE, TWO = Seen(1, 5, 5), Seen(2, 5, 5)


@pytest.mark.parametrize(
    ("before", "now", "came", "expected"),
    [
        (ONE, ONE, 0, 0),
        (None, ONE, 0, 0),
        (ONE, None, 0, 0),
        (ONE, Seen(2, 5, 6), 0, ATTRIB),  # a link
        (TWO, Seen(1, 5, 6), 0, ATTRIB),  # an unlink
        (TWO, Seen(1, 5, 6), ATTRIB, 0),
        (TWO, Seen(1, 5, 6), MOVE_SELF, ATTRIB),  # no rename takes a link
        (TWO, Seen(1, 6, 6), MODIFY, ATTRIB),
        (TWO, Seen(1, 6, 6), 0, ATTRIB | MODIFY),
        (ONE, Seen(1, 5, 6), 0, ATTRIB),  # a link that came and went; a chmod by another name
        (ONE, Seen(1, 5, 6), MOVE_SELF, 0),
        (ONE, Seen(1, 6, 6), 0, MODIFY),
        (ONE, Seen(1, 6, 6), MODIFY, 0),
        (ONE, Seen(1, 4, 6), ATTRIB, 0),  # utimensat(2)
        (ONE, GONE, 0, ATTRIB | DELETE_SELF),
        (None, GONE, 0, ATTRIB | DELETE_SELF),
        (ONE, GONE, ATTRIB, DELETE_SELF),  # its name went while it was open
        (ONE, GONE, ATTRIB | DELETE_SELF, 0),
    ],
)
def test_what_is_missing(before: Seen | None, now: Seen | None, came: int, expected: int) -> None:
    assert missing(before, now, came) == expected


def test_a_look(world: World) -> None:
    path = world.source / "file"
    path.touch()
    inode = world.node("file")
    assert look(world.table, inode) == Seen.of(os.stat(path))
    path.unlink()
    assert look(world.table, inode) is GONE
