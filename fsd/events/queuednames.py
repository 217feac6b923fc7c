"""Counts the names of events that were read from the host's queue and are not processed yet."""

from __future__ import annotations

from typing import TypeVar

from protocol.inotify import RawEvent
from protocol.masks import STRUCTURE, Mask

_K = TypeVar("_K")
_STRUCTURE = int(STRUCTURE)
_LEAVING = int(Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO)


class QueuedNames:
    """How many events each name of a watch has; only those that create, remove or move it."""

    def __init__(self) -> None:
        self._changing: dict[tuple[int, bytes], int] = {}
        self._leaving: dict[tuple[int, bytes], int] = {}
        self._own: dict[tuple[int, bytes, object], int] = {}  # that a guest has made

    def count(self, raw: RawEvent, maker: object, step: int) -> None:
        """An event has come (1) or was processed (-1). ``maker``: the guest, None for the host."""
        if not raw.mask & _STRUCTURE:
            return
        key = (raw.wd, raw.name)
        _add(self._changing, key, step)
        if raw.mask & _LEAVING:
            _add(self._leaving, key, step)
        if maker is not None:
            _add(self._own, (*key, maker), step)

    def clear(self) -> None:
        """No event waits."""
        self._changing.clear()
        self._leaving.clear()
        self._own.clear()

    def leaving(self, wd: int, name: bytes) -> int:
        """How many events remove or replace the name."""
        return self._leaving.get((wd, name), 0)

    def is_changing(self, wd: int, name: bytes, besides: object) -> bool:
        """Whether an event of another party than that guest creates, removes or moves the name."""
        key = (wd, name)
        changing = self._changing.get(key, 0)
        return bool(changing) and changing > self._own.get((*key, besides), 0)


def _add(counts: dict[_K, int], key: _K, step: int) -> None:
    left = counts.get(key, 0) + step
    if left:
        counts[key] = left
    else:
        del counts[key]
