"""Measures checkpoints: a server's state with many marks is saved, and restored by another
server.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fsd.checkpoint.file import StateFile
from fsd.checkpoint.saver import Saver, open_export
from fsd.export.ending import settle
from fsd.export.export import Export
from fsd.guests.guest import Observer
from protocol.masks import Mask

from .report import Report, number

MARKS = 100_000
_A_DIRECTORY = 100
_MASK = int(Mask.MODIFY | Mask.ATTRIB | Mask.DELETE_SELF)


def marked(top: Path, count: int) -> tuple[Export, Observer]:
    """An export of ``count`` files, each with a mark of a guest that will reconnect."""
    export = Export(str(top))
    guest = export.add_observer("guest")
    guest.keep(bytes(16))
    fs = export.fs
    for number_ in range(-(-count // _A_DIRECTORY)):
        directory = top / f"directory-{number_}"
        directory.mkdir()
        for index in range(min(_A_DIRECTORY, count - number_ * _A_DIRECTORY)):
            os.close(os.open(directory / f"some-name-{index}", os.O_CREAT | os.O_WRONLY))
        node = fs.lookup(export.table.root, os.fsencode(directory.name)).inode
        for name in os.listdir(directory):
            inode = fs.lookup(node, os.fsencode(name)).inode
            export.update(guest, inode.key, _MASK)
    export.process(export.watcher.backlog)
    return export, guest


def saved_and_restored(
    count: int, clock: Callable[[], float] = time.monotonic
) -> tuple[float, float, int]:
    """Seconds to save, seconds to restore, bytes of the image."""
    with tempfile.TemporaryDirectory(prefix="fsd-bench-") as folder:
        top = Path(folder, "source")
        top.mkdir()
        state = StateFile(Path(folder, "image"))
        export, guest = marked(top, count)
        assert export.interest.count(guest) == count
        settle(export, 10)
        begun = clock()
        Saver(export, state).take()()
        saved = clock() - begun
        export.close()
        begun = clock()
        export = open_export(lambda: Export(str(top)), state, print)
        restored = clock() - begun
        (guest,) = export.waiting.values()
        assert export.interest.count(guest) == count
        assert not export.watches.unwatched, next(iter(export.watches.unwatched.values()))
        assert not guest.undelivered()
        export.close()
        return saved, restored, state.path.stat().st_size


def measure() -> Report:
    """Run it: some 30 s."""
    report = Report("checkpoint")
    rows = []
    for count in (MARKS // 100, MARKS // 10, MARKS):
        saved, restored, size = saved_and_restored(count)
        figures = [number(saved), number(restored), number(size / count)]
        rows.append([f"{count:,}", *figures])
        report.add(f"{count} marks, saved", saved, "s")
        report.add(f"{count} marks, restored", restored, "s")
        report.add(f"{count} marks, image", size / count, "bytes a mark")
    heads = ["marks", "s to save", "s to restore", "bytes a mark"]
    report.table("a server's state", heads, rows)
    report.notes.append("saved: read off the server, encoded, on disk (fsync)")
    report.notes.append("restored: every object verified, watched again, every directory compared")
    return report
