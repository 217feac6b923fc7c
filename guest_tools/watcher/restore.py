"""Makes the instances and sets of a state again.

Until ``place`` they have numbers that the state does not use, so that they do not collide with
descriptors that this process has open meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.inotify import parse_events
from protocol.masks import EVENTS, Mask

from ..errors import Failure
from . import notify
from .objects import Finder, Mounts
from .overflow import add_overflow
from .state import (
    Epoll,
    Fanotify,
    FanotifyMark,
    File,
    FileSystemMark,
    Inotify,
    ObjectMark,
    State,
    Watch,
)

REACH = 200_000
"""Watches that an instance may add and remove to reach its numbers, if the kernel cannot set them:
about a second."""
_BATCH = 256
"""Watched files that are open at a time: 1,024 descriptors is a usual limit."""
_DRAIN = 4096
"""Watches that are removed before their IN_IGNORED are read: fewer than the usual queue's
length."""
_ASKED = int(EVENTS | Mask.EXCL_UNLINK | Mask.ONESHOT)
"""The bits of a mask in fdinfo that inotify_add_watch(2) accepts; the kernel sets the others."""
_INT_MAX = (1 << 31) - 1


class Restorer:
    """The instances and sets made from a state."""

    def __init__(self, state: State, overflow: str = "auto") -> None:
        """``overflow``: whether an instance starts with IN_Q_OVERFLOW: "always", "never", or
        "auto": if some of its events or watches are lost. Raises Failure.
        """
        self._state = state
        self._overflow = overflow
        self._files: dict[int, int] = {}  # the state's number -> descriptor
        self._fds = {file.id: state.fds(file.id)[0] for file in state.files}
        self._reserved = {descriptor.fd for descriptor in state.descriptors}
        for file in state.files:
            if isinstance(file, Epoll):
                self._reserved |= {target.tfd for target in file.targets if target.id}
        self.problems: list[str] = []
        self.watches = 0
        self.entries = 0
        self._make_room()

    def _make_room(self) -> None:
        """Raise the limit so that the wanted descriptor numbers are possible."""
        wanted = max(self._reserved, default=0) + 1
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft >= wanted or soft == resource.RLIM_INFINITY:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            raise Failure(
                f"descriptor {wanted - 1} is beyond this process's limit of {hard}; "
                f"raise it (ulimit -Hn {wanted})"
            ) from None

    def restore(self) -> None:
        """Make everything. What cannot be restored is listed in ``problems``."""
        with Mounts() as mounts, Finder(mounts, self._state.filesystems) as finder:
            for file in self._state.files:
                try:
                    if isinstance(file, Inotify):
                        self._inotify(file, finder)
                    elif isinstance(file, Fanotify):
                        self._fanotify(file, finder)
                    else:
                        self._files[file.id] = self.park(notify.epoll_create(os.O_CLOEXEC))
                except OSError as error:
                    self._problem(file.id, f"cannot be made: {error.strerror}")
            for file in self._state.files:
                if file.id in self._files:
                    self._set_flags(file)
                    if isinstance(file, Epoll):
                        self._entries(file)

    def place(self) -> None:
        """Move everything to its numbers, for the program that is executed next."""
        for fd, _, file_id in self._state.descriptors:
            if file_id in self._files:
                os.dup2(self._files[file_id], fd, inheritable=True)
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def park(self, fd: int) -> int:
        """The same file under a number that the state does not use; ``fd`` is closed."""
        start = 3
        while True:
            parked = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, start)
            if parked not in self._reserved:
                os.close(fd)
                return parked
            os.close(parked)
            start = parked + 1

    def _problem(self, file_id: int, what: str) -> None:
        self.problems.append(f"descriptor {self._fds[file_id]}: {what}")

    def _set_flags(self, file: File) -> None:
        """Set flags and owner of a file."""
        fd, owner = self._files[file.id], file.owner
        flags = file.flags & (os.O_NONBLOCK | os.O_ASYNC)
        try:
            if owner.pid and (owner.pid != self._state.pid or owner.pid_type > 1):
                self._problem(file.id, f"its signals went to {owner.pid}, which is not restored")
                flags &= ~os.O_ASYNC
            elif owner.pid or owner.signum:
                notify.set_owner(fd, owner._replace(pid=os.getpid() if owner.pid else 0))
            if flags & os.O_ASYNC:  # which ends a program that does not handle it yet
                signal.signal(owner.signum or signal.SIGIO, signal.SIG_IGN)
            if flags:
                fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        except OSError as error:
            self._problem(file.id, f"its flags and owner cannot be set: {error.strerror}")

    # inotify

    def _inotify(self, file: Inotify, finder: Finder) -> None:
        instance = self.park(notify.inotify_init(os.O_CLOEXEC | os.O_NONBLOCK))
        self._files[file.id] = instance
        numbers = _Numbers(instance)
        watches = sorted(file.watches)  # so that new watches get higher numbers than all of them
        before = len(self.problems)
        for start in range(0, len(watches), _BATCH):
            batch = watches[start : start + _BATCH]
            for watch, found in zip(batch, finder.find([watch.object for watch in batch])):
                why = found if isinstance(found, str) else self._watch(numbers, watch, found)
                if why:
                    self._problem(file.id, f"watch {watch.wd} on {watch.object}: {why}")
                else:
                    self.watches += 1
        numbers.drain()
        lost = bool(file.queue.size) or numbers.lost or len(self.problems) > before
        if file.queue.size:
            self._problem(file.id, f"{file.queue.size} bytes of events were queued")
        if self._overflow == "always" or (lost and self._overflow == "auto"):
            try:
                last = watches[-1].wd if watches else 0
                add_overflow(instance, min(last + 1, _INT_MAX))
            except (Failure, OSError) as error:
                self._problem(file.id, f"IN_Q_OVERFLOW cannot be had: {error}")
        # Only so could it be read without waiting.
        fcntl.fcntl(instance, fcntl.F_SETFL, 0)

    def _watch(self, numbers: _Numbers, watch: Watch, fd: int) -> str:
        """Add a watch on the file of ``fd``, and close ``fd``. Returns why that failed, or ''."""
        try:
            # With IN_MASK_CREATE two numbers for one file are an error, not a changed mask.
            mask = watch.mask & _ASKED | notify.IN_MASK_CREATE
            numbers.add(watch.wd, notify.fd_path(fd), mask)
        except Failure as failure:
            return str(failure)
        except OSError as error:
            return notify.why_not(error)
        finally:
            os.close(fd)
        return ""

    # fanotify

    def _fanotify(self, file: Fanotify, finder: Finder) -> None:
        group = self.park(notify.fanotify_init(file.init_flags, file.event_flags))
        self._files[file.id] = group
        for mark in file.marks:
            if mark.mask & notify.FAN_PERMISSION:
                why = "it decides on accesses, and would wait for itself to decide on the command's"
            else:
                found = _target_of(mark, finder)
                why = found if isinstance(found, str) else _mark(group, mark, found)
            if why:
                self._problem(file.id, f"mark on {_name(mark)}: {why}")
            else:
                self.watches += 1
        if file.queue.size:
            self._problem(file.id, f"{file.queue.size} bytes of events were queued, and are lost")

    # epoll

    def _entries(self, file: Epoll) -> None:
        for target in file.targets:
            if target.id not in self._files:
                what = os.fsdecode(target.what) or "not found"
                self._problem(file.id, f"entry {target.tfd} of the set ({what}) is not restored")
                continue
            try:
                with self._numbered(self._files[target.id], target.tfd):
                    notify.epoll_add(self._files[file.id], target.tfd, target.events, target.data)
                self.entries += 1
            except OSError as error:
                self._problem(
                    file.id, f"entry {target.tfd} of the set cannot be added: {error.strerror}"
                )

    @contextmanager
    def _numbered(self, fd: int, number: int) -> Iterator[None]:
        """Within the block, ``number`` is the same file as ``fd``."""
        saved, inheritable = None, False
        try:
            saved = self.park(os.dup(number))
            inheritable = os.get_inheritable(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
        os.dup2(fd, number, inheritable=False)
        try:
            yield
        finally:
            if saved is None:
                os.close(number)
            else:
                os.dup2(saved, number, inheritable=inheritable)
                os.close(saved)


class _Numbers:
    """Adds watches to an instance under given numbers, in ascending order."""

    def __init__(self, instance: int) -> None:
        self._instance = instance
        self._sets_numbers = True  # the kernel takes INOTIFY_IOC_SETNEXTWD
        self._left = REACH
        self._watches: set[int] = set()
        self._removed = 0
        self.lost = False
        """Events of watches were read and dropped."""

    def add(self, wd: int, path: str, mask: int) -> None:
        """Add a watch. Raises Failure if it cannot get the number, OSError if the file cannot be
        watched.
        """
        if self._sets_numbers:
            try:
                notify.set_next_wd(self._instance, wd)
            except OSError as error:
                if error.errno != errno.ENOTTY:
                    raise
                self._sets_numbers = False
        while True:
            got = notify.add_watch(self._instance, path, mask)
            if got == wd:
                self._watches.add(wd)
                return
            notify.remove_watch(self._instance, got)
            self._removed += 1
            if self._sets_numbers or got > wd:
                raise Failure(f"its number is not free (the kernel gave {got})")
            if wd - got > self._left:
                raise Failure(
                    f"its number is out of reach: this kernel lacks INOTIFY_IOC_SETNEXTWD "
                    f"(CONFIG_CHECKPOINT_RESTORE), and counting up from {got} is too far"
                )
            self._left -= 1
            if self._removed >= _DRAIN:
                self.drain()

    def drain(self) -> None:
        """Read the events that the removed watches have left in the queue."""
        if not self._removed:
            return
        self._removed = 0
        events = os.read(self._instance, notify.bytes_queued(self._instance))
        self.lost |= any(
            event.wd in self._watches or event.mask & Mask.Q_OVERFLOW
            for event in parse_events(events)
        )


def _target_of(mark: FanotifyMark, finder: Finder) -> int | str:
    """An O_PATH descriptor of the marked file, or why there is none."""
    if isinstance(mark, ObjectMark):
        return finder.find([mark.object])[0]
    for mount, fd in finder.mounts_of(mark.sdev):
        if isinstance(mark, FileSystemMark) or mount.point == mark.path:
            return os.dup(fd)
    return "it is not mounted"


def _mark(group: int, mark: FanotifyMark, fd: int) -> str:
    """Mark the file of ``fd``, and close ``fd``. Returns why that failed, or ''."""
    path, kind = notify.fd_path(fd), 0
    if not isinstance(mark, ObjectMark):
        whole = isinstance(mark, FileSystemMark)
        kind = notify.FAN_MARK_FILESYSTEM if whole else notify.FAN_MARK_MOUNT
    try:
        if mark.mask:
            flags = kind | mark.mflags & notify.FAN_MARK_EVICTABLE
            notify.fanotify_mark(group, flags, mark.mask, path)
        if mark.ignored_mask:
            flags = kind | mark.mflags
            if not flags & notify.FAN_MARK_IGNORE:
                flags |= notify.FAN_MARK_IGNORED_MASK
            notify.fanotify_mark(group, flags, mark.ignored_mask, path)
    except OSError as error:
        return f"it cannot be marked: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def _name(mark: FanotifyMark) -> str:
    if isinstance(mark, ObjectMark):
        return str(mark.object)
    if isinstance(mark, FileSystemMark):
        return f"file system {mark.sdev >> 20}:{mark.sdev & 0xFFFFF}"
    return f"mount {os.fsdecode(mark.path)}"
