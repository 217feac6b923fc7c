"""What a guest's kernel keeps of names, attributes, data and listings while the host's are the
same.

What it has been given is remembered, and given for long only where the host is watched. When the
host changes something, the kernel has to ask again before the change is announced to anybody. Its
own changes it knows: these come through the server, which takes their events for its own.

The guest's kernel decides when to forget. Until then the server keeps a name or a number for each
thing given, at most KEPT_NAMES_LIMIT names.

Longer than other modules, as what is given, what a change takes back and what is forgotten concern
the same few tables.
"""

from __future__ import annotations

import os
import select
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from protocol import fuse
from protocol.inotify import RawEvent
from protocol.masks import Mask

from ..files.attributes import StatLike
from ..files.inode import Inode
from ..files.table import InodeTable
from ..linux import syscalls
from .directories import DATA, ENDED, NAMES, Directories, Directory, Name
from .notifier import Notifier

DAY = 86400
"""Seconds for which the kernel may keep what is taken back."""
KEPT_NAMES_LIMIT = 1 << 20
"""Names given to one kernel, about 200 MB. Those that do not exist it never returns."""
KEPT_DIRECTORIES_LIMIT = 65_536
"""Directories watched for one kernel, if the host allows so many."""
MUCH = 1 << 15
"""Bytes of the host's events, some 5 ms of work, beyond which a guest's change is not told apart
from the host's: what its kernel keeps of it is taken back, too."""
AGAIN = 0.02
"""Seconds after which something is taken back a second time: an answer on its way when it was taken
back the first time could have restored it."""
LATELY = 1.0
"""Seconds within which an answer may still be on its way."""
_WATCHABLE = frozenset(
    b"bcachefs btrfs erofs ext2 ext3 ext4 f2fs overlay ramfs squashfs tmpfs xfs zfs".split()
)
"""File systems that change on this host only, and whose names are the same only byte by byte."""
RECENT_LIMIT = 16_384
"""Changes that are kept until a mark of before them is known, some 5 MB."""
_MOVED = int(Mask.MOVED_FROM | Mask.MOVED_TO)
_DELETE = int(Mask.DELETE)
_ONE_NAME, _DELETE_SELF = int(Mask.CREATE | Mask.DELETE), int(Mask.DELETE_SELF)
_MADE = -1
"""Instead of a nodeid: of what is just being made."""

Given = tuple[Inode | None, bytes | None, Mask]
"""An expected event: directory, name, bits."""


class Change(NamedTuple):
    """A change that the guest has not made."""

    stamp: float
    """time.monotonic() when it was read."""
    directory: Inode
    child: Inode | None
    """What has the name, if that is known; the directory if there is none."""
    raw: RawEvent


