"""The hidden directory `.fsd`: the agent's channel inside the mount.

Never listed; found only by an explicit look-up by root, or by the user whose local mount it is.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol import frames

from ..export.channel import Channel
from ..export.export import Export
from ..export.stats import snapshot
from ..files.attributes import Attr, StatLike
from ..files.caller import Caller
from ..files.inode import Identity, Inode
from ..files.passthrough import Entry
from ..guests.mount import MountGuest

CHANNELS_LIMIT = 64
"""Sessions of one mount, in addition to its agent's: each may hold about 2 MiB of frames and
answers."""
_NAMES = {
    b"control": (frames.CONTROL, stat.S_IFREG | 0o600),
    b"session": (frames.SESSION, stat.S_IFREG | 0o600),
    b"status": (frames.STATUS, stat.S_IFREG | 0o400),
    b"checkpoint": (frames.CHECKPOINT, stat.S_IFREG | 0o400),
    b"staging": (frames.STAGING, stat.S_IFDIR | 0o700),
    b"alias": (frames.ALIAS, stat.S_IFDIR | 0o700),
}
Checkpoint = Callable[[], dict[str, Any]]
"""Saves the state of an export; returns where, and how much. Raises OSError."""


@dataclass(slots=True, eq=False)
class HiddenHandle:
    """An open hidden file: a channel, or a text made when it was opened."""

    nodeid: int
    channel: Channel | None = None
    text: bytes = b""


class HiddenFiles:
    """The hidden directory of one mount. Opening `.fsd/checkpoint` calls ``checkpoint``."""

    def __init__(
        self, export: Export, guest: MountGuest, checkpoint: Checkpoint | None = None
    ) -> None:
        self._export = export
        self._guest = guest
        self._checkpoint = checkpoint
        self._modes = {frames.FSD_DIR: stat.S_IFDIR | 0o700, **dict(_NAMES.values())}
        self._inodes = {
            nodeid: Inode(nodeid, 1, Identity(-2, nodeid, b"", 0), stat.S_IFMT(mode))
            for nodeid, mode in self._modes.items()
        }
        self._born = time.time_ns()
        self.root = self._inodes[frames.FSD_DIR]
        self.control: HiddenHandle | None = None
        self._channels = 0

    def check(self, who: Caller) -> None:
        """Raises OSError ENOENT for other users, who cannot even see it. A uid of another machine
        says nothing about the server's own user.
        """
        if who.uid and not (self._guest.is_local and who.uid == os.geteuid()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def lookup(self, nodeid: int, name: bytes) -> Entry:
        """LOOKUP of `.fsd` in the root, or of a name in it."""
        if name == frames.FSD_NAME and nodeid < frames.FSD_DIR:
            return Entry(*self.getattr(frames.FSD_DIR))
        if nodeid == frames.FSD_DIR and name in _NAMES:
            return Entry(*self.getattr(_NAMES[name][0]))
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def getattr(self, nodeid: int) -> tuple[Inode, StatLike]:
        """GETATTR."""
        if nodeid not in self._modes:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        uid, gid = (os.geteuid(), os.getegid()) if self._guest.is_local else (0, 0)
        born = self._born
        mode = self._modes[nodeid]
        attr = Attr(mode, nodeid, 0, 1, uid, gid, 0, 0, 4096, 0, born, born, born)
        return self._inodes[nodeid], attr

    def open(self, nodeid: int, who: Caller, flags: int) -> HiddenHandle:
        """OPEN, OPENDIR. A second agent gets EBUSY.

        Only O_RDWR opens a channel. Opened for reading it is an empty file: the kernel does that
        for a fanotify group that watches the whole file system.
        """
        handle = HiddenHandle(nodeid)
        access = flags & os.O_ACCMODE
        if access == os.O_WRONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if nodeid == frames.STATUS:
            handle.text = json.dumps(snapshot(self._export, self._guest)).encode()
        elif nodeid == frames.CHECKPOINT:
            if self._checkpoint is None:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            handle.text = json.dumps(self._checkpoint()).encode()
        elif access != os.O_RDWR:
            return handle
        elif nodeid == frames.CONTROL:
            if not who.pid:  # the safety rule needs to know the replayer by its pid
                raise PermissionError(errno.EPERM, "the agent is in another pid namespace")
            if self.control is not None:
                # A killed agent stays in its read until the read is answered; then it closes the
                # channel, and the new agent's next attempt succeeds.
                if self.control.channel is not None:
                    self.control.channel.dismiss_readers()
                raise OSError(errno.EBUSY, "an agent is connected")
            handle.channel = Channel(self._export, "agent", who.pid, self._guest, self._guest)
            self.control = handle
        elif nodeid == frames.SESSION:
            if self._channels >= CHANNELS_LIMIT:
                raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
            self._channels += 1
            name = f"channel of process {who.pid}"
            handle.channel = Channel(self._export, name, who.pid, via=self._guest)
        return handle

    def dismiss(self) -> None:
        """Answer the agent's waiting read, permanently."""
        if self.control is not None and self.control.channel is not None:
            self.control.channel.said_bye = True
            self.control.channel.wake()

    def release(self, handle: HiddenHandle) -> None:
        """RELEASE."""
        channel, handle.channel = handle.channel, None
        if channel is not None:
            self._channels -= handle.nodeid == frames.SESSION
            channel.close()
        if handle is self.control:
            self.control = None
