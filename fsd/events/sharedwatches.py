"""Host watches that serve several inodes: one object, seen through several mounts.

The kernel has one watch for an object, wherever it is mounted (inotify_add_watch(2) returns the
same descriptor again). Here each inode gets a number of its own, and its own copy of each event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from protocol.inotify import RawEvent
from protocol.masks import Mask

_FIRST = 1 << 32
"""Numbers from here on are not the kernel's watch descriptors."""
_ALWAYS = int(Mask.IGNORED | Mask.UNMOUNT | Mask.Q_OVERFLOW)


class SharedWatches:
    """By the kernel's descriptor: the numbers of the inodes that share it."""

    def __init__(self) -> None:
        self._numbers: dict[int, list[int]] = {}
        self._real: dict[int, int] = {}
        self._next = _FIRST

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def __contains__(self, wd: int) -> bool:
        return wd in self._numbers

    @staticmethod
    def is_real(number: int) -> bool:
        """Whether a number is one of the kernel's watch descriptors."""
        return number < _FIRST

    def real(self, number: int) -> int:
        """The kernel's watch descriptor behind a number."""
        return self._real.get(number, number)

    def join(self, wd: int, *, is_taken: bool) -> int:
        """A number for one more inode; ``is_taken``: another has the descriptor itself."""
        numbers = self._numbers.setdefault(wd, [wd] if is_taken else [])
        number = wd
        if is_taken:
            number, self._next = self._next, self._next + 1
            self._real[number] = wd
        numbers.append(number)
        return number

    def leave(self, number: int) -> int:
        """An inode has returned its number. Returns the watch that is no longer needed, or -1."""
        wd = self._real.pop(number, number)
        numbers = self._numbers.get(wd)
        if numbers is None:
            return wd
        numbers.remove(number)
        if numbers:
            return -1
        del self._numbers[wd]
        return wd

    def copies(
        self, events: Iterable[RawEvent], wants: Callable[[int, int], bool]
    ) -> Iterator[RawEvent]:
        """Each event once for each number whose mask, by ``wants``, includes it."""
        for raw in events:
            numbers = self._numbers.get(raw.wd)
            if numbers is None:
                yield raw
                continue
            for number in list(numbers):
                if raw.mask & _ALWAYS or wants(number, raw.mask):
                    yield raw._replace(wd=number)
            if raw.mask & Mask.IGNORED:  # the kernel may give the descriptor to another object
                for number in self._numbers.pop(raw.wd):
                    self._real.pop(number, None)