class CoherentCache:
    """That of one guest. Owns its watches. Raises OSError if the host allows none."""

    def __init__(
        self,
        table: InodeTable,
        notifier: Notifier,
        notify: Callable[[bytes], None],
        later: Callable[[float, Callable[[], None]], object],
        is_watched: Callable[[int], bool],
        *,
        limit: int = KEPT_DIRECTORIES_LIMIT,
    ) -> None:
        """``notify`` sends at once what waits for nothing; ``later`` calls after some seconds.
        ``is_watched``: whether the guest watches a node, and so has to see each of its changes in
        turn.
        """
        self._table = table
        self._notifier = notifier
        self._notify = notify
        self._later = later
        self._is_watched = is_watched
        self._directories = Directories(table, limit)
        self._attributes: set[int] = set()  # nodeids whose attributes were given
        self._data: set[int] = set()  # nodeids of files and directories whose content is current
        self._names = 0
        self._own: Counter[tuple[int, bytes, int]] = Counter()
        self._points = dict(table.mounts.points)
        self._mountinfo = open(syscalls.mountinfo_path(), "rb")  # noqa: SIM115 - until close
        self._epoll = select.epoll()
        self._epoll.register(self._directories.fd, select.EPOLLIN)
        self._epoll.register(self._mountinfo.fileno(), select.EPOLLPRI)
        self.fd = self._epoll.fileno()
        """Readable when something is to be ``read``."""
        self.is_late = False
        """A request is served with what was looked up before the last ``read``."""
        self.disabled = ""
        """Why nothing is given, if so."""
        self.has_epochs = False
        """The kernel knows NOTIFY_INC_EPOCH."""
        self.short: Counter[str] = Counter()
        """How often something was not given for long, by reason."""
        self._sees_marks = True
        self._recent: deque[Change] = deque(maxlen=RECENT_LIMIT)
        self._touched: dict[int, float] = {}  # nodeid: time.monotonic() of the guest's last change
        self._read_at = 0.0  # when ``read`` began last

    def close(self) -> None:
        """Drop all watches. What the kernel keeps ends with its connection."""
        self._epoll.close()
        self._mountinfo.close()
        self._directories.close()

    # Given

    def prepare(self, directory: Inode) -> None:
        """Before a look into a directory: watch it, so that what is seen may be given for long."""
        if self.disabled or not self._may_watch(directory):
            return
        if self._directories.use(directory) is None:
            self.short["no watch"] += 1
        while (surplus := self._directories.surplus()) is not None:
            self._give_up(surplus)

    def _may_watch(self, directory: Inode) -> bool:
        if self._is_watched(directory.nodeid):
            self.short["watched by a program"] += 1
            return False
        if self._table.mounts.kinds.get(directory.identity.mount) not in _WATCHABLE:
            self.short["file system"] += 1
            return False
        return not directory.is_placeholder

    def keeps_name(self, parent: Inode, name: bytes, nodeid: int) -> bool:
        """Whether the kernel may keep that the name stands for a node; 0: that it does not
        exist.
        """
        directory = None if self.is_late else self._directories.get(parent)
        if directory is None:
            return False
        if name not in directory.names:
            self._names += 1
        directory.names[name] = Name(time.monotonic(), nodeid)
        while self._names > KEPT_NAMES_LIMIT:
            self._give_up(next(iter(self._directories)))
        if nodeid and not self._sees_marks:
            self.short["marks are not seen"] += 1
            return False
        return True

    def keeps_missing(self, parent: Inode, name: bytes) -> bool:
        """Whether the kernel may keep that a name does not exist. A look-up that failed with ENOENT
        does not show that: it may have been the directory that was not found.
        """
        if self._directories.get(parent) is None:
            return False
        try:
            fd = self._table.reach.open(parent)
        except OSError:
            return False
        try:
            os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return self.keeps_name(parent, name, 0)
        except OSError:
            return False
        finally:
            os.close(fd)
        return False

    def keeps_attributes(self, inode: Inode, attr: StatLike) -> bool:
        """Whether the kernel may keep these attributes."""
        if not self._is_covered(inode, attr.st_nlink) or not self._sees_marks:
            return False
        self._attributes.add(inode.nodeid)
        return True

    def keeps_content(self, inode: Inode) -> bool | None:
        """Of a file or directory that is opened: whether what the kernel has of its data or listing
        is current; None if it may not keep any.
        """
        if not self._is_covered(inode, inode.nlink):
            self._data.discard(inode.nodeid)
            return None
        is_current = inode.nodeid in self._data
        self._data.add(inode.nodeid)
        return is_current

    def gives_content(self, inode: Inode) -> bool:
        """Whether the kernel may keep what it has of an object's data: since some open."""
        return inode.nodeid in self._data

    def _is_covered(self, inode: Inode, links: int) -> bool:
        """Whether the host's changes of an object are seen. One with other names may be changed by
        those, elsewhere; a directory's attributes change with its names.
        """
        if self.is_late or inode.is_placeholder:
            return False
        if inode.is_dir:
            return self._directories.get(inode) is not None
        if links != 1:
            self.short["other links"] += 1
            return False
        above = None if inode.parent is None else self._directories.get(inode.parent)
        given = None if above is None else above.names.get(inode.name)
        return given is not None and given.nodeid == inode.nodeid  # else it may have another name

    # Taken back

    def read(self, most: int = 1 << 30) -> None:
        """Take back what the host has changed, as far as about ``most`` bytes of events say."""
        before, self._read_at = self._read_at, time.monotonic()
        for directory, raw in self._directories.read(most):
            mask, name = raw.mask, raw.name
            if directory is None:
                self.take_all()
                continue
            inode = directory.inode
            child = inode.children.get(name) if name else inode
            if mask & _DELETE_SELF:
                self._end(directory)
                continue
            if mask & ENDED:
                self._give_up(directory)
                continue
            if mask & NAMES:
                if self._is_own(raw):
                    if mask & _ONE_NAME:
                        continue
                else:
                    self._recent.append(Change(time.monotonic(), inode, child, raw))
                self._name_changed(directory, name, child)
                continue
            given = directory.names.get(name)  # the tables may be ahead
            if given is not None and (child is None or given.nodeid != child.nodeid):
                self._take_attributes_of(given.nodeid)
                if mask & DATA:
                    self._take_content_of(given.nodeid)
            if child is not None:
                # The queue merges equal events, so one by the guest may be the host's, too.
                if self._touched.get(child.nodeid, 0.0) < before:
                    self._recent.append(Change(time.monotonic(), inode, child, raw))
                self._take_attributes(child)
                if mask & DATA:
                    self._take_content(child)
        mounts = self._table.mounts
        if (mounts.below or self._points) and mounts.points != self._points:
            self._points = dict(mounts.points)
            self.take_all()

    def catch_up(self) -> None:
        """Take back now what has changed, if that is no long work. Before an answer, as the kernel
        ignores attributes if others are taken back while it waits for them: lseek(2) then goes by
        the old size.
        """
        if 0 < self._directories.queued <= MUCH:
            self.read()

    def _is_own(self, raw: RawEvent) -> bool:
        own = raw.wd, raw.name, raw.mask & NAMES
        if not self._own.get(own):
            return False
        self._own[own] -= 1
        return True

    def _name_changed(self, directory: Directory, name: bytes, child: Inode | None) -> None:
        given = self._take_name(directory, name)
        if given is not None and given.nodeid:  # the tables may be ahead, and it has no name there
            self._take_attributes_of(given.nodeid)
            self._take_content_of(given.nodeid)
            self._data.discard(given.nodeid)
        if child is not None:
            self._take_attributes(child)
            self.give_up_content(child)
        self._take_attributes(directory.inode)
        self._take_content(directory.inode)

    def sees(self, expected: Iterable[Given]) -> bool:
        """Whether there are changes of names among these, which are made as the guest's ``own``."""
        return any(name and int(mask) & NAMES for _, name, mask in expected)

    @contextmanager
    def own(self, expected: Iterable[Given]) -> Iterator[None]:
        """Make a change for the guest: its kernel knows it, and holds the directories' locks."""
        own = self._own
        for inode, name, expected_mask in expected:
            mask = int(expected_mask)  # its own & costs a microsecond
            if inode is None or not name or not mask & NAMES:
                continue
            directory = self._directories.get(inode)
            if directory is not None:
                own[directory.wd, name, mask & NAMES] += 1
            if mask & _MOVED:
                # The kernel moves what it keeps to the new name. This waits for the end of that.
                if directory is not None:
                    self._forget_name(directory, name)
                if (child := inode.children.get(name)) is not None:
                    self.give_up_content(child)
                self._post([_expired(inode.nodeid, name)])
            elif directory is not None:
                if mask & _DELETE:
                    self._forget_name(directory, name)
                else:  # the answer, which comes after the queue is read, says which node
                    self.keeps_name(inode, name, _MADE)
        try:
            yield
        finally:
            if own:
                if self._directories.queued <= MUCH:
                    self.read()
                own.clear()

    # Marks

    def sees_marks(self, sees: bool) -> None:
        """Whether marks that are set on a name which the kernel keeps are seen. If not, it has to
        ask for each name.
        """
        self._sees_marks = sees
        if not sees:
            self.take_all()

    def touched(self, inode: Inode) -> None:
        """The guest is about to change or use a file or its attributes."""
        self._touched[inode.nodeid] = time.monotonic()

    def recent(self, since: float) -> list[Change]:
        """The last changes of others, those read since then (time.monotonic())."""
        self.read()
        return [change for change in self._recent if change.stamp >= since]

    def watched(self, inode: Inode | None) -> None:
        """The guest watches an object (None = all) from now on: let its kernel ask each time."""
        self.read()  # what has happened until it is watched elsewhere
        if inode is None:
            for each in self._directories:
                self._give_up(each)
            return
        directory = self._directories.get(inode)
        if directory is not None:
            self._give_up(directory)
        above = None if inode.parent is None else self._directories.get(inode.parent)
        if above is not None:
            self._take_name(above, inode.name)
        self._take_attributes(inode)
        self._take_content(inode)

    def take_all(self) -> None:
        """Events were lost, or what is mounted has changed: the kernel asks for everything."""
        if self.has_epochs:
            self._post([_message(fuse.NOTIFY_INC_EPOCH, b"")], again=True)
        for directory in self._directories:
            if self.has_epochs:
                self._forget_names(directory)
            else:
                self._take_names(directory)
        given, self._attributes = self._attributes, set()
        self._post(map(_attributes, given))
        self._post(map(_content, list(self._data)))

    def forget(self, nodeid: int) -> None:
        """The kernel holds a node no longer, and nothing below it."""
        self._attributes.discard(nodeid)
        self._data.discard(nodeid)
        self._touched.pop(nodeid, None)
        directory = self._directories.of_node(nodeid)
        if directory is not None:
            self._names -= len(directory.names)
            self._directories.drop(directory)

    @property
    def is_settled(self) -> bool:
        """Whether the kernel keeps nothing that the host has changed up to now."""
        self.read()
        return self._notifier.is_settled

    def _give_up(self, directory: Directory) -> None:
        """Watch a directory no longer."""
        self._take_names(directory)
        nodes = {directory.inode.nodeid, *(i.nodeid for i in directory.inode.children.values())}
        self._post(map(_attributes, nodes & self._attributes))
        self._post(map(_content, nodes & self._data))
        self._attributes -= nodes
        self._data -= nodes
        self._directories.drop(directory)

    def _end(self, directory: Directory) -> None:
        """A directory is removed. It was empty: only its attributes have changed. The notifier's
        thread would cost the guest's next requests more than their answers do.
        """
        self._forget_names(directory)
        self._take_attributes(directory.inode)
        self._data.discard(directory.inode.nodeid)
        self._directories.drop(directory)

    def _take_names(self, directory: Directory) -> None:
        nodeid = directory.inode.nodeid
        names = self._forget_names(directory)
        self._post(_Messages(partial(_expired, nodeid), names), again=True)

    def _forget_names(self, directory: Directory) -> dict[bytes, Name]:
        names, directory.names = directory.names, {}
        self._names -= len(names)
        return names

    def _take_name(self, directory: Directory, name: bytes) -> Name | None:
        given = self._forget_name(directory, name)
        if given is not None:
            again = time.monotonic() - given.at < LATELY
            self._post([_expired(directory.inode.nodeid, name)], again=again)
        return given

    def _forget_name(self, directory: Directory, name: bytes) -> Name | None:
        given = directory.names.pop(name, None)
        self._names -= given is not None
        return given

    def _take_attributes(self, inode: Inode) -> None:
        """At once. An answer on its way does not restore them: the kernel numbers its requests."""
        self._take_attributes_of(inode.nodeid)

    def _take_attributes_of(self, nodeid: int) -> None:
        if nodeid in self._attributes:
            self._attributes.remove(nodeid)
            self._notify(_attributes(nodeid))

    def _take_content(self, inode: Inode) -> None:
        self._take_content_of(inode.nodeid)

    def _take_content_of(self, nodeid: int) -> None:
        if nodeid in self._data:
            self._post([_content(nodeid)])

    def give_up_content(self, inode: Inode) -> None:
        """It may be changed where nobody looks, until it is opened again."""
        self._take_content(inode)
        self._data.discard(inode.nodeid)

    def _post(self, messages: Iterable[bytes], *, again: bool = False) -> None:
        """In the notifier's thread; and ``again`` AGAIN seconds later: then it is a list."""
        self._notifier.post(messages)
        if again:
            self._later(AGAIN, partial(self._notifier.post, messages))

    # For people

    def state(self) -> dict[str, Any]:
        """What is held, and how often something was not, by reason."""
        return {
            "directories": len(self._directories),
            "names": self._names,
            "attributes": len(self._attributes),
            "contents": len(self._data),
            "short": dict(self.short),
            "disabled": self.disabled,
            "settled": self.is_settled and self._notifier.is_idle,
        }


@dataclass(frozen=True)
class _Messages:
    """Messages about many things, which the notifier's thread makes."""

    make: Callable[[Any], bytes]
    of: Collection[Any]

    def __iter__(self) -> Iterator[bytes]:
        return map(self.make, self.of)


def _message(code: int, body: bytes) -> bytes:
    return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(body), code, 0) + body


def _expired(nodeid: int, name: bytes) -> bytes:
    """A name is looked up again when it is used next."""
    body = fuse.NOTIFY_INVAL_ENTRY_OUT.pack(nodeid, len(name), fuse.EXPIRE_ONLY)
    return _message(fuse.NOTIFY_INVAL_ENTRY, body + name + b"\0")


def _attributes(nodeid: int) -> bytes:
    return _message(fuse.NOTIFY_INVAL_INODE, fuse.NOTIFY_INVAL_INODE_OUT.pack(nodeid, -1, 0))


def _content(nodeid: int) -> bytes:
    """The data of a file, or the listing of a directory, from its start to its end."""
    return _message(fuse.NOTIFY_INVAL_INODE, fuse.NOTIFY_INVAL_INODE_OUT.pack(nodeid, 0, 0))
