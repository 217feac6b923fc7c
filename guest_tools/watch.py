"""`fsd-guest watch`: events as the server sends them, also from the next server."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from protocol import frames
from protocol.masks import Mask

from .channel import ChannelError, Client

_RETRY = 0.1
_ARRIVED = int(Mask.CREATE | Mask.MOVED_TO)


class Watch:
    """Marks on paths, and their events. ``connect`` opens the channel, now and for another server.
    ``inner`` converts a path to one relative to the share's root.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        inner: Callable[[str], bytes],
        mask: int,
        *,
        recursive: bool,
    ) -> None:
        self._connect = connect
        self._inner = inner
        self._mask = mask | (_ARRIVED if recursive else 0)
        self._recursive = recursive
        self._patience = 0.0
        self._client = connect()
        self._paths: dict[int, tuple[int, str]] = {}  # by nodeid: generation, path

    def keep(self, patience: float) -> None:
        """Continue with another server if this one exits and the next one comes within ``patience``
        seconds. To be called before any path is added.
        """
        self._patience = patience
        self._client.keep()

    def close(self) -> None:
        """End the session; the server drops the marks."""
        self._client.close()

    def add(self, path: str) -> None:
        """Set a mark; if recursive, also on the directories below. Raises OSError."""
        node = self._client.resolve(self._inner(path))
        self._client.update(node.nodeid, node.generation, self._mask)
        self._paths[node.nodeid] = (node.generation, path)
        if self._recursive and stat.S_ISDIR(node.mode):
            for name in self._client.directories(node):
                self.add(os.path.join(path, os.fsdecode(name)))

    def events(self) -> Iterator[tuple[str, frames.Event]]:
        """Events as they arrive, with the watched path. Raises ChannelError if the server exits and
        no other comes.
        """
        while True:
            try:
                for event in self._client.events():
                    _, where = self._paths.get(event.nodeid, (0, "?"))
                    yield where, event
                    if self._recursive and event.mask & _ARRIVED and event.mask & int(Mask.ISDIR):
                        with suppress(OSError):  # gone already
                            self.add(os.path.join(where, os.fsdecode(event.name)))
            except (ChannelError, ConnectionError) as error:
                if self._client.token is None:
                    raise
                self._return(error)

    def _return(self, error: Exception) -> None:
        """Reconnect to the next server."""
        old = self._client
        old.close()
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._client = self._connect()
                known = self._client.reconnect_as(old)
                break
            except (ChannelError, ConnectionError):
                self._client.close()
                if time.monotonic() > deadline:
                    raise ChannelError(str(error)) from None
                time.sleep(_RETRY)
        for nodeid, (generation, path) in list(self._paths.items()):
            try:
                self._client.update(nodeid, generation, self._mask)
            except OSError:  # another node there, or gone
                del self._paths[nodeid]
                with suppress(OSError):
                    self.add(path)
        if not known:
            print(
                "fsd-guest: the server was replaced by one that does not know this watch; "
                "changes in between are not reported",
                file=sys.stderr,
                flush=True,
            )
