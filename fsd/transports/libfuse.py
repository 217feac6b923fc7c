"""The libfuse transport: pyfuse3 mounts, and calls libfuse_operations.py.

Apart from the operations, because libfuse has one mount per process, in its own variables. Imported
only if this transport is used.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3
import trio

from ..fuse.operations import Operations
from ..linux import syscalls
from .libfuse_operations import LibfuseOperations
from .mounting import MountError, Place
from .polling import SpinBeforeSleep


class LibfuseTransport:
    """One mount: the only one of its process."""

    name = "libfuse"

    def __init__(self, operations: Operations, place: Place) -> None:
        self._operations = operations
        adapter = LibfuseOperations(operations, is_judged=place.is_judged)
        # libfuse calls fusermount3 for an ordinary user, which does not take this.
        mountpoint = place.mountpoint if os.geteuid() else syscalls.fd_path(place.fd)
        with tempfile.TemporaryFile() as said:
            try:
                with _stderr_in(said.fileno()):
                    pyfuse3.init(adapter, mountpoint, _options(place))
            except RuntimeError as error:
                said.seek(0)
                reason = os.fsdecode(said.read()).strip().rpartition("\n")[2] or str(error)
                raise MountError(reason) from None
        operations.export.watcher.report_changes(adapter.invalidate)
        operations.guest.history.serve(adapter.invalidate)

    async def run(self) -> None:
        """Serve until the mount is gone, or ``stop``."""
        ledger = self._operations.guest.ledger
        instrument = SpinBeforeSleep(lambda: ledger.is_at_work)
        trio.lowlevel.add_instrument(instrument)
        try:
            await pyfuse3.main()
        finally:
            trio.lowlevel.remove_instrument(instrument)

    def stop(self) -> None:
        """Make ``run`` return."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Unmount, unless that has happened, and end the connection."""
        pyfuse3.close()


def _options(place: Place) -> set[str]:
    shown = re.sub(r"[^ -~]|[,\\]", "_", place.source)  # pyfuse3 takes ASCII alone
    options = {f"fsname={shown}", "subtype=fsd"}
    if place.is_judged:
        options.add("default_permissions")
    if place.for_all:
        options.add("allow_other")
    return options


@contextmanager
def _stderr_in(fd: int) -> Iterator[None]:
    """libfuse and fusermount3 report why they fail on stderr only; within the block that goes to
    ``fd``.
    """
    own = os.dup(2)
    try:
        os.dup2(fd, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
