"""Decides which events belong to a call of the server: those that the call is expected to cause.

Apart from the watcher, which reads the queue before and after a call
(docs/decisions/attribution.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from protocol.inotify import RawEvent
from protocol.masks import Mask

from ..files.inode import Inode
from .event import HOST, Origin

Expected = tuple[Inode | None, bytes | None, Mask]
"""A watch (the inode's), a name in it, b"" for itself or None for any, and the events that a call
makes."""
Bits = dict[tuple[int, bytes | None], int]
"""The same by watch descriptor and name."""
Finds = Callable[[Sequence[RawEvent]], Collection[int]]
"""Finds those of a call among the events that came meanwhile, by their indices."""
_REPEATED = int(Mask.ACCESS | Mask.MODIFY | Mask.ATTRIB)
"""Events that one call may make several times: reading a directory, chown and chmod at once."""
_OPEN, _ACCESS, _CLOSE = int(Mask.OPEN), int(Mask.ACCESS), int(Mask.CLOSE_NOWRITE)
LOOKS = _OPEN | _ACCESS | _CLOSE
"""Events of a directory whose names are read."""
_ISDIR = int(Mask.ISDIR)  # a Mask's own & costs a microsecond


def is_expected(bits: Bits, raw: RawEvent) -> bool:
    """Whether an event is one of these. Most are expected once."""
    key: tuple[int, bytes | None] = (raw.wd, raw.name)
    left = bits.get(key, 0) or bits.get(key := (raw.wd, None), 0)
    seen = raw.mask & 0xFFF
    mine = left & seen
    if mine:
        bits[key] = left & (~seen | _REPEATED)
    return bool(mine)


def expected_among(bits: Bits, events: Sequence[RawEvent]) -> set[int]:
    """Those that ``is_expected``."""
    return {index for index, raw in enumerate(events) if is_expected(bits, raw)}


def look_among(wd: int, name: bytes, bit: int, events: Sequence[RawEvent]) -> set[int]:
    """The events of one call that opens, reads or closes a directory (``bit`` of LOOKS): of its own
    watch, and by its name on a directory's. Others may have read its names meanwhile, with equal
    events: what is left of these has to be in order.
    """
    found: dict[tuple[int, int], int] = {}  # the call's events, by watch
    opened: Counter[int] = Counter()  # how often it is open for others, by watch
    for index, raw in enumerate(events):
        kind = raw.mask & LOOKS
        if not kind or not raw.mask & _ISDIR or (raw.name != name if raw.name else raw.wd != wd):
            continue
        opened[raw.wd] += (kind == _OPEN) - (kind == _CLOSE)
        if kind != bit:
            continue
        if bit == _OPEN:
            found[raw.wd, 0] = index  # the last
        elif bit == _CLOSE:
            found.setdefault((raw.wd, 0), index)  # the first
        elif opened[raw.wd] <= 0:
            found[raw.wd, index] = index
    return set(found.values())


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
