"""One object of the export: its nodeid, its identity on the host, and its last known place.

A value of the inode table (fsd.files.table), apart because every higher package uses inodes and few
need the table.
"""

from __future__ import annotations

import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

from protocol.handles import NodeKey

if TYPE_CHECKING:
    from .attributes import StatLike
    from .listing import Listing

ROOT_ID = 1
PATH_LEVELS = 256
"""Names of a path that are walked or shown. People's trees are less deep; if a guest makes deeper
ones, each use of a directory would cost its depth."""


class Identity(NamedTuple):
    """Identifies an object of the host."""

    device: int  # st_dev; below 0: the host object no longer exists
    ino: int
    handle: bytes  # b"" if the file system has none
    mount: int  # the mount's number

    def is_object_of(self, other: Identity) -> bool:
        """Whether both are one object, perhaps seen through two mounts."""
        return self[:3] == other[:3]


class Inode:
    """One object of the export, as long as a guest, an event or a handle needs it."""

    __slots__ = (
        "attr_given", "children", "fd", "generation", "identity", "kind", "listing", "lookups",
        "name", "nlink", "nodeid", "number", "open_fds", "parent", "pins", "warm_until",
    )  # fmt: skip

    def __init__(self, nodeid: int, generation: int, identity: Identity, kind: int) -> None:
        self.nodeid = nodeid
        self.number = nodeid  # the st_ino that guests see
        self.generation = generation
        self.identity = identity
        self.kind = kind  # S_IFMT bits
        self.lookups = 0  # references of the guest's kernel (FUSE lookup count)
        self.pins = 0  # references of the server: interest, orders, open handles
        self.parent: Inode | None = None
        self.name = b""
        self.children: dict[bytes, Inode] = {}  # of a directory: names that were looked up
        self.fd = -1  # O_PATH pin, only if handles cannot be opened
        self.nlink = 1  # as last seen
        # Of a directory, to a kernel for longer than a moment: until its watch reports a change
        self.attr_given: StatLike | None = None
        self.open_fds: list[int] = []  # of open file handles: reach it after its unlink
        self.listing: Listing | None = None  # of a watched directory
        self.warm_until = 0.0  # time.monotonic(): the kernel has just had a directory's dentries

    @property
    def key(self) -> NodeKey:
        """Identity on the wire."""
        return NodeKey(self.nodeid, self.generation)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.kind == stat.S_IFDIR

    @property
    def is_placeholder(self) -> bool:
        """Whether it stands for an object that was gone before the server could look."""
        return self.identity.device < 0

    def __repr__(self) -> str:
        return f"<Inode {self.nodeid}.{self.generation} {self.shown_path()!r}>"

    def path(self) -> bytes:
        """Path below the root as last known, however long."""
        return self._end_of_path(sys.maxsize)[0]

    def shown_path(self) -> bytes:
        """The same for display: of a deep one its end, after "..."."""
        path, is_whole = self._end_of_path()
        return path if is_whole else b".../" + path

    def short_path(self, levels: int = PATH_LEVELS) -> bytes | None:
        """Path below the root as last known; None if it is too deep to be walked each time."""
        path, is_whole = self._end_of_path(levels)
        return path if is_whole else None

    def _end_of_path(self, levels: int = PATH_LEVELS) -> tuple[bytes, bool]:
        """The last names of the path, and whether that is all of it."""
        parts: list[bytes] = []
        node: Inode | None = self
        while node is not None and node.name and len(parts) < levels:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts)), node is None or not node.name


def is_below(directory: Inode, top: Inode) -> bool:
    """Whether a directory is ``top``, or below it as far as is known."""
    node: Inode | None = directory
    while node is not None:
        if node is top:
            return True
        node = node.parent
    return False
