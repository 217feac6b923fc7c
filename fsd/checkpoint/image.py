"""A server's image: the rows of ``take`` as bytes in the envelope of protocol.images.

Apart because only this module needs protobuf. server.proto describes the body.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from protocol import frames, images
from protocol.images import ImageError

from ..files.saved import SavedForgotten, SavedInode, SavedLink, SavedTable
from .rows import GuestKind, SavedEvent, SavedExport, SavedGuest, SavedMissed, SavedName
from .server_pb2 import Guest, Server

KIND = "server"
VERSION = 1
_Row = TypeVar("_Row", bound=NamedTuple)


def encode(saved: SavedExport) -> bytes:
    """The image. Raises ValueError for a number that does not fit its field."""
    body = Server(
        source=os.fsencode(saved.source),
        root_ino=saved.root_ino,
        root_handle=saved.root_handle,
        file_system=saved.file_system,
        saved_ns=saved.saved_ns,
        listed=saved.listed,
    )
    _put(body.inodes, saved.table.inodes)
    _put(body.links, saved.table.links)
    _put(body.forgotten, saved.table.forgotten)
    _put(body.watches, saved.watches)
    _put(body.names, saved.names)
    for guest in saved.guests:
        _put_guest(body.guests.add(), guest)
    return images.pack(KIND, VERSION, body.SerializeToString())


def decode(data: bytes) -> SavedExport:
    """The rows of an image; their meaning is not checked here. Raises ImageError."""
    body = Server()
    try:
        body.ParseFromString(images.unpack(data, KIND, VERSION))
        return SavedExport(
            os.fsdecode(body.source),
            body.root_ino,
            body.root_handle,
            body.file_system,
            body.saved_ns,
            SavedTable(
                _rows(SavedInode, body.inodes),
                _rows(SavedLink, body.links),
                _rows(SavedForgotten, body.forgotten),
            ),
            list(_columns(body.watches)),
            list(body.listed),
            _rows(SavedName, body.names),
            [_guest(guest) for guest in body.guests],
        )
    except ImageError:
        raise
    except (DecodeError, ValueError) as error:
        raise ImageError(f"the image is inconsistent: {error}") from None


# Rows and columns


def _put(message: Message, rows: Sequence[tuple[Any, ...]]) -> None:
    """Fill the fields of a message, in order, with the columns of the rows."""
    if rows:
        fields = message.DESCRIPTOR.fields
        for field, column in zip(fields, zip(*rows, strict=True), strict=False):
            getattr(message, field.name).extend(column)


def _columns(message: Message) -> Iterator[tuple[Any, ...]]:
    """The rows that ``_put`` was given. Raises ValueError if the columns differ in length."""
    return zip(*(getattr(message, f.name) for f in message.DESCRIPTOR.fields), strict=True)


def _rows(row: type[_Row], message: Message) -> list[_Row]:
    return list(map(row._make, _columns(message)))


# Guests


def _put_guest(message: Guest, guest: SavedGuest) -> None:
    message.kind = guest.kind
    message.name = os.fsencode(guest.name)
    message.token = guest.token
    message.events = guest.events
    message.sent = guest.sent
    _put(message.marks, guest.marks)
    _put(message.outbox, guest.outbox)
    _put(message.held, guest.held)
    _put(message.nodes, list(guest.nodes.items()))
    missed = message.missed
    _put(missed, [(*row[:3], row.before is not None) for row in guest.missed])
    _put(missed.before, [row.before for row in guest.missed if row.before is not None])


def _guest(message: Guest) -> SavedGuest:
    missed = message.missed
    before = iter(_rows(SavedName, missed.before))
    return SavedGuest(
        GuestKind(message.kind),
        os.fsdecode(message.name),
        message.token,
        message.events,
        message.sent,
        list(_columns(message.marks)),
        _rows(frames.Event, message.outbox),
        _rows(SavedEvent, message.held),
        list(_missed(missed.directory, missed.name, missed.mask, missed.was_known, before)),
        dict(_columns(message.nodes)),
    )


def _missed(
    directories: Iterable[int],
    names: Iterable[bytes],
    masks: Iterable[int],
    known: Iterable[bool],
    before: Iterator[SavedName],
) -> Iterator[SavedMissed]:
    for directory, name, mask, was_known in zip(directories, names, masks, known, strict=True):
        found = next(before, None) if was_known else None
        yield SavedMissed(directory, name, mask, found)
