"""The operations that a transport offers to one mount: passthrough, own echo, replay, hidden files.

Each call comes from the mount's users, from its replayer, or is about the hidden directory; this
module separates the three. Synchronous, plain values; an OSError carries the errno for the guest.
Names and attributes are here, open files in openfiledata.py.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from functools import partial

from protocol.frames import FSD_DIR, FSD_NAME
from protocol.masks import Mask

from ..export.export import Export
from ..files import xattrs
from ..files.attributes import StatLike, placeholder_attr
from ..files.caller import Caller
from ..files.changes import Change, Changes
from ..files.handle import Handle
from ..files.inode import ROOT_ID, Inode
from ..files.passthrough import Entry
from ..files.recall import recall
from ..files.slowcalls import LONG
from ..guests.ledger import UnexpectedCall
from ..guests.mount import MountGuest
from ..linux import credentials, syscalls
from .access import Access, Events, opening, writing
from .handles import Handles
from .hidden import Checkpoint, HiddenFiles
from .openfiledata import OpenFileData
from .removal import Removal
from .slowwork import SlowWork

_UNLINKED = Mask.ATTRIB | Mask.DELETE_SELF
_NEW, _NEW_TRUNC = Mask.CREATE | opening(0), Mask.CREATE | opening(os.O_TRUNC)


class Operations:
    """Operations of one mount, which is ``guest``, on an export. ``checkpoint`` saves the export's
    state, if the mount's users may have that done.
    """

    def __init__(
        self, export: Export, guest: MountGuest, *, checkpoint: Checkpoint | None = None
    ) -> None:
        self.export = export
        self.guest = guest
        self._fs = export.fs
        self._table = export.table
        self.hidden = HiddenFiles(export, guest, checkpoint)
        self.acls = False
        """Whether POSIX ACLs may be used (fsd.files.xattrs): set by the transport."""
        self.access = Access(export, guest)
        self.slow = SlowWork(export.table.mounts)
        self.handles = Handles(export, guest, self.access)
        self.files = OpenFileData(export, guest, self.access, self.slow, self.handles, self.hidden)

    def close(self) -> None:
        """Release every lock and every handle."""
        self.handles.keep_no_longer()
        self.handles.locks.close()
        for fh in self.handles:
            self.files.release(fh)
        self._fs.successors.close()

    # Names

    def lookup(self, who: Caller, nodeid: int, name: bytes) -> Entry:
        """LOOKUP."""
        if nodeid >= FSD_DIR or (nodeid == ROOT_ID and name == FSD_NAME):
            return self._hidden_lookup(who, nodeid, name)
        if self.access.is_replayer(who):
            entry = self.guest.ledger.lookup(nodeid, name)
            if entry is not None:
                return entry
            return self._fs.lookup(self._table.get(nodeid), name)
        if name in (b".", b".."):  # of a file handle, whose node may be forgotten
            node = recall(self._table, nodeid)
            try:
                return self._fs.lookup(node, name)
            finally:
                self._table.release(node)
        directory, history = self._table.get(nodeid), self.guest.history
        history.begins_lookup(who, directory)
        entry = self._fs.lookup(directory, name)
        history.looked_up(who, directory, name, entry.inode)
        if entry.inode.is_dir:
            self.guest.ledger.found(nodeid, name)
        self.access.looked_up(who, entry.inode, entry)
        return entry

    def _hidden_lookup(self, who: Caller, nodeid: int, name: bytes) -> Entry:
        self.hidden.check(who)
        if self.access.is_replayer(who):
            entry = self.guest.ledger.lookup(nodeid, name)
            if entry is not None:
                return entry
        return self.hidden.lookup(nodeid, name)

    def forget(self, nodeid: int, count: int) -> None:
        """FORGET."""
        if nodeid < FSD_DIR:
            self._table.forget(nodeid, count)

    def mknod(self, who: Caller, nodeid: int, name: bytes, mode: int, rdev: int) -> Entry:
        """MKNOD."""
        if self.access.is_replayer(who):
            return self._replay_create(nodeid, name, stat.S_IFMT(mode))
        if stat.S_ISSOCK(mode):  # bind(2) asks only once (net/unix/af_unix.c)
            node = self._names(nodeid, name)
            self.guest.history.overtakes((node, name))
        else:
            node = self._to_change(who, nodeid, name)
        with self.access.own((node, name, Mask.CREATE)):
            return self._fs.mknod(node, name, mode, rdev, who)

    def mkdir(self, who: Caller, nodeid: int, name: bytes, mode: int) -> Entry:
        """MKDIR."""
        if self.access.is_replayer(who):
            return self._replay_create(nodeid, name, stat.S_IFDIR)
        node = self._to_change(who, nodeid, name)
        with self.access.own((node, name, Mask.CREATE)):
            return self._fs.mkdir(node, name, mode, who)

    def symlink(self, who: Caller, nodeid: int, name: bytes, target: bytes) -> Entry:
        """SYMLINK."""
        if self.access.is_replayer(who):
            return self._replay_create(nodeid, name, stat.S_IFLNK)
        node = self._to_change(who, nodeid, name)
        with self.access.own((node, name, Mask.CREATE)):
            return self._fs.symlink(node, name, target, who)

    def _replay_create(self, nodeid: int, name: bytes, kind: int, *, opens: bool = False) -> Entry:
        try:
            return self.guest.ledger.create(nodeid, name, kind, opens=opens)
        except UnexpectedCall as error:
            raise self.access.refused(error) from None

    def link(self, who: Caller, nodeid: int, new_parent: int, name: bytes) -> Entry:
        """LINK."""
        self.access.refuse_replayer(who, "link")
        inode, node = self._table.get(nodeid), self._names(new_parent, name)
        again = self.guest.history.changes(who, (node, name))
        about = (node, name, Mask.CREATE), (inode, b"", Mask.ATTRIB)
        with (
            self.access.own(*about),
            writing(who.uid, kill=False),
            self.guest.history.coming(who, again),
        ):
            return self._fs.link(inode, node, name)

    def unlink(self, who: Caller, nodeid: int, name: bytes) -> None:
        """UNLINK."""
        self._remove(who, nodeid, name, is_dir=False)

    def rmdir(self, who: Caller, nodeid: int, name: bytes) -> None:
        """RMDIR."""
        self._remove(who, nodeid, name, is_dir=True)

    def _remove(self, who: Caller, nodeid: int, name: bytes, *, is_dir: bool) -> None:
        if self.access.is_replayer(who):
            try:
                self.guest.ledger.remove(nodeid, name)
            except UnexpectedCall as error:
                raise self.access.refused(error) from None
            return
        node = self._to_change(who, nodeid, name)
        child = node.children.get(name)
        remove = self._fs.rmdir if is_dir else self._fs.unlink
        with (
            Removal(self.slow.close, child) as keep,
            self.access.own((node, name, Mask.DELETE), (child, b"", _UNLINKED)),
        ):
            remove(node, name, who, keep)

    def rename(
        self, who: Caller, nodeid: int, name: bytes, nodeid2: int, name2: bytes, flags: int
    ) -> None:
        """RENAME, RENAME2."""
        if self.access.is_replayer(who):
            try:
                self.guest.ledger.rename(nodeid, name, nodeid2, name2, flags)
            except UnexpectedCall as error:
                raise self.access.refused(error) from None
            return
        old, new = self._names(nodeid, name), self._names(nodeid2, name2)
        self.guest.history.changes(who, (old, name), (new, name2))
        moved = Mask.MOVED_FROM | (Mask.MOVED_TO if flags & syscalls.RENAME_EXCHANGE else Mask(0))
        arrived = Mask.MOVED_TO | (Mask.MOVED_FROM if flags & syscalls.RENAME_EXCHANGE else Mask(0))
        lost = Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF
        replaced = new.children.get(name2)
        with (
            Removal(self.slow.close, replaced) as keep,
            self.access.own(
                (old, name, moved),
                (new, name2, arrived),
                (old.children.get(name), b"", Mask.MOVE_SELF),
                (replaced, b"", lost),
            ),
            writing(who.uid, kill=False),
        ):
            self._fs.rename(old, name, new, name2, flags, who, keep)

    def _to_change(self, who: Caller, nodeid: int, name: bytes) -> Inode:
        """The directory in which a user changes a name. Raises OSError ESTALE if that has to
        wait.
        """
        node = self._names(nodeid, name)
        self.guest.history.changes(who, (node, name))
        return node

    def _names(self, nodeid: int, name: bytes) -> Inode:
        """A directory in which names may change: not the hidden one, nor its name."""
        if nodeid >= FSD_DIR or (nodeid == ROOT_ID and name == FSD_NAME):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        self.access.check_writable()
        return self._table.get(nodeid)

    def create(
        self, who: Caller, nodeid: int, name: bytes, mode: int, flags: int, *, kill: bool = False
    ) -> tuple[Entry, int]:
        """CREATE; with O_TRUNC, ``kill`` suid and sgid bits of an existing file."""
        if self.access.is_replayer(who):
            self.files.check_replayed()
            entry = self._replay_create(nodeid, name, stat.S_IFREG, opens=True)
            return entry, self.files.replayed_open(who, entry.inode)
        self.handles.check_room()
        node = self._names(nodeid, name)
        try:
            again = self.guest.history.changes(who, (node, name))
        except OSError:
            self._fs.successors.sent_back(node, name)
            raise
        opened = opening(flags)
        child = node.children.get(name)
        events: Events = (
            (node, name, _NEW_TRUNC if flags & os.O_TRUNC else _NEW),
            (child, b"", opened),
        )
        # An ordinary user acts without CAP_FSETID here anyway.
        kill = kill and not who.uid
        open_file = partial(self.slow.open_file, events, kill)
        suid = credentials.killing_suid() if kill else nullcontext()
        with self.access.own(*events), suid, self.guest.history.coming(who, again):
            entry, handle = self._fs.create(node, name, mode, flags, who, open_file)
        return entry, self.handles.add(handle, who)

    def tmpfile(self, who: Caller, nodeid: int, mode: int, flags: int) -> tuple[Entry, int]:
        """TMPFILE."""
        self.handles.check_room()
        self.access.refuse_replayer(who, "tmpfile")
        self.access.check_writable()
        node = self._node(nodeid)
        with self.access.own((node, None, Mask.OPEN)):
            entry, handle = self._fs.tmpfile(node, mode, flags, who)
        return entry, self.handles.add(handle, who)

    def readlink(self, nodeid: int) -> bytes:
        """READLINK."""
        return self._fs.readlink(self._node(nodeid))

    def _node(self, nodeid: int) -> Inode:
        if nodeid >= FSD_DIR:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return self._table.get(nodeid)

    # Attributes

    def getattr(self, who: Caller, nodeid: int) -> tuple[Inode, StatLike]:
        """GETATTR."""
        if nodeid >= FSD_DIR:
            return self.hidden.getattr(nodeid)
        inode = self._table.get(nodeid)
        if self.access.is_replayer(who):
            return inode, self.guest.ledger.getattr(inode)
        self.guest.history.asks(who, inode)
        if inode.is_placeholder:
            return inode, self.guest.ledger.attributes(inode)
        # A mark may be set through a descriptor, without a look-up.
        self.access.looked_up(who, inode)
        try:
            return inode, self.access.wherever(inode, partial(self._fs.getattr_by_path, inode))
        except FileNotFoundError:  # a removed directory in which a program works
            return inode, placeholder_attr(inode, nlink=0)
        except OSError as error:
            if error.errno == errno.ESTALE:
                self._fs.successors.replaced(inode)
            raise self.guest.history.as_program_error(who, error) from None

    def born_ns(self, who: Caller, nodeid: int) -> int:
        """STATX: time of creation; 0 if it is not known."""
        if nodeid >= FSD_DIR or self.access.is_replayer(who):
            return 0
        try:
            return self._fs.born_ns(self._table.get(nodeid))
        except OSError:  # gone
            return 0

    def setattr(
        self, who: Caller, nodeid: int, changes: Changes, fh: int | None
    ) -> tuple[Inode, StatLike]:
        """SETATTR."""
        if nodeid >= FSD_DIR:
            return self.hidden.getattr(nodeid)
        inode = self._table.get(nodeid)
        if self.access.is_replayer(who):
            try:
                return inode, self.guest.ledger.setattr(nodeid)
            except UnexpectedCall as error:
                raise self.access.refused(error) from None
        self.access.check_writable()
        handle = self.handles.known(fh) if fh is not None else None
        events = self.access.about(inode, changes.events)

        def run(change: Change, fd: int, is_open: bool) -> os.stat_result:
            # A program may have a lease on a file that is not open, and truncating a long file
            # takes long.
            size = changes.size
            if size is None or (is_open and os.fstat(fd).st_size - size <= LONG):
                return change(fd)
            status: os.stat_result = self.slow.slowly("setattr", change, fd, expected=events)
            return status

        with self.access.own(*events):
            return inode, self._fs.setattr(
                inode, changes, handle if isinstance(handle, Handle) else None, run
            )

    def getxattr(self, who: Caller, nodeid: int, name: bytes) -> bytes:
        """GETXATTR; the replayer's calls have no privileges to kill."""
        if nodeid >= FSD_DIR or (self.access.is_replayer(who) and name == b"security.capability"):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        xattrs.check(name, acls=self.acls)
        try:
            return self._fs.getxattr(self._table.get(nodeid), name)
        except FileNotFoundError:  # a removed directory: the kernel asks for its ACL at each use
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None

    def listxattr(self, nodeid: int) -> list[bytes]:
        """LISTXATTR."""
        if nodeid >= FSD_DIR:
            return []
        return xattrs.listed(self._fs.listxattr(self._table.get(nodeid)), acls=self.acls)

    def setxattr(self, who: Caller, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        """SETXATTR."""
        self.access.refuse_replayer(who, "setxattr")
        inode = self._node(nodeid)
        xattrs.check(name, acls=self.acls)
        self.access.check_writable()
        with self.access.own(*self.access.about(inode, Mask.ATTRIB)), writing(who.uid, kill=False):
            self._fs.setxattr(inode, name, value, flags)

    def removexattr(self, who: Caller, nodeid: int, name: bytes) -> None:
        """REMOVEXATTR."""
        self.access.refuse_replayer(who, "removexattr")
        inode = self._node(nodeid)
        xattrs.check(name, acls=self.acls)
        self.access.check_writable()
        with self.access.own(*self.access.about(inode, Mask.ATTRIB)):
            self._fs.removexattr(inode, name)

    def may_access(self, nodeid: int, mode: int) -> bool:
        """ACCESS; sent only if the kernel does not check permissions itself."""
        return True if nodeid >= FSD_DIR else self._fs.access(self._table.get(nodeid), mode)

    def statfs(self, nodeid: int) -> os.statvfs_result:
        """STATFS of the file system that a node is on; of the share's if the node is gone."""
        inode = self._table.root if nodeid >= FSD_DIR else self._table.get(nodeid)
        return self._fs.statfs(self._table.root if inode.is_placeholder else inode)
