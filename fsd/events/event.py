"""Host events as the export routes them: resolved to inodes, a rename as one unit."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.masks import Mask

from ..files.inode import Inode
from ..files.listing import Known


class Origin:
    """The party that caused an event: the host, a guest, or the server itself."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<Origin {self.name}>"


HOST = Origin("host")
SERVER = Origin("server")
RENAME = int(Mask.MOVED_FROM | Mask.MOVED_TO)


@dataclass(slots=True, eq=False)
class Event:
    """One event, or both halves of a rename (mask has MOVED_FROM and MOVED_TO). Once it is routed,
    all guests share it, and it is not changed any more (``freeze``).

    For MOVED_TO alone ``node``/``name`` is the new place. An empty name is an event of the watched
    object itself.
    """

    node: Inode
    mask: int
    name: bytes
    cookie: int
    origin: Origin
    stamp: float
    child: Inode | None = None  # the object of the name, as of the event
    nlink: int = 1  # links of a removed child (or of the replaced one) just before the event
    before: Known | None = None  # the state known under the name before
    node2: Inode | None = None  # of a rename: the new directory
    name2: bytes = b""
    replaced: Inode | None = None  # the object that a MOVED_TO overwrote
    part_of: Event | None = None  # the event with the name that the same system call has made
    has_self: bool = False  # the child's own event goes with it: the name is proven
    unlinked: bool = False  # the child, a file, had lost this name already
    is_repeat: bool = False  # of one that could not be replayed
    exchanged: int = 0  # of a RENAME_EXCHANGE: cookie of the way back, that replaced goes

    @property
    def kind(self) -> int:
        """The event bits alone."""
        return self.mask & 0xFFF

    def freeze(self) -> None:
        """From now on setting an attribute raises AttributeError."""
        self.__class__ = FrozenEvent

    def repeated(self) -> Event:
        """The same event once more."""
        other = Event(*(getattr(self, name) for name in Event.__slots__))
        other.is_repeat = True
        return other

    def about(self, child: Inode, replaced: Inode | None) -> Event:
        """The same event about these objects; itself if it is about them already, else frozen."""
        if child is self.child and replaced is self.replaced:
            return self
        other = Event(*(getattr(self, name) for name in Event.__slots__))
        other.child, other.replaced = child, replaced
        other.freeze()
        return other


class FrozenEvent(Event):
    """An event after routing."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        if name != "__class__":
            raise AttributeError(f"{name} of an event that is routed")
        object.__setattr__(self, name, value)
