"""The FUSE session of one guest: raw requests in, raw replies out. Transports move the bytes.

Serves a virtiofs device's queues or a /dev/fuse descriptor alike. It calls the operations, as
transports/libfuse.py does for pyfuse3. Most requests are answered within the call; those that have
to wait (locks, the channel's long poll, fsync) are answered later through the transport's ``Loop``.

The guest is not trusted: nothing that it sends raises out of ``serve``. All ways from a
request to its one reply are in this module, which is why it is long.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from threading import Thread

import structlog

from protocol import fuse
from protocol.fuse import Init, Opcode

from ..cache.coherent import KEPT_DIRECTORIES_LIMIT, CoherentCache
from ..cache.notifier import Notifier
from ..files.inode import Inode
from ..files.slowcalls import Later, Outcome, SlowCall, Work
from ..guests.history import Undelivered
from .access import Events
from .backing import STACK_DEPTH, Backing
from .leaving import give_back
from .locks import Locks
from .names import Names
from .nodes import NODES_LIMIT, Caching, Nodes
from .openfiles import Files
from .operations import Operations
from .pending import Loop, Waiting
from .record import Agreed, SessionRecord
from .request import MAX_WRITE, Buffers, Request, copy_in, copy_out, size_of

log = structlog.get_logger()
MAX_PAGES = 256
_MAX_BACKGROUND = 64
"""Background requests that the kernel may have under way, beyond those that a process waits for."""
_ALWAYS = (
    Init.ASYNC_READ | Init.ATOMIC_O_TRUNC | Init.EXPORT_SUPPORT | Init.BIG_WRITES
    | Init.DONT_MASK | Init.HAS_IOCTL_DIR | Init.AUTO_INVAL_DATA | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS | Init.ABORT_ERROR
    | Init.MAX_PAGES | Init.CACHE_SYMLINKS | Init.HANDLE_KILLPRIV_V2 | Init.SETXATTR_EXT
    | Init.INIT_EXT | Init.CREATE_SUPP_GROUP | Init.DIRECT_IO_ALLOW_MMAP
)  # fmt: skip
_FORGETS = (Opcode.FORGET, Opcode.BATCH_FORGET)
_WITHOUT_NODE = frozenset({
    *_FORGETS, Opcode.INIT, Opcode.DESTROY, Opcode.INTERRUPT, Opcode.RELEASE, Opcode.RELEASEDIR,
    Opcode.SYNCFS,
})  # fmt: skip
"""Requests that name no node, or only a handle."""
_ONCE = frozenset({
    Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME,
    Opcode.LINK, Opcode.REMOVEXATTR, Opcode.CREATE, Opcode.RENAME2, Opcode.TMPFILE, Opcode.IOCTL,
    Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64,
})  # fmt: skip
"""Requests that have another effect the second time (docs/decisions/restart.md)."""
FORGETS_LIMIT = 1 << 22
"""Bytes of BATCH_FORGET that are still to be done, of one guest over virtiofs; Linux sends none
there. Through /dev/fuse they come from this machine's kernel, and are done at once."""
CACHE_SHARE = 4
"""The part of the server's host watches, one of so many, that a kernel's cache may have besides."""
_NAME_AT: dict[int, int] = {Opcode.LOOKUP: 0, Opcode.CREATE: fuse.CREATE_IN.size}
"""Requests that open an existing object by a name, and the name's offset in their body."""
_LOOKUP, _INIT = int(Opcode.LOOKUP), int(Opcode.INIT)
_DOTS = (b".\0", b"..\0")
"""Names that LOOKUP asks for in the node of a file handle (fs/fuse/inode.c, fuse_get_dentry)."""


