"""Reads the notification state of a process, which keeps running and notices nothing."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from protocol.fdinfo import MarkInfo, parse_fanotify, parse_fdinfo, parse_flags
from protocol.masks import Mask

from ..errors import Failure
from ..marks import process_name
from . import epoll, notify
from .objects import Mounts
from .state import (
    Descriptor,
    Epoll,
    Fanotify,
    FanotifyMark,
    File,
    FileSystem,
    FileSystemMark,
    Identity,
    Inotify,
    MountMark,
    Object,
    ObjectMark,
    Queue,
    State,
    Watch,
)

_LINKS = {
    "anon_inode:inotify": "inotify",
    "anon_inode:[fanotify]": "fanotify",
    "anon_inode:[eventpoll]": "epoll",
}
_FLAGS = int(Mask.ONESHOT | Mask.EXCL_UNLINK)
_TRIES = 10
"""Readings of a process that keeps changing; each takes about a millisecond."""


def checkpoint(
    pid: int, *, take_events: bool = False, search: Iterable[str] = (), warn: Callable[[str], None]
) -> State:
    """The state of a process. ``take_events``: read the queued events as well, which the process
    then loses; it must be stopped. ``search``: directories to search for watched files whose path
    the kernel does not give. ``warn`` gets one line for each thing that could not be saved. Raises
    Failure, OSError.
    """
    pidfd = _pidfd(pid)
    try:
        if take_events and not _is_stopped(pid):
            raise Failure(
                f"process {pid} is running and would read its events itself; stop it first "
                f"(kill -STOP {pid})"
            )
        with Mounts(pid) as mounts:
            reader = _Reader(pid, pidfd, mounts, warn)
            state = reader.read(search)
            if take_events:
                state = reader.take(state)
            if any(isinstance(file, Inotify) for file in state.files) and not _shows_flags():
                warn("IN_ONESHOT and IN_EXCL_UNLINK are not saved: Linux shows them since 5.19")
            for file in state.files:
                if not isinstance(file, Epoll) and file.queue.size > len(file.queue.events):
                    warn(
                        f"descriptor {state.fds(file.id)[0]}: {file.queue.size} bytes of events "
                        "are queued and not saved; the process still has them"
                    )
            return state
    finally:
        os.close(pidfd)


def _shows_flags() -> bool:
    """Whether this kernel's fdinfo shows IN_ONESHOT and IN_EXCL_UNLINK: Linux 5.19."""
    memory, instance = os.memfd_create("trial"), notify.inotify_init(os.O_CLOEXEC)
    try:
        notify.add_watch(instance, notify.fd_path(memory), Mask.MODIFY | _FLAGS)
        (mark,) = parse_fdinfo(notify.fdinfo(instance))
    finally:
        os.close(instance)
        os.close(memory)
    return mark.mask & _FLAGS == _FLAGS


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise Failure(f"there is no process {pid}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Failure(f"{pid} is not a process (perhaps a thread)") from None


def _is_stopped(pid: int) -> bool:
    """Whether all its threads are stopped."""
    states = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat", errors="replace") as stat:
            states.add(stat.read().rpartition(")")[2].split()[0])
    return states <= {"T", "t"}


class _Reader:
    """One reading of one process."""

    def __init__(self, pid: int, pidfd: int, mounts: Mounts, warn: Callable[[str], None]) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._mounts = mounts
        self._warn = warn
        self._located: dict[Identity, tuple[bytes, bool]] = {}

    def read(self, search: Iterable[str]) -> State:
        texts = self._stable_texts()
        if not texts:
            raise Failure(f"process {self._pid} has no inotify, fanotify or epoll descriptor")
        groups = self._groups(list(texts))
        numbers = {fd: number for number, fds in enumerate(groups, 1) for fd in fds}
        marks = {fds[0]: list(parse_fdinfo(texts[fds[0]][1])) for fds in groups}
        self._locate([mark for part in marks.values() for mark in part], search)
        files: list[File] = [
            self._file(number, fds[0], *texts[fds[0]], marks[fds[0]], numbers)
            for number, fds in enumerate(groups, 1)
        ]
        descriptors = [
            Descriptor(fd, bool(parse_flags(texts[fd][1]) & os.O_CLOEXEC), numbers[fd])
            for fd in sorted(texts)
        ]
        command = os.fsencode(process_name(self._pid))
        filesystems = self._filesystems(files)
        return State(self._pid, command, os.uname().release, filesystems, files, descriptors)

    def _filesystems(self, files: list[File]) -> list[FileSystem]:
        """The file systems that marks are on."""
        sdevs: dict[int, None] = {}
        for file in files:
            if isinstance(file, Inotify):
                sdevs.update((watch.object.identity.sdev, None) for watch in file.watches)
            elif isinstance(file, Fanotify):
                for mark in file.marks:
                    if isinstance(mark, ObjectMark):
                        sdevs[mark.object.identity.sdev] = None
                    else:
                        sdevs[mark.sdev] = None
        known = (self._mounts.filesystem(sdev) for sdev in sdevs)
        return [filesystem for filesystem in known if filesystem]

    def _stable_texts(self) -> dict[int, tuple[str, str]]:
        """For each descriptor its kind and its fdinfo, as of one moment."""
        before = None
        for _ in range(_TRIES):
            texts = self._texts()
            if texts == before:
                return texts
            before = texts
        raise Failure(f"process {self._pid} keeps changing; stop it first (kill -STOP {self._pid})")

    def _texts(self) -> dict[int, tuple[str, str]]:
        texts = {}
        for name in os.listdir(f"/proc/{self._pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                kind = _LINKS.get(os.readlink(f"/proc/{self._pid}/fd/{name}"))
                if kind:
                    with open(f"/proc/{self._pid}/fdinfo/{name}") as info:
                        texts[int(name)] = kind, info.read()
        return texts

    def _groups(self, fds: list[int]) -> list[list[int]]:
        """The descriptors of each open file, the lowest first."""

        def order(one: int, other: int) -> int:
            return notify.compare_files(self._pid, one, self._pid, other)

        groups: list[list[int]] = []
        try:
            for fd in sorted(sorted(fds), key=functools.cmp_to_key(order)):
                if groups and order(groups[-1][0], fd) == 0:
                    groups[-1].append(fd)
                else:
                    groups.append([fd])
        except OSError as error:
            raise Failure(
                f"descriptors of process {self._pid} cannot be compared (kcmp): {error.strerror}"
            ) from None
        return sorted(groups)

    # Files

    def _file(
        self,
        number: int,
        fd: int,
        kind: str,
        text: str,
        marks: list[MarkInfo],
        numbers: dict[int, int],
    ) -> File:
        own = notify.take_descriptor(self._pidfd, fd)
        try:
            flags, owner = fcntl.fcntl(own, fcntl.F_GETFL), notify.owner(own)
            queue = Queue(0 if kind == "epoll" else notify.bytes_queued(own), b"")
        finally:
            os.close(own)
        if kind == "epoll":

            def file_of(pid: int, fd: int) -> int:
                return numbers.get(fd, 0) if pid == self._pid else 0

            return Epoll(number, flags, owner, epoll.targets(self._pid, fd, text, file_of))
        if kind == "inotify":
            watches = [Watch(m.wd, m.mask, m.ignored_mask, self._object(m)) for m in marks]
            watches.sort()
            return Inotify(number, flags, owner, watches, queue)
        init_flags, event_flags = parse_fanotify(text)
        saved = [mark for mark in (self._fanotify_mark(fd, mark) for mark in marks) if mark]
        return Fanotify(number, flags, owner, init_flags, event_flags, saved, queue)

    def take(self, state: State) -> State:
        """The same state with the queued events added; the process loses them."""
        files: list[File] = []
        for file in state.files:
            if not isinstance(file, Inotify) or not file.queue.size:
                files.append(file)
                continue
            own = notify.take_descriptor(self._pidfd, state.fds(file.id)[0])
            try:
                # The process does not read now. Events that came since the reading are taken, too.
                size = notify.bytes_queued(own)
                events = os.read(own, size) if size else b""
            finally:
                os.close(own)
            files.append(file._replace(queue=Queue(len(events), events)))
        return state._replace(files=files)

    # Watched files

    def _locate(self, marks: list[MarkInfo], search: Iterable[str]) -> None:
        unknown = set()
        for mark in marks:
            identity = _identity(mark)
            if not identity.ino or identity in self._located:
                continue
            self._located[identity] = self._mounts.locate(identity)
            if not any(self._located[identity]):
                unknown.add(identity)
        numbers = {(identity.sdev, identity.ino): identity for identity in unknown}
        wanted = set(numbers)
        for top in search:
            for sdev, ino, path in self._mounts.search(top, wanted):
                self._located[numbers[sdev, ino]] = path, False
        if wanted:
            lost = sum(not self._mounts.decodable(sdev) for sdev, _ in wanted)
            self._warn(
                f"{len(wanted)} watched files have no known path, and {lost} of them cannot be "
                "found by handle; give --search DIR to search for them"
            )

    def _object(self, mark: MarkInfo) -> Object:
        identity = _identity(mark)
        path, deleted = self._located[identity]
        decodable = bool(identity.handle) and self._mounts.decodable(identity.sdev)
        return Object(identity, decodable, path, deleted)

    def _fanotify_mark(self, fd: int, mark: MarkInfo) -> FanotifyMark | None:
        bits = mark.mflags, mark.mask, mark.ignored_mask
        if mark.ino:
            return ObjectMark(*bits, self._object(mark))
        if mark.sdev:
            return FileSystemMark(*bits, mark.sdev)
        mount = self._mounts.by_id(mark.mnt_id)
        if mount:
            return MountMark(*bits, mount.sdev, mark.mnt_id, mount.point)
        self._warn(
            f"descriptor {fd}: a mark on mount {mark.mnt_id}, which is not there, is not saved"
        )
        return None


def _identity(mark: MarkInfo) -> Identity:
    return Identity(mark.sdev, mark.ino, mark.handle_type, mark.handle)
