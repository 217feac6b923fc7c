"""The algebra of inotify masks: kernel values, names, and the bits that a request may have.

Apart because server, guest tools and tests all use these masks. Values:
include/uapi/linux/inotify.h (equal to FS_* of include/linux/fsnotify_backend.h).
"""

from __future__ import annotations

import errno
from enum import IntFlag


class Mask(IntFlag):
    """An inotify mask, bits as in the kernel."""

    ACCESS = 0x1
    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    CLOSE_NOWRITE = 0x10
    OPEN = 0x20
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    UNMOUNT = 0x2000
    Q_OVERFLOW = 0x4000
    IGNORED = 0x8000
    EXCL_UNLINK = 0x0400_0000
    EVENT_ON_CHILD = 0x0800_0000
    ISDIR = 0x4000_0000
    ONESHOT = 0x8000_0000


EVENTS = Mask(0xFFF)
"""Every event that a guest may ask for (IN_ALL_EVENTS)."""

CLOSE = Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
MOVE = Mask.MOVED_FROM | Mask.MOVED_TO
SELF = Mask.DELETE_SELF | Mask.MOVE_SELF
STRUCTURE = Mask.CREATE | Mask.DELETE | MOVE
"""Events that change the names of a directory."""

_STRIPPED = (
    Mask.IGNORED
    | Mask.UNMOUNT
    | Mask.Q_OVERFLOW
    | Mask.ONESHOT
    | Mask.EXCL_UNLINK
    | Mask.EVENT_ON_CHILD
    | Mask.ISDIR
)
_NAMES = {mask.name.lower(): mask for mask in Mask if mask.name}
_GROUPS = {"close": CLOSE, "move": MOVE, "all": EVENTS, "all_events": EVENTS}


class MaskError(ValueError):
    """A mask without an event, or with an unknown bit. ``errno`` is EINVAL."""

    errno = errno.EINVAL


def requested(bits: int) -> Mask:
    """Remove the bits that the kernel handles from a requested mask; 0 means no events any more.

    Raises MaskError if bits were given and no event is left, or if unknown bits are set.
    """
    if bits == 0:
        return Mask(0)
    rest = bits & ~int(_STRIPPED)
    if rest & ~int(EVENTS):
        raise MaskError(f"unknown bits in mask {bits:#x}")
    if not rest:
        raise MaskError(f"no event in mask {bits:#x}")
    return Mask(rest)


def parse(text: str) -> Mask:
    """The mask of a list of words: ``create,delete``, ``IN_MODIFY|IN_ISDIR``.

    Raises MaskError with the unknown word.
    """
    mask = Mask(0)
    for word in text.replace("|", ",").split(","):
        key = word.strip().lower().removeprefix("in_")
        try:
            mask |= _GROUPS[key] if key in _GROUPS else _NAMES[key]
        except KeyError:
            raise MaskError(
                f"unknown event {word.strip()!r} (known: {', '.join(_NAMES)})"
            ) from None
    return mask


def names(mask: int) -> list[str]:
    """Names of the set bits, lower case, in kernel order; an unknown bit as hex."""
    known = [name for name, bit in _NAMES.items() if mask & bit]
    rest = mask & ~sum(_NAMES.values())
    return [*known, hex(rest)] if rest else known


def describe(mask: int) -> str:
    """The kernel's form for logs: ``IN_CREATE|IN_ISDIR``."""
    return "|".join(f"IN_{name.upper()}" for name in names(mask)) or "0"