@dataclass(frozen=True)
class SessionOptions:
    """What a guest is offered."""

    caching: Caching = field(default_factory=Caching)
    posix_acl: bool = False
    """The guest's kernel enforces ACLs; the export's file system should have them."""
    is_judged: bool = True
    """The guest's kernel checks permissions; else the host does, for the one user of the mount."""
    xattr: bool = True
    locks: bool = True
    """Locks are the host's, seen by all; else local to each guest."""
    submounts: bool = False
    """Show the guest where another file system of the host begins."""
    readdirplus: bool = True
    """Listings come with attributes, if the guest may cache those."""
    direct_io: bool = False
    """O_DIRECT applies on the host, too: the host caches no data of such a file either."""
    is_local: bool = False
    """The guest's processes run on this machine: /proc has their groups."""
    notify: Callable[[bytes], None] | None = None
    """Sends an unsolicited message; None if that is impossible, as with virtiofs."""
    notifier: Notifier | None = None
    """The same for what may wait: with it, the kernel keeps what can be taken back."""
    device: int = -1
    """The descriptor of /dev/fuse, if the kernel may move file data itself."""
    nodes_limit: int = NODES_LIMIT
    kept: SessionRecord | None = None
    """Records this session for the next process, and holds the record of an earlier one."""


class FuseSession:
    """One guest's requests on the operations. Call ``close`` at the end."""

    def __init__(
        self, operations: Operations, loop: Loop, options: SessionOptions | None = None
    ) -> None:
        self._operations = operations
        self._guest = operations.guest.name  # for the log
        self._loop = loop
        self._era = 0  # how often everything was returned
        self._forgetting = 0  # bytes of BATCH_FORGET that are not done
        self._options = options or SessionOptions()
        caching, submounts = self._options.caching, self._options.submounts
        limit = self._options.nodes_limit
        self._kept = self._options.kept
        operations.handles.keep(self._kept)
        operations.slow.use_threads(self._close_slowly)
        notify = self._options.notify
        take_back = None if notify is None else partial(_take_back, notify)
        operations.guest.history.serve(take_back)
        if take_back is not None:
            operations.export.watcher.report_changes(take_back)
        self._loop = loop
        self._mounts = operations.export.table.mounts
        self._closing: list[int] | None = None  # descriptors, while all are closed
        self.cache = self._make_cache()
        operations.access.cache = self.cache
        self.nodes = Nodes(
            operations,
            caching,
            submounts=submounts,
            limit=limit,
            is_local=self._options.is_local,
            takes_back=notify is not None,
            kept=self._kept,
            cache=self.cache,
        )
        self._names = Names(operations, self.nodes, xattr=self._options.xattr)
        self._waiting = Waiting()
        direct_io, device = self._options.direct_io, self._options.device
        self.backing = None if device < 0 else Backing(operations, device, loop.later)
        operations.guest.passthrough = self.backing
        self._files = Files(
            operations, self.nodes, loop, self._waiting, caching, notify=notify,
            direct_io=direct_io, cache=self.cache, backing=self.backing,
        )  # fmt: skip
        self._handlers: dict[int, Callable[[Request], bytes | None]] = {
            **self._names.handlers,
            **self._files.handlers,
            **(Locks(operations, loop, self._waiting).handlers if self._options.locks else {}),
            Opcode.INIT: self._init,
            Opcode.DESTROY: self._destroy,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.INTERRUPT: self._interrupt,
        }
        self._minor = 0  # as negotiated; 0 before INIT
        self._groups: tuple[int, ...] | None = ()

    def _make_cache(self) -> CoherentCache | None:
        notifier, notify = self._options.notifier, self._options.notify
        if notifier is None or notify is None:
            return None
        export = self._operations.export
        limit = KEPT_DIRECTORIES_LIMIT
        if export.watch_limit is not None:
            limit = min(limit, max(export.watch_limit // CACHE_SHARE, 1))
        try:
            return CoherentCache(
                export.table, notifier, notify, self._loop.later,
                lambda nodeid: self.nodes.is_watched_node(nodeid), limit=limit,
            )  # fmt: skip
        except OSError as error:
            log.warning("caches are off: the host gives no inotify instance", error=error.strerror)
            return None

    def serve(self, readable: Buffers, writable: Buffers, done: Callable[[int], None]) -> None:
        """One request: its message in ``readable``, its reply into ``writable``.

        ``done`` is called once, now or later, with the number of bytes written; 0 = no reply. If it
        raises OSError, the guest did not get the reply. Never raises.
        """
        try:
            request = Request(readable, writable, done, self._groups)
        except fuse.DecodeError as error:
            log.warning("bad request from guest", guest=self._guest, error=str(error))
            _refuse(readable, writable, done)
            return
        self._try(request)

    def _try(self, request: Request) -> None:
        try:
            self._serve(request)
        except Later as later:
            self._serve_later(request, later.call)
        except Undelivered as undelivered:
            self._waiting.until(undelivered.wait, request, self._loop, self._try)
        except OSError as error:
            request.fail(error.errno or errno.EIO)
        except fuse.DecodeError as error:
            log.warning(
                "bad request from guest",
                guest=self._guest,
                opcode=request.opcode,
                error=str(error),
            )
            request.fail(errno.EINVAL)
        except (OverflowError, ValueError):  # a number that no system call takes
            request.fail(errno.EINVAL)
        except Exception:
            log.exception("request failed", guest=self._guest, opcode=request.opcode)
            request.fail(errno.EIO)

    def _serve_later(self, request: Request, call: SlowCall) -> None:
        """A thread makes the call, then the request is served again; other requests run
        meanwhile.
        """
        outcome, operations = Outcome(call), self._operations
        try:
            self._waiting.check(request)
        except OSError as error:
            outcome.drop()
            request.fail(error.errno or errno.EIO)
            return
        outcomes = operations.slow.outcomes
        end = operations.export.watcher.expect(operations.guest, call.expected)

        def fail() -> None:
            if self._waiting.end(request):
                request.fail(errno.EIO)

        def done(error: BaseException | None) -> None:
            end()
            if not self._waiting.end(request) or error is not None:
                outcome.drop()
                return
            operations.slow.outcomes = made = {**outcomes, call.what: outcome}
            if self.cache is not None:
                self.cache.is_late = True
            try:
                self._try(request)
            finally:
                operations.slow.outcomes = {}
                if self.cache is not None:
                    self.cache.is_late = False
                if not self._waiting.waits(request):
                    for each in made.values():
                        each.drop()

        cancel = _nothing if call.patience is None else self._loop.later(call.patience, fail)
        self._waiting.add(request, cancel, interruptible=False)
        self._loop.in_thread(outcome, done)

    def _close_slowly(self, fd: int, expected: Events) -> None:
        """Closing a descriptor may take long, so a thread does it. At the end of the session, one
        does for all.
        """
        if self._closing is not None:
            self._closing.append(fd)
            return
        outcome = Outcome(SlowCall("close", Work.closing(fd), mount=-1))
        end = self._operations.export.watcher.expect(self._operations.guest, expected)

        def done(_error: BaseException | None) -> None:
            end()
            outcome.drop()

        self._loop.in_thread(outcome, done)

    def _serve(self, request: Request) -> None:
        opcode = request.opcode
        if not self._minor and opcode != _INIT:
            raise OSError(errno.EIO, "no INIT yet")
        handler = self._handlers.get(opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, f"opcode {opcode}")
        if opcode == _LOOKUP and request.body in _DOTS:
            self.nodes.check_handle(request.nodeid)
        elif opcode not in _WITHOUT_NODE:
            self.nodes.check(request.nodeid)
        if self._mounts.remote:
            is_name = opcode in _NAME_AT
            body = request.body[_NAME_AT.get(opcode, 0) :]
            self._operations.files.reach(request.nodeid, body, is_name=is_name)
        payload = handler(request)
        if payload is not None:
            request.reply(payload)

    def serve_again(
        self, readable: Buffers, writable: Buffers, done: Callable[[int], None], *, safe: bool
    ) -> None:
        """As ``serve``, for a request that an earlier session may have carried out, but not
        answered: it is done again if that has the same effect, and else fails with EIO. Not
        ``safe``: it fails.
        """
        try:
            request = Request(readable, writable, done, self._groups)
        except fuse.DecodeError:
            _refuse(readable, writable, done)
            return
        if request.opcode in _FORGETS:
            request.drop()
        elif not safe or request.opcode in _ONCE or self._changes_more(request):
            log.warning(
                "a request may have been carried out in part",
                guest=self._guest,
                opcode=request.opcode,
            )
            request.fail(errno.EIO)
        else:
            self.serve(readable, writable, done)

    @staticmethod
    def _changes_more(request: Request) -> bool:
        """Whether its arguments give it another effect the second time."""
        try:
            if request.opcode == Opcode.SETXATTR:  # XATTR_CREATE, XATTR_REPLACE
                return bool(int.from_bytes(request.body[4:8], "little"))
            if request.opcode == Opcode.FALLOCATE:  # FALLOC_FL_COLLAPSE_RANGE, _INSERT_RANGE
                return bool(fuse.FALLOCATE_IN.unpack(request.body).mode & 0x28)
            if request.opcode == Opcode.WRITE:
                return fuse.WRITE_IN.unpack(request.body).appends
        except fuse.DecodeError:
            pass
        return False

    def suspend(self) -> None:
        """Answer nothing any more: waiting requests are sent again."""
        self._waiting.suspend()

    def end(self) -> None:
        """The process ends, and what the guest holds with it: answer what still waits. Nodes and
        marks stay as they are for the image. What is still to be closed slowly is left to the end
        of the process, as no thread can be begun any more.
        """
        self._minor = 0
        self._closing = self._closing or []
        self._waiting.close()
        if self.cache is not None:
            self._operations.access.cache = None
            self._operations.guest.serve((), keeps_names=False, cache=None)
            self.cache.close()
        if self.backing is not None:
            self.backing.close()

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """The guest has disconnected: answer waiting requests, drop everything that it held.
        ``then`` is called once that is done: if there is much, later.
        """
        self._minor = 0
        self._era += 1
        self._waiting.close()
        self._operations.export.drop_hand_marks(self._operations.guest)
        steps = chain(
            self._operations.handles.locks.closing(), self._files.closing(), self.nodes.closing()
        )
        closing = self._closing = self._closing or []

        def closed() -> None:
            self._closing = None
            if closing:
                Thread(target=_close_all, args=(closing,), daemon=True).start()
            then()

        give_back(steps, self._loop.soon, closed)
        if self._kept is not None:
            self._kept.clear()

    # The server before, and the one after this

    def resume(self, inodes: Mapping[int, Inode]) -> None:
        """Continue the session of a previous process. ``inodes`` maps its nodeids to our inodes.
        Raises ValueError if the saved state is inconsistent.
        """
        kept = self._kept
        if kept is None or kept.agreed is None:
            return
        self._agree(kept.agreed)
        self.nodes.restore({nodeid: count for nodeid, (_, count) in kept.nodes.items()}, inodes)
        self._files.resume(kept, inodes)
        self._operations.guest.pid = kept.agent
        kept.taken()

    def leave(self) -> None:
        """The session continues in another process: hand over open files."""
        if self._kept is not None:
            self._kept.leave(
                self._operations.handles.descriptors(), self._operations.handles.locks.descriptors()
            )

    # INIT and DESTROY

    def _init(self, request: Request) -> bytes:
        major, minor, readahead, flags = fuse.INIT_IN.unpack(request.body)
        if major > fuse.MAJOR:  # the kernel asks again with this server's version
            return fuse.INIT_OUT.pack(fuse.MAJOR, fuse.MINOR, *(0,) * 11)
        if major < fuse.MAJOR or minor < fuse.OLDEST_MINOR:
            log.error(
                "the guest's kernel is too old: Linux 5.4 is needed",
                guest=self._guest,
                version=f"{major}.{minor}",
                needed=f"{fuse.MAJOR}.{fuse.OLDEST_MINOR}",
            )
            raise OSError(errno.EPROTO, "version")
        if flags & Init.INIT_EXT:
            flags |= fuse.INIT_FLAGS2.unpack(request.body, fuse.INIT_IN.size) << 32
        self.close()  # a guest that boots again
        agreed = int(self._wanted() & flags)
        self._agree(Agreed(min(minor, fuse.MINOR), agreed))
        if self._kept is not None:
            self._kept.agree(Agreed(self._minor, agreed))
        log.debug("guest's kernel connected", version=f"{major}.{minor}", flags=Init(agreed).name)
        return fuse.INIT_OUT.pack(
            fuse.MAJOR, self._minor, readahead, agreed & 0xFFFF_FFFF, _MAX_BACKGROUND,
            _MAX_BACKGROUND * 3 // 4, MAX_WRITE, 1, MAX_PAGES, 0, agreed >> 32,
            STACK_DEPTH if agreed & Init.PASSTHROUGH else 0, 0,
        )  # fmt: skip

    def _agree(self, agreed: Agreed) -> None:
        self._minor, flags = agreed
        supp_group = flags & Init.CREATE_SUPP_GROUP
        self._groups = None if self._options.is_local and not supp_group else ()
        self._names.long_setxattr = bool(flags & Init.SETXATTR_EXT)
        self._operations.acls = bool(flags & Init.POSIX_ACL) or not self._options.is_judged
        self._files.bypass.mixes = bool(flags & Init.DIRECT_IO_ALLOW_MMAP)
        if self.cache is not None:
            self.cache.has_epochs = self._minor >= fuse.EPOCH_MINOR
            if not flags & Init.HAS_EXPIRE_ONLY:
                self.cache.disabled = "the kernel is older than Linux 6.2"
        if self.backing is not None and not flags & Init.PASSTHROUGH:
            self.backing.disabled = self.backing.disabled or "the kernel cannot (Linux 6.9 can)"

    def _wanted(self) -> Init:
        options = self._options
        wanted = _ALWAYS
        if self.cache is not None:
            wanted |= Init.HAS_EXPIRE_ONLY
        if self.backing is not None and not self.backing.disabled:
            wanted |= Init.PASSTHROUGH
        if options.readdirplus and (options.caching.keeps_attributes or self.cache is not None):
            wanted |= Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO
        if options.locks:
            wanted |= Init.POSIX_LOCKS | Init.FLOCK_LOCKS
        if options.posix_acl:
            wanted |= Init.POSIX_ACL
        if options.submounts:
            wanted |= Init.SUBMOUNTS
        return wanted

    def _destroy(self, request: Request) -> bytes:
        self.close()
        return b""

    # FORGET and INTERRUPT

    def _forget(self, request: Request) -> None:
        self.nodes.forget(request.nodeid, fuse.FORGET_IN.unpack(request.body))
        request.drop()

    def _batch_forget(self, request: Request) -> None:
        forgets, size, era = fuse.forgets(request.body), len(request.body), self._era
        if self._options.notify is not None:
            for nodeid, count in forgets:
                self.nodes.forget(nodeid, count)
        else:
            if self._forgetting + size > FORGETS_LIMIT:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._forgetting += size

            def done() -> None:
                self._forgetting -= size

            steps = (partial(self.nodes.forget, *one) for one in forgets if self._era == era)
            give_back(steps, self._loop.soon, done)
        request.drop()

    def _interrupt(self, request: Request) -> None:
        self._waiting.interrupt(fuse.INTERRUPT_IN.unpack(request.body))
        request.drop()


def _take_back(notify: Callable[[bytes], None], inode: Inode) -> None:
    """FUSE_NOTIFY_INVAL_INODE of the attributes only, which waits for no lock."""
    message = fuse.NOTIFY_INVAL_INODE_OUT.pack(inode.nodeid, -1, 0)
    size = fuse.OUT_HEADER.size + len(message)
    notify(fuse.OUT_HEADER.pack(size, fuse.NOTIFY_INVAL_INODE, 0) + message)


def _nothing() -> None:
    """Nothing ends with the wait."""


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _refuse(readable: Buffers, writable: Buffers, done: Callable[[int], None]) -> None:
    """Answer an invalid request: EINVAL if there is room for it, to the number that it may have."""
    size = fuse.OUT_HEADER.size
    if size_of(writable) < size:
        done(0)
        return
    begin = copy_out(readable, 0, 16)
    unique = int.from_bytes(begin[8:16], "little")
    copy_in(writable, fuse.OUT_HEADER.pack(size, -errno.EINVAL, unique))
    done(size)
