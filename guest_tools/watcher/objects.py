"""Watched files: where a process has them, and how to find the same files again.

A file is identified as in fdinfo: by device, inode number and handle. In the end a trial watch on
the file that was found has to show the same: a name, or an inode number that another file may have
by now, is never enough.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from protocol.fdinfo import parse_fdinfo
from protocol.masks import Mask
from protocol.mountinfo import parse_mountinfo

from ..kernel import mount_id, open_by_handle
from . import notify
from .state import FileSystem, Identity, Object

_DELETED = b" (deleted)"
_AT_FDCWD = -100
_OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Mount(NamedTuple):
    """A mount, as far as it helps to find a file."""

    mnt_id: int
    sdev: int
    root: bytes
    point: bytes
    fstype: bytes
    source: bytes


class Mounts:
    """The mounts that a process sees; each is opened when it is first needed."""

    def __init__(self, pid: int | None = None) -> None:
        """Of the process ``pid``, or of this one. Raises OSError."""
        self._root = b"" if pid is None else b"/proc/%d/root" % pid
        with open(f"/proc/{'self' if pid is None else pid}/mountinfo", "rb") as table:
            lines = list(parse_mountinfo(table.read()))
        self._mounts = [
            Mount(line.mnt_id, line.major << 20 | line.minor, line.root, line.point, line.fstype,
                  line.source)
            for line in lines
        ]  # fmt: skip
        self._by_sdev: dict[int, list[Mount]] = {}
        for mount in sorted(self._mounts, key=lambda mount: mount.root != b"/"):
            self._by_sdev.setdefault(mount.sdev, []).append(mount)
        self._opened: dict[int, int] = {}  # mnt_id -> descriptor, -1: it cannot be had
        self._home = os.open(".", os.O_PATH | os.O_CLOEXEC)
        self._filesystems: dict[int, tuple[FileSystem, bool] | None] = {}

    def __enter__(self) -> Mounts:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._opened.values():
            if fd >= 0:
                os.close(fd)
        self._opened.clear()
        os.close(self._home)

    def by_id(self, mnt_id: int) -> Mount | None:
        """The mount with that id."""
        return next((mount for mount in self._mounts if mount.mnt_id == mnt_id), None)

    def devices(self, fstype: bytes, source: bytes) -> set[int]:
        """The file systems of that type and source, by device."""
        return {mount.sdev for mount in self._mounts if mount[4:] == (fstype, source)}

    def of(self, sdev: int) -> Iterator[tuple[Mount, int]]:
        """The mounts of a file system, and descriptors of their roots, those that show all of it
        first.
        """
        for mount in self._by_sdev.get(sdev, ()):
            fd = self._open(mount)
            if fd >= 0:
                yield mount, fd

    def _open(self, mount: Mount) -> int:
        if mount.mnt_id not in self._opened:
            self._opened[mount.mnt_id] = self._try(mount)
        return self._opened[mount.mnt_id]

    def _try(self, mount: Mount) -> int:
        try:
            fd = os.open(self._root + mount.point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return -1
        with suppress(OSError):
            if mount_id(fd) == mount.mnt_id:
                return fd
        os.close(fd)  # another mount lies over it
        return -1

    def filesystem(self, sdev: int) -> FileSystem | None:
        """What identifies this file system; None if there is no mount of it."""
        found = self._filesystem(sdev)
        return found and found[0]

    def decodable(self, sdev: int) -> bool:
        """Whether the file system's handles can be opened."""
        found = self._filesystem(sdev)
        return found is not None and found[1]

    def _filesystem(self, sdev: int) -> tuple[FileSystem, bool] | None:
        if sdev not in self._filesystems:
            self._filesystems[sdev] = None
            for mount, fd in self.of(sdev):
                fsid = os.fstatvfs(fd).f_fsid & 0xFFFF_FFFF_FFFF_FFFF
                filesystem = FileSystem(sdev, mount.fstype, mount.source, fsid)
                self._filesystems[sdev] = filesystem, notify.has_decodable_handles(fd)
                break
        return self._filesystems[sdev]

    def open_handle(self, identity: Identity) -> int:
        """An O_PATH descriptor of the file with that handle. Raises OSError."""
        number = errno.ENODEV
        for _, root in self.of(identity.sdev):
            try:
                return self._open_handle(root, identity)
            except OSError as error:
                number = error.errno or number
        raise OSError(number, os.strerror(number))

    def _open_handle(self, root: int, identity: Identity) -> int:
        # open_by_handle_at(2) takes O_PATH only as working directory, and any other open of the
        # root would be an event for its watchers.
        os.fchdir(root)
        try:
            return open_by_handle(_AT_FDCWD, identity.handle_type, identity.handle, _OPEN)
        finally:
            os.fchdir(self._home)

    def open_path(self, path: bytes) -> int:
        """An O_PATH descriptor of the file that has this name now; of a symbolic link itself.
        Raises OSError.
        """
        return os.open(self._root + path, _OPEN)

    def locate(self, identity: Identity) -> tuple[bytes, bool]:
        """Path of a file by its handle, and whether it is deleted; b"" if it is not known."""
        for _, root in self.of(identity.sdev):
            try:
                fd = self._open_handle(root, identity)
            except OSError:
                continue
            try:
                path, status = os.readlink(b"/proc/self/fd/%d" % fd), os.fstat(fd)
                if status.st_nlink == 0 and path.endswith(_DELETED):
                    return path[: -len(_DELETED)], True
                # A file that is not in the kernel's cache of names has no path, or part of one.
                if os.path.samestat(status, os.lstat(self._root + path)):
                    return path, False
            except OSError:
                continue
            finally:
                os.close(fd)
        return b"", False

    def search(self, top: str, wanted: set[tuple[int, int]]) -> Iterator[tuple[int, int, bytes]]:
        """Device, inode number and path of each of the ``wanted`` files below ``top``, which are
        removed from ``wanted``.
        """
        start = os.path.abspath(os.fsencode(top))
        stack = [start]
        while stack and wanted:
            path = stack.pop()
            try:
                status = os.lstat(self._root + path)
            except OSError:
                continue
            key = kernel_device(status.st_dev), status.st_ino
            if key in wanted:
                wanted.discard(key)
                yield (*key, path)
            if stat.S_ISDIR(status.st_mode):
                with suppress(OSError):
                    names = os.listdir(self._root + path)
                    stack += [os.path.join(path, name) for name in names]


