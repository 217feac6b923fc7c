"""The mounts below a share, as the host has them now.

Apart from the inode table, which reaches objects: this knows only the mount tree. It is read again
only after a change, which one poll(2) of /proc/self/mountinfo shows (proc_pid_mountinfo(5)).
"""

from __future__ import annotations

import errno
import os
import select
import time
import zlib

from protocol.mountinfo import parse_mountinfo

from . import syscalls

_SLOTS = 1 << 14
"""Ranges for inode numbers of other mounts: the 14 bits above those of the numbers themselves, and
below the nodeids that the server assigns."""
_INO_BITS = 48
"""Bits of an inode number that fit into a range; no common file system uses more."""


STUCK = 0.5
"""Seconds without an answer after which a file system counts as hung."""
_LOCAL = frozenset(
    b"bcachefs btrfs erofs exfat ext2 ext3 ext4 f2fs iso9660 jfs msdos ntfs3 proc ramfs reiserfs "
    b"squashfs sysfs tmpfs devtmpfs hugetlbfs cgroup2 udf vfat xfs zfs".split()
)
"""File systems that answer without help. Any other may wait for a program or a network."""


class Mounts:
    """The mounts below a directory. Owns one descriptor. Raises OSError if there is no /proc."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self.own = syscalls.mount_id(root_fd)
        """The mount that the share itself is on."""
        self.device = os.fstat(root_fd).st_dev
        self._fd = os.open(syscalls.mountinfo_path(), os.O_RDONLY | os.O_CLOEXEC)
        poll = select.poll()
        poll.register(self._fd, select.POLLERR | select.POLLPRI)
        self.poll = poll.poll
        """Called with 0: whether mounts have changed and have to be ``read`` again."""
        self.points: dict[bytes, int] = {}
        """Path below the share -> the topmost mount there, as last read."""
        self._places: dict[int, bytes] = {}  # the same of all mounts, by their numbers
        self._slots: dict[tuple[int, int], int] = {}  # mount, st_dev -> number range
        self.remote: dict[int, str] = {}
        """The mounts below whose file systems may not answer, with their names."""
        self.kinds: dict[int, bytes] = {}
        """The types of the file systems of all mounts."""
        self._asked: dict[int, float] = {}  # since when, mounts that have not answered yet
        self._own_mounts: set[int] = set()  # of the file system that this process serves
        self._device_served: tuple[int, int] | None = None
        self.changed_at = 0.0
        """time.monotonic() at which the tree was read last."""
        self.read()

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    @property
    def below(self) -> bool:
        """Whether anything is mounted below the share now."""
        if self.poll(0):
            self.read()
        return bool(self.points)

    def point(self, path: bytes) -> int:
        """The mount at a path below the share as last read; 0 if there is none."""
        return self.points.get(path, 0)

    def ask(self, mount: int, path: bytes, root_fd: int) -> None:
        """Make a request that a file system has to answer itself: in a thread, as it may hang.
        Raises OSError.
        """
        self._asked.setdefault(mount, time.monotonic())
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=root_fd)
            try:
                os.fstatvfs(fd)
            finally:
                os.close(fd)
        finally:
            self._asked.pop(mount, None)

    def check(self, mount: int, patience: float = STUCK) -> None:
        """Raises OSError: ELOOP for a mount that this very server answers, EIO for one that has not
        answered a request for ``patience`` seconds.
        """
        if mount in self._own_mounts:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        since = self._asked.get(mount)
        if since is not None and time.monotonic() > since + patience:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def serves(self, device: int) -> None:
        """This process serves that file system: accessing it would deadlock."""
        self._device_served = os.major(device), os.minor(device)
        self.read()

    def path_of(self, mount: int) -> bytes:
        """Where a mount below the share is. Raises OSError ESTALE if it is gone."""
        for path, number in self.points.items():
            if number == mount:
                return path
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def is_point(self, path: bytes) -> bool:
        """Whether something was mounted at a path below the share, as last read."""
        return path in self.points

    def read(self) -> None:
        """Read the mounts again."""
        self.changed_at = time.monotonic()
        top = os.fsencode(os.readlink(syscalls.fd_path(self._root_fd))).rstrip(b"/") + b"/"
        os.lseek(self._fd, 0, os.SEEK_SET)
        text = b""
        while chunk := os.read(self._fd, 1 << 16):
            text += chunk
        points: dict[bytes, int] = {}
        places: dict[int, bytes] = {}
        remote: dict[int, str] = {}
        own: set[int] = set()
        kinds: dict[int, bytes] = {}
        for mount in parse_mountinfo(text):
            number, point = mount.mnt_id, mount.point
            if point.startswith(top) and point != top:
                points[point[len(top) :]] = number
                if (mount.major, mount.minor) == self._device_served:
                    own.add(number)
                if mount.fstype not in _LOCAL:
                    remote[number] = f"{os.fsdecode(point)} ({os.fsdecode(mount.fstype)})"
            places[number] = point[len(top) :]
            kinds[number] = mount.fstype
        self.points, self._places = points, places
        self.remote, self._own_mounts, self.kinds = remote, own, kinds
        ids = {*places, self.own}
        self._slots = {key: slot for key, slot in self._slots.items() if key[0] in ids}

    def is_own(self, mount: int, device: int) -> bool:
        """Whether inode numbers there are those of the share's own mount."""
        return mount == self.own and device == self.device

    def number(self, mount: int, device: int, ino: int) -> int:
        """An inode number that is unique below the share: the host's on the share's own file
        system, in a range of its mount elsewhere. 0 if it fits into none.
        """
        if mount == self.own and device == self.device:
            return ino
        slot = self._slots.get((mount, device)) or self._new_slot(mount, device)
        return slot << _INO_BITS | ino if slot and ino < 1 << _INO_BITS else 0

    def _new_slot(self, mount: int, device: int) -> int:
        """Derived from the mount's place, so that the next server makes the same."""
        if len(self._slots) >= _SLOTS - 1:
            return 0
        if mount not in self._places:  # it has just been made
            self.read()
        place = self._places.get(mount, b"") + b"/%d" % (mount == self.own and device)
        taken = set(self._slots.values())
        slot = zlib.crc32(place) % (_SLOTS - 1) + 1
        while slot in taken:
            slot = slot % (_SLOTS - 1) + 1
        self._slots[mount, device] = slot
        return slot
