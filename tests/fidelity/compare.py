"""When are two inotify streams the same? Pure functions: no files, no clock, no processes.

inotify merges an event into the last one of its queue when watch, mask and name are equal (it
ignores the cookie), so how often a repeat is seen depends on how fast the program reads. `collapse`
does the same to the complete stream; what remains depends only on what happened, and on how long
the kernel takes between a watch's IN_DELETE_SELF and IN_IGNORED (`join_deaths`).
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

KINDS = {
    0x1: "IN_ACCESS",
    0x2: "IN_MODIFY",
    0x4: "IN_ATTRIB",
    0x8: "IN_CLOSE_WRITE",
    0x10: "IN_CLOSE_NOWRITE",
    0x20: "IN_OPEN",
    0x40: "IN_MOVED_FROM",
    0x80: "IN_MOVED_TO",
    0x100: "IN_CREATE",
    0x200: "IN_DELETE",
    0x400: "IN_DELETE_SELF",
    0x800: "IN_MOVE_SELF",
    0x2000: "IN_UNMOUNT",
    0x4000: "IN_Q_OVERFLOW",
    0x8000: "IN_IGNORED",
    0x40000000: "IN_ISDIR",
}
IN_DELETE_SELF = 0x400
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
DEATH = IN_DELETE_SELF | IN_IGNORED

CONTROL = "~control"
"""The directory of the markers; its events are kept in the streams as landmarks."""


class Event(NamedTuple):
    """One event; `watch` is the relative path that was watched, so no wd number is compared."""

    watch: str
    mask: int
    name: bytes
    cookie: int

    def __str__(self) -> str:
        watch = self.watch.encode("latin-1", "replace").decode(errors="backslashreplace")
        text = f"{watch!r}: {describe(self.mask)}"
        if self.name:
            name = self.name  # of a long one both ends: those are what may differ
            text += f" {name!r}" if len(name) < 60 else f" {name[:9]!r}..{name[-9:]!r}[{len(name)}]"
        return text + (f" #{self.cookie}" if self.cookie else "")


Stream = list[Event]


def describe(mask: int) -> str:
    names = [name for bit, name in KINDS.items() if mask & bit]
    if rest := mask & ~sum(KINDS):
        names.append(hex(rest))
    return "|".join(names) or "0"


def load(text: str) -> Stream:
    """Read the watcher's JSON."""
    return [
        Event(watch, mask, name.encode("latin-1"), cookie)
        for watch, mask, name, cookie in json.loads(text)["events"]
    ]


def since(stream: Stream, marker: bytes) -> Stream:
    """What follows the marker; the noise of setting up lies before it."""
    for index, event in enumerate(stream):
        if event.watch == CONTROL and event.name == marker:
            return stream[index + 1 :]
    raise ValueError(f"the marker {marker!r} is not in the stream")


def collapse(stream: Iterable[Event]) -> Stream:
    """Drop consecutive repeats as the kernel does: the first stays, with its cookie."""
    result: Stream = []
    for event in stream:
        if not result or result[-1][:3] != event[:3]:
            result.append(event)
    return result


def join_deaths(stream: Iterable[Event]) -> Stream:
    """Put each IN_IGNORED of a death right behind its IN_DELETE_SELF.

    The kernel queues the one for all groups, and then ends their watches one after the other: where
    another process drops the last reference, two groups of one kernel have the next events before
    it, or after (test_kernel.py).
    """
    result: Stream = []
    died: dict[str, int] = {}  # by watch, where its last event lies, if that is its death
    for event in stream:
        death = died.pop(event.watch, None)
        if event.mask & IN_IGNORED and death is not None:
            result.insert(death + 1, event)
            died = {watch: at + (at > death) for watch, at in died.items()}
            continue
        if event.mask & IN_DELETE_SELF:
            died[event.watch] = len(result)
        result.append(event)
    return result


def number_cookies(stream: Iterable[Event]) -> Stream:
    """Replace cookies by 1, 2, ... in order of appearance: the pairing stays, the values go."""
    numbers: dict[int, int] = {0: 0}
    return [
        event._replace(cookie=numbers.setdefault(event.cookie, len(numbers))) for event in stream
    ]


def normalise(stream: Iterable[Event]) -> Stream:
    # Collapse before numbering: the cookie of a merged event must not use up a number.
    return number_cookies(collapse(join_deaths(stream)))


def split_deaths(stream: Iterable[Event]) -> tuple[Stream, dict[str, Stream]]:
    """Take IN_DELETE_SELF and IN_IGNORED out of the common order, but keep each watch's own order.

    They come when the last reference to an inode is dropped, which is not always the moment of the
    operation: a file may be held open, by the server too.
    """
    rest: Stream = []
    own: dict[str, Stream] = {}
    for event in stream:
        own.setdefault(event.watch, []).append(event)
        if not event.mask & DEATH:
            rest.append(event)
    return rest, own


class Difference(NamedTuple):
    """The first place where two normalised streams part."""

    native: Stream
    mount: Stream
    at: int

    @property
    def marker(self) -> bytes:
        """The last marker that both have seen before it; b"" if there was none."""
        for event in reversed(self.native[: self.at]):
            if event.watch == CONTROL:
                return event.name
        return b""

    def __str__(self) -> str:
        missing, extra = tally(self.native, self.mount)
        start = max(0, self.at - 12)
        lines = difflib.unified_diff(
            [str(event) for event in self.native[start : self.at + 24]],
            [str(event) for event in self.mount[start : self.at + 24]],
            "native",
            "mount",
            n=12,
            lineterm="",
        )
        return "\n".join(
            [
                f"event {self.at} of {len(self.native)} (native) / {len(self.mount)} (mount)",
                f"in all, by kind: missing {missing or 'none'}, extra {extra or 'none'}",
                *lines,
            ]
        )


def tally(native: Stream, mount: Stream) -> tuple[dict[str, int], dict[str, int]]:
    """Count by kind what one stream has more often than the other."""
    left = Counter(event[:3] for event in native)
    right = Counter(event[:3] for event in mount)

    def by_kind(counts: Counter[tuple[str, int, bytes]]) -> dict[str, int]:
        kinds: Counter[str] = Counter()
        for (_, mask, _), count in counts.items():
            kinds[describe(mask)] += count
        return dict(kinds)

    return by_kind(left - right), by_kind(right - left)


def first_difference(native: Sequence[Event], mount: Sequence[Event]) -> Difference | None:
    """Compare two streams after normalising them; a lost event is never equal to anything."""
    left, right = normalise(native), normalise(mount)
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other or one.mask & IN_Q_OVERFLOW:
            return Difference(left, right, index)
    if len(left) != len(right):
        return Difference(left, right, min(len(left), len(right)))
    return None


def first_difference_but_deaths(
    native: Sequence[Event], mount: Sequence[Event]
) -> Difference | None:
    """Compare the common order without the deaths, then each watch's own order."""
    left, left_own = split_deaths(native)
    right, right_own = split_deaths(mount)
    if difference := first_difference(left, right):
        return difference
    for watch in sorted(left_own.keys() | right_own.keys()):
        if difference := first_difference(left_own.get(watch, []), right_own.get(watch, [])):
            return difference
    return None


Comparison = Callable[[Sequence[Event], Sequence[Event]], Difference | None]
