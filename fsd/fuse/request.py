"""One FUSE request in buffers of the guest, and its one reply.

Decoded parts are copied first, as the guest may change its memory at any time; file data stays in
place and is passed on as memoryviews.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from protocol import fuse

from ..files.caller import Caller

BODY_LIMIT = (1 << 20) + 4096
"""Bytes of a request without file data. A BATCH_FORGET fills the transport's buffer; the longest
other one, a value for an xattr, has 64 KiB."""
MAX_WRITE = 1 << 20
"""Bytes of file data in one request or reply: the kernel's own limit (256 pages), to which INIT
agrees. A guest may claim more, in overlapping buffers: GiB in one system call, for which all others
would wait."""
_IN_HEADER = fuse.IN_HEADER.size
_HEADER = fuse.OUT_HEADER.size
_WRITE, _WRITE_IN = int(fuse.Opcode.WRITE), fuse.WRITE_IN.size
_pack_header, _header_fields = fuse.OUT_HEADER.pack, fuse.IN_HEADER.fields

Buffers = Sequence[memoryview]


def size_of(buffers: Buffers) -> int:
    """Bytes of all the buffers."""
    return sum(map(len, buffers))


def part(buffers: Buffers, offset: int, size: int) -> list[memoryview]:
    """The buffers' bytes from ``offset``, at most ``size`` of them, in place."""
    if len(buffers) == 1:
        return [buffers[0][offset : offset + size]] if size and offset < len(buffers[0]) else []
    skipped = 0
    while skipped < len(buffers) and offset >= len(buffers[skipped]):
        offset -= len(buffers[skipped])
        skipped += 1
    views = list(buffers[skipped:])
    if offset and views:
        views[0] = views[0][offset:]
    surplus = size_of(views) - size
    while surplus > 0:
        last = views.pop()
        if len(last) > surplus:
            views.append(last[:-surplus])
        surplus -= len(last)
    return views


def copy_out(buffers: Buffers, offset: int, size: int) -> bytes:
    """The buffers' bytes from ``offset``, at most ``size`` of them, as a copy."""
    start = offset
    for buffer in buffers:  # usually it is in one: Linux keeps header and arguments apart
        if start < len(buffer):
            if start + size <= len(buffer):
                return bytes(buffer[start : start + size])
            break
        start -= len(buffer)
    return b"".join(part(buffers, offset, size))


def copy_in(buffers: Buffers, data: bytes) -> None:
    """Write ``data`` from the start of the buffers, which must be large enough."""
    if len(data) <= len(buffers[0]):
        buffers[0][: len(data)] = data
        return
    first = len(buffers[0])
    if len(data) <= first + len(buffers[1]):  # a header and a struct, as Linux has them
        buffers[0][:] = data[:first]
        buffers[1][: len(data) - first] = data[first:]
        return
    offset = 0
    for buffer in buffers:
        size = min(len(buffer), len(data) - offset)
        buffer[:size] = data[offset : offset + size]
        offset += size


class Request:
    """A request with its header decoded. Raises fuse.DecodeError if the header is invalid.

    Exactly one of ``reply``, ``reply_in_place``, ``fail`` and ``drop`` is called, once; later calls
    are ignored.
    """

    __slots__ = (
        "_done", "body", "nodeid", "on_lost", "opcode", "readable", "room", "unique", "who",
        "writable",
    )  # fmt: skip

    def __init__(
        self,
        readable: Buffers,
        writable: Buffers,
        done: Callable[[int], None],
        groups: tuple[int, ...] | None = (),
    ) -> None:
        """``groups``: the caller's, if the request names none."""
        self._done: Callable[[int], None] | None = done
        self.readable: Buffers = readable
        self.writable: Buffers = writable
        self.unique = 0
        room = (len(writable[0]) if len(writable) == 1 else size_of(writable)) - _HEADER
        self.room = room if room < MAX_WRITE else MAX_WRITE
        """Bytes that a reply can have after its header."""
        self.on_lost: Callable[[], None] | None = None
        """Called if the reply did not reach the guest, to take back what it would have got."""
        if readable and len(readable[0]) >= _IN_HEADER:  # each field is read once
            header = _header_fields(readable[0])
        else:
            header = fuse.IN_HEADER.unpack(copy_out(readable, 0, _IN_HEADER))
        length, self.opcode, self.unique, self.nodeid, uid, gid, pid, extensions = header
        if length < _IN_HEADER:
            raise fuse.DecodeError(f"request of {length} bytes")
        if self.opcode == _WRITE:
            self.body = copy_out(readable, _IN_HEADER, _WRITE_IN)
        else:
            length -= _IN_HEADER
            self.body = copy_out(readable, _IN_HEADER, min(length, BODY_LIMIT))
            if len(self.body) < length:
                raise fuse.DecodeError(f"{len(self.body)} bytes of {length}")
            if extensions:
                start = length - 8 * extensions
                if start < 0:
                    raise fuse.DecodeError(f"extensions of {8 * extensions} bytes in {length}")
                groups = fuse.supplementary_groups(self.body[start:])
                self.body = self.body[:start]
        self.who = Caller(uid, gid, pid, groups)

    def reply(self, payload: bytes) -> None:
        """Success. A payload that does not fit the guest's buffers becomes EIO."""
        if len(payload) > self.room:
            self._lost()
            self.fail(errno.EIO)
            return
        size = _HEADER + len(payload)
        if self._done is not None:
            copy_in(self.writable, _pack_header(size, 0, self.unique) + payload)
        self._finish(size)

    def reply_in_place(self, size: int) -> None:
        """Success, with ``size`` bytes that are already in ``writable``, after the header."""
        self._reply_header(_HEADER + size, 0)

    def fail(self, number: int) -> None:
        """Failure with an errno."""
        if not 0 < number < 512:  # others are the kernel's own, and it refuses them from us
            number = errno.EIO
        self._reply_header(_HEADER, -number)

    def _reply_header(self, size: int, error: int) -> None:
        if self.room < 0:
            self.drop()
            return
        if self._done is not None:
            copy_in(self.writable, _pack_header(size, error, self.unique))
        self._finish(size)

    def drop(self) -> None:
        """No reply: the kernel does not wait for one."""
        self._finish(0)

    def _finish(self, size: int) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        # Code that still holds the request, such as an error's traceback, then holds no memory of
        # the guest.
        self.readable = self.writable = ()
        try:
            done(size)
        except OSError:  # the kernel does not want it any more
            self._lost()

    def _lost(self) -> None:
        undo, self.on_lost = self.on_lost, None
        if undo is not None:
            undo()

    def data_out(self, size: int) -> list[memoryview]:
        """Buffers for file data of at most ``size`` bytes in the reply."""
        return part(self.writable, _HEADER, min(size, max(self.room, 0)))

    def data_in(self, size: int) -> list[memoryview]:
        """The file data of a WRITE. Raises fuse.DecodeError if there is less, OSError EINVAL if it
        is more than MAX_WRITE.
        """
        if size > MAX_WRITE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        views = part(self.readable, _IN_HEADER + _WRITE_IN, size)
        if (have := size_of(views)) != size:
            raise fuse.DecodeError(f"{have} bytes of data, not {size}")
        return views
