"""Which party makes a request, a user of the mount or its replayer, and what follows from that.

The replayer changes nothing on the host. A user's change there causes events that are own echo, is
charged to that user's disk limits, and is refused in a read-only share.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import structlog

from protocol.masks import Mask

from ..cache.coherent import CoherentCache
from ..events.attribution import Expected
from ..export.export import Export
from ..files.caller import Caller
from ..files.inode import Inode
from ..files.passthrough import Entry
from ..guests.ledger import UnexpectedCall
from ..guests.mount import MountGuest
from ..linux import credentials
from ..pacing import windows

log = structlog.get_logger()
_T = TypeVar("_T")
_EVENTS = 256
"""Events of the host that are searched for a file that has moved."""
Events = tuple[Expected, ...]
_CHANGES = int(Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE_WRITE)
_OPEN_TRUNC = Mask.OPEN | Mask.MODIFY


class Access:
    """The access of one mount: ``guest``."""

    def __init__(self, export: Export, guest: MountGuest) -> None:
        self.export = export
        self.guest = guest
        self.cache: CoherentCache | None = None
        """Set by a session whose kernel keeps things."""

    def is_replayer(self, who: Caller) -> bool:
        """Whether the request comes from the mount's agent."""
        return who.pid == self.guest.pid and who.pid != 0

    def refuse_replayer(self, who: Caller, what: str) -> None:
        """The safety rule: no request of the replayer changes the backing store."""
        if self.is_replayer(who):
            raise self.refused(UnexpectedCall(what))

    def refused(self, error: UnexpectedCall) -> UnexpectedCall:
        """Counts an error of the replayer, and returns it."""
        self.guest.counts["refused"] += 1
        log.debug("replayer refused", reason=error.strerror)
        return error

    def check_writable(self) -> None:
        """Raises OSError EROFS for users of a read-only share. Not for the replayer, whose requests
        change nothing.
        """
        if self.export.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def own(self, *expected: Expected) -> AbstractContextManager[None]:
        """Run a call on the host for the guest: its events there are own echo."""
        attributed = self.export.watcher.attributed(self.guest, *expected)
        if self.cache is None or not self.cache.sees(expected):
            return attributed
        return _both(attributed, self.cache.own(expected))

    def about(self, inode: Inode, mask: Mask) -> tuple[Expected, ...]:
        """An event of an object: by name in its directory, and as a self event."""
        if self.cache is not None and mask & _CHANGES:
            self.cache.touched(inode)
        # Most files are not watched: for them this costs little.
        if not self.export.watcher.is_watched_directly_or_by_name(inode):
            return ()
        return (inode.parent, inode.name, mask), (inode, b"", mask)

    def looked_up(self, who: Caller, inode: Inode, entry: Entry | None = None) -> None:
        """A process of the guest may be about to watch this object."""
        if self.guest.pid and who.pid:
            directory = inode if inode.is_dir else inode.parent
            if directory is not None and not directory.is_placeholder:
                file = None if inode.is_dir else entry
                self.export.arming.looked_up(self.guest, directory, who.pid, file)

    def wherever(self, inode: Inode, do: Callable[[], _T]) -> _T:
        """Do something with an object; with a file that has moved, and has no handle that can be
        opened, again once the host's change is known. Raises OSError.
        """
        try:
            return do()
        except OSError as error:
            is_lost = error.errno in (errno.ESTALE, errno.ENOENT) and not inode.is_dir
            if not is_lost or self.export.table.reach.handle_opens(inode.identity):
                raise
        self.export.watcher.drain()
        self.export.route(_EVENTS)
        # For the other half of another file's move, perhaps. A machine's requests are not to cost
        # the others that time.
        if self.guest.is_local and self.export.is_waiting:
            time.sleep(windows.RENAME_WAIT)
            self.export.route(_EVENTS)
        return do()


@contextmanager
def _both(
    outer: AbstractContextManager[None], inner: AbstractContextManager[None]
) -> Iterator[None]:
    with outer, inner:
        yield


def opening(flags: int) -> Mask:
    """The events of an open."""
    return _OPEN_TRUNC if flags & os.O_TRUNC else Mask.OPEN


def writing(uid: int, *, kill: bool) -> AbstractContextManager[None]:
    """Charge disk blocks to a user: the host's limits for that user hold. ``kill`` suid and sgid
    bits, as a change of a file's data by a process without CAP_FSETID does.
    """
    return credentials.on_behalf_of(uid, kill_suid=kill) if uid or kill else nullcontext()
