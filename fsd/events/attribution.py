"""Decides which events belong to a call of the server: those that the call is expected to cause.

Apart from the watcher, which reads the queue before and after a call
(docs/decisions/attribution.md).
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.inotify import RawEvent
from protocol.masks import Mask

from ..files.inode import Inode
from .event import HOST, Origin

Expected = tuple[Inode | None, bytes | None, Mask]
"""A watch (the inode's), a name in it, b"" for itself or None for any, and the events that a call
makes."""
Bits = dict[tuple[int, bytes | None], int]
"""The same by watch descriptor and name."""
Matches = Callable[[RawEvent], bool]
_REPEATED = int(Mask.ACCESS | Mask.MODIFY | Mask.ATTRIB)
"""Events that one call may make several times: reading a directory, chown and chmod at once."""
LOOKS = int(Mask.OPEN | Mask.ACCESS | Mask.CLOSE_NOWRITE)
"""Events of a directory whose names are read."""
_ISDIR = int(Mask.ISDIR)  # a Mask's own & costs a microsecond


def is_look(raw: RawEvent) -> bool:
    """Whether it is an event of reading a directory's names."""
    return bool(raw.mask & _ISDIR and raw.mask & LOOKS)


def is_expected(bits: Bits, raw: RawEvent) -> bool:
    """Whether an event is one of these. Most are expected once."""
    key: tuple[int, bytes | None] = (raw.wd, raw.name)
    left = bits.get(key, 0) or bits.get(key := (raw.wd, None), 0)
    seen = raw.mask & 0xFFF
    mine = left & seen
    if mine and not raw.mask & _ISDIR:  # a listing is several reads
        bits[key] = left & (~seen | _REPEATED)
    return bool(mine)


class CallsElsewhere:
    """Calls that run in threads: matching events of other parties meanwhile are taken for
    theirs.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Origin, Bits]] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, origin: Origin, bits: Bits) -> Callable[[], None]:
        """A call begins; returns a function to call at its end."""
        call = (origin, bits)
        self._calls.append(call)

        def remove() -> None:
            self._calls[:] = [other for other in self._calls if other is not call]

        return remove

    def origin_of(self, raw: RawEvent) -> Origin:
        """The origin of an event that no call of this thread has made."""
        for origin, bits in self._calls:
            if is_expected(bits, raw):
                return origin
        return HOST