def kernel_device(st_dev: int) -> int:
    """A device number as fdinfo has it: the kernel's s_dev."""
    return os.major(st_dev) << 20 | os.minor(st_dev)


# Finding them again


class Finder:
    """Finds the files of a state among this process's mounts."""

    def __init__(self, mounts: Mounts, filesystems: Iterable[FileSystem]) -> None:
        self._mounts = mounts
        self._known = {filesystem.sdev: filesystem for filesystem in filesystems}
        self._same: dict[tuple[int, int], bool] = {}
        self._trial = notify.inotify_init(os.O_CLOEXEC)

    def __enter__(self) -> Finder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._trial)

    def find(self, things: list[Object]) -> list[int | str]:
        """For each an O_PATH descriptor, or the reason why there is none, for the user."""
        found = self._verified(things, [self._by_handle(thing) for thing in things])
        missing = [i for i, result in enumerate(found) if isinstance(result, str)]
        others = [things[i] for i in missing]
        again = self._verified(others, [self._by_path(thing) for thing in others])
        for i, result in zip(missing, again):
            if isinstance(result, int) or not things[i].decodable:
                found[i] = result  # else the handle's reason is more precise
        return found

    def same_filesystem(self, sdev: int, now: int) -> bool:
        """Whether device ``now`` is the file system that was ``sdev`` at the checkpoint."""
        if (sdev, now) not in self._same:
            known, present = self._known.get(sdev), self._mounts.filesystem(now)
            self._same[sdev, now] = (
                known is not None
                and present is not None
                and known._replace(sdev=0) == present._replace(sdev=0)
            )
        return self._same[sdev, now]

    def mounts_of(self, sdev: int) -> Iterator[tuple[Mount, int]]:
        """The mounts of the file system that was ``sdev``, and descriptors of their roots."""
        known = self._known.get(sdev)
        for now in self._mounts.devices(known.fstype, known.source) if known else ():
            if self.same_filesystem(sdev, now):
                yield from self._mounts.of(now)

    def is_same(self, wanted: Identity, found: Identity) -> bool:
        """Whether two identities are the same file. The file system may have another device number
        by now, if the file has a handle to identify it.
        """
        if not self.same_filesystem(wanted.sdev, found.sdev):
            return False
        if wanted.handle:
            return wanted[1:] == found[1:]
        return wanted == found

    def _by_handle(self, thing: Object) -> int | str:
        if not thing.identity.handle or not thing.decodable:
            return "its file system cannot find it by handle"
        if not self.same_filesystem(thing.identity.sdev, thing.identity.sdev):
            return "its file system is not there"
        try:
            return self._mounts.open_handle(thing.identity)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOMEM):  # the latter while it is being freed
                return "it does not exist any more"
            return f"its handle cannot be opened: {error.strerror}"

    def _by_path(self, thing: Object) -> int | str:
        if not thing.path or thing.deleted:
            return "it does not exist any more" if thing.deleted else "its path is not known"
        try:
            return self._mounts.open_path(thing.path)
        except OSError as error:
            return f"its path cannot be opened: {error.strerror}"

    def _verified(self, things: list[Object], found: list[int | str]) -> list[int | str]:
        """The same list; a descriptor of the wrong file is closed and replaced by the reason."""
        identities = self._identities([fd for fd in found if isinstance(fd, int)])
        results: list[int | str] = []
        for thing, fd in zip(things, found):
            identity = fd if isinstance(fd, str) else next(identities)
            if isinstance(fd, int) and not isinstance(identity, str):
                if self.is_same(thing.identity, identity):
                    results.append(fd)
                    continue
                identity = "another file is there now"
            if isinstance(fd, int):
                os.close(fd)
            results.append(str(identity))
        return results

    def _identities(self, fds: list[int]) -> Iterator[Identity | str]:
        """How fdinfo identifies each file, by a watch that is removed again; or why there can be no
        watch.
        """
        results: list[int | str] = []
        for fd in fds:
            try:
                results.append(notify.add_watch(self._trial, notify.fd_path(fd), Mask.DELETE_SELF))
            except OSError as error:
                results.append(notify.why_not(error))
        marks = {mark.wd: mark for mark in parse_fdinfo(notify.fdinfo(self._trial))}
        for wd in marks:
            with suppress(OSError):  # the file has just been deleted
                notify.remove_watch(self._trial, wd)
        for result in results:
            if isinstance(result, str):
                yield result
            elif result in marks:
                mark = marks[result]
                yield Identity(mark.sdev, mark.ino, mark.handle_type, mark.handle)
            else:
                yield "it does not exist any more"
