"""Files that have lost their name, and may be open: their later events still carry it.

Apart from the resolver, because it needs to be known which files are open: inotify does not say
whether a CLOSE is of the file that has the name now, or of one that had it before.
"""

from __future__ import annotations

from protocol.masks import Mask

from ..files.inode import Inode

UNLINKED_LIMIT = 1024
"""Names that files had while they were open."""
LOST_LIMIT = 16
"""Files that have lost the same name."""
OPEN_LIMIT = 4096
"""Files that count as open: later ones replace the oldest, whose CLOSEs may be lost."""
_OPEN, _CLOSE = int(Mask.OPEN), int(Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE)


class LostNames:
    """Of one export. All by events with a name, in the queue's order."""

    def __init__(self) -> None:
        self._files: dict[tuple[Inode, bytes], list[Inode]] = {}  # both oldest first
        self._opens: dict[Inode, int] = {}  # how many OPENs wait for their CLOSE, oldest first

    def lose(self, node: Inode, name: bytes, file: Inode) -> None:
        """A file was removed or replaced."""
        if file.is_dir:
            return
        place = node, name
        files = [f for f in self._files.pop(place, ()) if f is not file and f in self._opens]
        self._files[place] = [*files[1 - LOST_LIMIT :], file]
        if len(self._files) > UNLINKED_LIMIT:
            del self._files[next(iter(self._files))]

    def file(self, node: Inode, name: bytes) -> Inode | None:
        """The file that had the name last, of those that are open if there are any."""
        files = self._files.get((node, name))
        if not files:
            return None
        return next((file for file in reversed(files) if file in self._opens), files[-1])

    def is_open(self, file: Inode) -> bool:
        """Whether a CLOSE of the file is to come, as far as is known."""
        return file in self._opens

    def count(self, file: Inode, kind: int) -> None:
        """An event of a file. The kernel may merge OPENs: then the file counts as closed early."""
        if file.is_dir or not kind & (_OPEN | _CLOSE):
            return
        opens = self._opens.pop(file, 0) + (1 if kind & _OPEN else -1)
        if opens > 0:
            self._opens[file] = opens
            if len(self._opens) > OPEN_LIMIT:
                del self._opens[next(iter(self._opens))]
