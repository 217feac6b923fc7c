"""Opens an export from the previous server's image, and saves it for the next server.

Apart from the core because it reads and writes files; does not use trio.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog

from protocol.images import ImageError

from ..export.ending import settle
from ..export.export import Export
from ..guests.guest import Guest, HandMarks, Observer
from . import image
from .restore import Resumption
from .rows import SavedExport
from .take import take

log = structlog.get_logger()


class State(Protocol):
    """Where an image is stored: file.StateFile, or memory."""

    @property
    def path(self) -> Path:
        """For people."""

    def read(self) -> bytes | None:
        """The image, if there is one. Raises OSError, ImageError."""

    def write(self, data: bytes) -> None:
        """Replace it. Raises OSError."""


SETTLE_TIMEOUT = 0.5
"""Seconds that a stop waits for a moment without changes."""


def open_export(
    make: Callable[[], Export],
    state: State,
    complain: Callable[[str], None],
    *,
    restore: bool | None = None,
    prepare: Callable[[Resumption], None] = lambda _: None,
) -> Export:
    """An export restored from the image, or a new one. An unusable image is refused with one line
    to ``complain``, and so is a missing one if ``restore`` is True; with False no image is read.
    ``prepare`` gets the restored state, so that mounts can take over their part. Raises OSError if
    the export cannot be opened.
    """
    saved = None
    if restore is not False:
        saved = _read(state, complain, expected=bool(restore))
    export = make()
    if saved is None:
        return export
    try:
        with _without_collection():
            resumption = Resumption(export, saved)
            prepare(resumption)
            resumption.finish()
    except Exception as error:
        if not isinstance(error, (ImageError, OSError)):
            log.exception("restoring failed", image=str(state.path))
        export.close()
        complain(_refused(state, error))
        return make()
    return export


@contextmanager
def _without_collection() -> Iterator[None]:
    """Many objects are made here and none is freed: looking for garbage would take longer than
    making them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(state: State, complain: Callable[[str], None], *, expected: bool) -> SavedExport | None:
    try:
        data = state.read()
        if data is None and expected:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with _without_collection():
            return None if data is None else image.decode(data)
    except (ImageError, OSError) as error:
        complain(_refused(state, error))
        return None


def _refused(state: State, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else error
    return f"image {state.path} cannot be restored: {reason}; starting without it"


@dataclass
class Saver:
    """Saves one export. ``mounts`` returns what continuing mounts hold (``take``)."""

    export: Export
    state: State
    mounts: Callable[[], Mapping[Guest, dict[int, int]]] = dict
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _taken: int = 0
    _written: int = 0

    @property
    def is_needed(self) -> bool:
        """Whether any guest could reconnect after the server was killed."""
        return bool(self.mounts()) or any(
            isinstance(guest, HandMarks) or (isinstance(guest, Observer) and guest.token)
            for guest in self.export.guests
        )

    def take(self) -> Callable[[], int]:
        """The current state, and a function that writes it, also in another thread."""
        with _without_collection():
            saved = take(self.export, self.mounts())
        self.export.is_changed = False
        self._taken = number = self._taken + 1

        def write() -> int:
            with _without_collection():
                data = image.encode(saved)
            with self._writing:
                if number > self._written:  # else a later state is already written
                    self.state.write(data)
                    self._written = number
            return len(data)

        return write

    def save(self) -> dict[str, Any]:
        """Save now, if possible at a moment without changes; returns what was saved. Raises
        OSError.
        """
        begun = time.monotonic()
        settle(self.export, SETTLE_TIMEOUT)
        size = self.take()()
        return {
            "path": str(self.state.path),
            "bytes": size,
            "inodes": len(self.export.table),
            "watches": len(self.export.watcher),
            "guests": len(self.export.guests),
            "seconds": round(time.monotonic() - begun, 3),
        }
