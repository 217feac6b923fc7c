"""The marks that each process of the guest holds, as last read.

Apart from the scanner, which decides when to read. A process that cannot be read keeps the marks
that it had. It loses them only if they are missing in a complete reading, or if it has exited.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from typing import NamedTuple

from protocol.handles import NodeKey
from protocol.masks import Mask

from ..errors import PASSING
from ..marks import Device, Mark, marks_in, notify_texts, started

KEPT = 1 << 20
"""Marks kept separately by instance, about 200 MiB. Further ones are kept together until the next
full scan."""
HEAVY = 0.005
"""Processor seconds of reading a process beyond which it is ``heavy``: a few thousand marks."""
ELSEWHERE = 4096
"""Texts without a mark on the mount that need not be parsed again: 0.5 MB."""
_CLOSE = Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE


class _Marks(NamedTuple):
    """The marks of an instance; processes that share one, or have equal ones, share this object."""

    digest: bytes  # of the text that lists them
    masks: dict[NodeKey, int]
    is_fanotify: bool


class _Process(NamedTuple):
    """A process with marks."""

    started: int  # 0: unknown
    marks: dict[int, _Marks]  # by descriptor


class Watchers:
    """The processes with marks on one mount."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._processes: dict[int, _Process] = {}
        self._known: dict[bytes, _Marks] = {}  # by digest
        self._crowd: dict[NodeKey, int] = {}  # of instances beyond KEPT
        self._size = 0  # marks in _known
        self._elsewhere: set[bytes] = set()  # digests of texts that list none on this mount
        self.knows_fanotify = False
        """Whether some mark is fanotify's."""
        self.is_changed = False
        """Whether the last reading differed from the one before."""
        self.changed: set[int] = set()
        """Processes whose marks it found changed."""
        self.gone: set[int] = set()
        """Processes that had exited."""
        self.heavy: dict[int, float] = {}
        """Processes that took long to read, and how many seconds."""

    @property
    def pids(self) -> list[int]:
        """The processes that hold marks."""
        return list(self._processes)

    def wanted(self) -> dict[NodeKey, int]:
        """The events that all of them need replayed, by node."""
        wanted = dict(self._crowd)
        for marks in self._known.values():
            for node, mask in marks.masks.items():
                wanted[node] = wanted.get(node, 0) | mask
        return wanted

    def look(self, pids: Iterable[int], *, full: bool = False, more: bool = False) -> bool:
        """Read the marks of these processes; ``full``: there are no others; ``more``: as a part of
        the last reading. Returns False if something could not be read that a later attempt may
        read.
        """
        before, crowd = self._processes, self._crowd
        if full:
            self._processes, self._crowd = {}, {}
        own = os.getpid()
        complete = True
        if not more:
            self.is_changed = full
            self.changed, self.gone, self.heavy = set(), set(), {}
        for pid in dict.fromkeys(pids):
            if pid == own:
                continue
            began = time.thread_time()  # not what others have done meanwhile
            now, is_complete = self._read(pid, before.get(pid))
            if (took := time.thread_time() - began) > HEAVY:
                self.heavy[pid] = took
            complete &= is_complete
            if now != before.get(pid):
                self.is_changed = True
                self.changed.add(pid)
            if now is not None:
                self._processes[pid] = now
            else:
                self._processes.pop(pid, None)
        if not complete and full:
            for node, mask in crowd.items():
                self._crowd[node] = self._crowd.get(node, 0) | mask
        if not self.is_changed:
            return complete
        held = (marks for process in self._processes.values() for marks in process.marks.values())
        self._known = {marks.digest: marks for marks in held}
        self._size = sum(len(marks.masks) for marks in self._known.values())
        self.knows_fanotify = any(marks.is_fanotify for marks in self._known.values())
        return complete

    def _read(self, pid: int, before: _Process | None) -> tuple[_Process | None, bool]:
        """A process as it is now, None if it has no marks; and whether everything could be read."""
        had = before.marks if before is not None else {}
        marks: dict[int, _Marks] = {}
        kept: dict[int, _Marks] = {}
        errors: list[OSError] = []
        try:
            for fd, text in notify_texts(pid):
                if isinstance(text, OSError):
                    errors.append(text)
                    if fd in had:
                        kept[fd] = had[fd]
                else:
                    found = self._marks(text)
                    if found.masks or found.is_fanotify:
                        marks[fd] = found
        except ProcessLookupError:
            self.gone.add(pid)
            return None, True
        except OSError as error:
            errors.append(error)
            kept = had
        begun = 0
        if marks or kept:
            try:
                begun = started(pid)
                if not begun:
                    return None, True
            except OSError as error:
                errors.append(error)
                begun = before.started if before is not None else 0
            if before is not None and before.started and begun != before.started:
                kept = {}  # of another process that had this number
        complete = not any(error.errno in PASSING for error in errors)
        marks.update(kept)
        return (_Process(begun, marks) if marks else None), complete

    def _marks(self, text: str) -> _Marks:
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
        known = self._known.get(digest)
        if known is not None:
            return known
        if digest in self._elsewhere:
            return _Marks(digest, {}, is_fanotify=False)
        masks: dict[NodeKey, int] = {}
        is_fanotify = False
        for mark in marks_in(text, self._device):
            masks[mark.node] = masks.get(mark.node, 0) | _needed(mark)
            is_fanotify |= mark.wd < 0
        if self._size + len(masks) > KEPT:
            self.is_changed = True
            for node, mask in masks.items():
                self._crowd[node] = self._crowd.get(node, 0) | mask
            return _Marks(digest, {}, is_fanotify)
        known = _Marks(digest, masks, is_fanotify)
        if masks:
            self._known[digest] = known
            self._size += len(masks)
        elif not is_fanotify:
            if len(self._elsewhere) >= ELSEWHERE:
                self._elsewhere.clear()
            self._elsewhere.add(digest)
        return known


def _needed(mark: Mark) -> int:
    """The events that a mark needs replayed. fanotify reports data only through an open file."""
    if mark.wd < 0 and mark.mask & (Mask.ACCESS | Mask.MODIFY):
        return mark.mask | int(Mask.OPEN | _CLOSE)
    return mark.mask
