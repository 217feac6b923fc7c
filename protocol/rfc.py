"""The two wire layouts of the kernel RFC "Inotify support in FUSE and virtiofs" (2021).

fsd does not speak them; they are codecs with test vectors, for peers and for comparison.

v1 was posted. Request: {u64 mask; u64 group; u32 action; u32 padding}, with the inode in the FUSE
header; notification: {u64 inode; u64 mask; u32 namelen; u32 cookie; name}.

v2 was never posted. Request: {u64 mask}, aggregated, 0 = remove; notification: {u64 inode;
u64 parent; u64 mask; u32 namelen; u32 generation; u8 notify_parent; u8 padding[7]; name}.

The name is not NUL-terminated here; namelen counts exactly its bytes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .frames import ProtocolError

_REQUEST_V1 = struct.Struct("<QQII")
_EVENT_V1 = struct.Struct("<QQII")
_REQUEST_V2 = struct.Struct("<Q")
_EVENT_V2 = struct.Struct("<QQQIIB7x")

ACTION_REMOVE = 0
ACTION_ADD = 1


class RequestV1(NamedTuple):
    """struct fuse_notify_fsnotify_in as posted."""

    mask: int
    group: int
    action: int


class EventV1(NamedTuple):
    """struct fuse_notify_fsnotify_out as posted."""

    inode: int
    mask: int
    cookie: int
    name: bytes


class RequestV2(NamedTuple):
    """The aggregated mask alone."""

    mask: int


class EventV2(NamedTuple):
    """A notification with its parent and generation."""

    inode: int
    parent: int
    mask: int
    generation: int
    notify_parent: bool
    name: bytes


def _pack(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ProtocolError(str(error)) from None


def _fixed(layout: struct.Struct, data: bytes, what: str) -> tuple[int, ...]:
    if len(data) < layout.size:
        raise ProtocolError(f"{what}: {len(data)} bytes, needs {layout.size}")
    return layout.unpack_from(data)


def _name(layout: struct.Struct, data: bytes, length: int, what: str) -> bytes:
    name = data[layout.size :]
    if len(name) != length:
        raise ProtocolError(f"{what}: name of {len(name)} bytes, namelen {length}")
    return name


def encode_request_v1(request: RequestV1) -> bytes:
    """Bytes of a v1 request."""
    return _pack(_REQUEST_V1, *request, 0)


def decode_request_v1(data: bytes) -> RequestV1:
    """Raises ProtocolError on a wrong size or an unknown action."""
    mask, group, action, _padding = _fixed(_REQUEST_V1, data, "v1 request")
    if len(data) != _REQUEST_V1.size or action not in (ACTION_REMOVE, ACTION_ADD):
        raise ProtocolError(f"v1 request: {len(data)} bytes, action {action}")
    return RequestV1(mask, group, action)


def encode_event_v1(event: EventV1) -> bytes:
    """Bytes of a v1 notification."""
    return _pack(_EVENT_V1, event.inode, event.mask, len(event.name), event.cookie) + event.name


def decode_event_v1(data: bytes) -> EventV1:
    """Raises ProtocolError if namelen and size disagree."""
    inode, mask, length, cookie = _fixed(_EVENT_V1, data, "v1 event")
    return EventV1(inode, mask, cookie, _name(_EVENT_V1, data, length, "v1 event"))


def encode_request_v2(request: RequestV2) -> bytes:
    """Bytes of a v2 request."""
    return _pack(_REQUEST_V2, request.mask)


def decode_request_v2(data: bytes) -> RequestV2:
    """Raises ProtocolError on a wrong size."""
    if len(data) != _REQUEST_V2.size:
        raise ProtocolError(f"v2 request: {len(data)} bytes, needs {_REQUEST_V2.size}")
    return RequestV2(*_REQUEST_V2.unpack(data))


def encode_event_v2(event: EventV2) -> bytes:
    """Bytes of a v2 notification."""
    inode, parent, mask, generation, notify_parent, name = event
    fixed = _pack(_EVENT_V2, inode, parent, mask, len(name), generation, notify_parent)
    return fixed + name


def decode_event_v2(data: bytes) -> EventV2:
    """Raises ProtocolError if namelen and size disagree, or if notify_parent is not 0 or 1."""
    inode, parent, mask, length, generation, notify = _fixed(_EVENT_V2, data, "v2 event")
    if notify not in (0, 1):
        raise ProtocolError(f"v2 event: notify_parent {notify}")
    name = _name(_EVENT_V2, data, length, "v2 event")
    return EventV2(inode, parent, mask, generation, bool(notify), name)
