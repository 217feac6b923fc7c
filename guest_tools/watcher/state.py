"""A process's notification state: what a checkpoint reads, an image holds, and a restore makes.

Plain values, so that only ``images`` depends on protobuf.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from .notify import Owner


class FileSystem(NamedTuple):
    """Identifies a file system, also if its device number belongs to another one now."""

    sdev: int  # the kernel's s_dev, major << 20 | minor
    fstype: bytes
    source: bytes
    fsid: int  # statvfs(3); 0 if it has none


class Identity(NamedTuple):
    """A file, as fdinfo identifies it."""

    sdev: int
    ino: int
    handle_type: int
    handle: bytes  # empty if the file system encodes none


class Object(NamedTuple):
    """A watched file, and how to find it again."""

    identity: Identity
    decodable: bool  # open_by_handle_at(2) takes its handle
    path: bytes  # as the process saw it; empty if unknown
    deleted: bool  # that path was unlinked

    @property
    def kind(self) -> str:
        """What its handle can be used for."""
        if not self.identity.handle:
            return "none"
        return "decodable" if self.decodable else "encodable only"

    def __str__(self) -> str:
        identity = self.identity
        name = repr(self.path)[2:-1] if self.path else "(no path)"
        return f"{name}{' (deleted)' if self.deleted else ''}, inode {identity.ino}"


class Queue(NamedTuple):
    """Events that the process had not read yet."""

    size: int  # bytes
    events: bytes  # they themselves, if they were taken


class Watch(NamedTuple):
    """A mark of inotify."""

    wd: int
    mask: int  # the kernel's own bits included
    ignored_mask: int
    object: Object


class Inotify(NamedTuple):
    """An inotify instance."""

    id: int
    flags: int  # of open(2), without O_CLOEXEC
    owner: Owner
    watches: list[Watch]
    queue: Queue


class ObjectMark(NamedTuple):
    """A mark of fanotify on a file."""

    mflags: int
    mask: int
    ignored_mask: int
    object: Object


class MountMark(NamedTuple):
    """A mark of fanotify on a mount."""

    mflags: int
    mask: int
    ignored_mask: int
    sdev: int
    mnt_id: int
    path: bytes  # of the mountpoint


class FileSystemMark(NamedTuple):
    """A mark of fanotify on a whole file system."""

    mflags: int
    mask: int
    ignored_mask: int
    sdev: int


FanotifyMark = Union[ObjectMark, MountMark, FileSystemMark]


class Fanotify(NamedTuple):
    """A fanotify group."""

    id: int
    flags: int
    owner: Owner
    init_flags: int  # fanotify_init(2)
    event_flags: int
    marks: list[FanotifyMark]
    queue: Queue


class Target(NamedTuple):
    """An entry of an epoll set, and the file that it refers to."""

    tfd: int  # the number that it was added under
    toff: int  # which of the set's entries with that number
    events: int
    data: int
    pos: int
    ino: int
    sdev: int
    pid: int  # a process, 0 if none was found,
    fd: int  # and its descriptor, that refer to the file
    id: int  # that file, if it is a part of this state; else 0
    what: bytes  # as /proc/PID/fd describes it


class Epoll(NamedTuple):
    """An epoll set."""

    id: int
    flags: int
    owner: Owner
    targets: list[Target]


File = Union[Inotify, Fanotify, Epoll]


class Descriptor(NamedTuple):
    """A number under which the process has a file open."""

    fd: int
    cloexec: bool
    id: int  # of the file


class State(NamedTuple):
    """All of it."""

    pid: int
    command: bytes
    kernel: str  # uname's release
    filesystems: list[FileSystem]
    files: list[File]
    descriptors: list[Descriptor]

    def fds(self, file_id: int) -> list[int]:
        """The numbers of a file."""
        return [descriptor.fd for descriptor in self.descriptors if descriptor.id == file_id]
