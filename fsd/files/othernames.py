"""Further names of files with several links. A file without a handle that can be opened is reached
by another name if it loses its last known one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inode import Inode

NAMES_LIMIT = 16
"""Of one file, the last ones seen: about 200 bytes each, and one look-up each if it is not
there."""


class OtherNames:
    """By file: directory and name, the one seen last at the end."""

    def __init__(self) -> None:
        self._names: dict[Inode, dict[tuple[Inode, bytes], None]] = {}

    def add(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """It has this name too, and is known by another from now on."""
        names = self._names.setdefault(inode, {})
        names.pop((parent, name), None)
        names[parent, name] = None
        if len(names) > NAMES_LIMIT:
            del names[next(iter(names))]

    def of(self, inode: Inode) -> Iterator[tuple[Inode, bytes]]:
        """The other names that it has as far as is known."""
        names = self._names.get(inode)
        for parent, name in reversed(names or ()):
            if parent.children.get(name) is inode and (parent, name) != (inode.parent, inode.name):
                yield parent, name

    def drop(self, inode: Inode) -> list[tuple[Inode, bytes]]:
        """It is not in use any more; returns the names that it had."""
        return list(self._names.pop(inode, ()))
