"""A table of records in memory that outlives the process: a memfd that a descriptor store also
holds.

It is current at every moment, so also after SIGKILL. Format, version 1, little-endian, only in the
memory of this machine:

    file:   {u64 magic and version, u64 where the records begin} records
    record: {u32 size, u32 crc32 of all behind it, u32 kind, u32 0, u64 id, value} count, padding

``count`` is an aligned i64 behind the value, the only part that changes in place; 0 = removed. Of
two records with one key the later one is valid. The first incomplete record is the end: the process
was killed while writing it.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from ..linux import syscalls

_FILE = struct.Struct("<QQ")
_HEAD = struct.Struct("<IIIIQ")
_COUNT = struct.Struct("<q")
_LEAST = _HEAD.size + 8 + _COUNT.size
_MAGIC = int.from_bytes(b"fsdjrn\0\1", "big")
_BASES = (4096, 1 << 40)
"""Where the records begin, alternately: the file is sparse."""
_PUNCH_HOLE = 0x3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
COMPACT_FROM = 1 << 20
"""Bytes of records below which dropping the removed ones is not worthwhile."""

Key = tuple[int, int]
"""Kind and number of a record."""


class JournalError(ValueError):
    """The bytes are not a journal of this version."""


@dataclass(frozen=True, slots=True)
class Record:
    """The value and count of a key."""

    value: bytes
    count: int


class _Place(NamedTuple):
    offset: int
    size: int

    @property
    def count_at(self) -> int:
        return self.offset + self.size - _COUNT.size


class Journal:
    """Owns its descriptor."""

    def __init__(self, fd: int = -1) -> None:
        """A new journal, or that of an earlier process. Raises JournalError, OSError."""
        self.records: dict[Key, Record] = {}
        """The records at the start, in the order of writing."""
        self._places: dict[Key, _Place] = {}
        self._live = 0
        self.fd = fd
        if fd < 0:
            self.fd = os.memfd_create("fsd-journal", os.MFD_CLOEXEC)
            self._base = self._end = _BASES[0]
            os.pwrite(self.fd, _FILE.pack(_MAGIC, self._base), 0)
        else:
            self._load()

    def close(self) -> None:
        """Close the descriptor; the memory continues to exist if a store holds it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _load(self) -> None:
        head = os.pread(self.fd, _FILE.size, 0)
        if len(head) < _FILE.size or _FILE.unpack(head)[0] != _MAGIC:
            raise JournalError("not a journal of this version")
        base = _FILE.unpack(head)[1]
        if base not in _BASES:
            raise JournalError(f"records at {base:#x}")
        self._base = self._end = base
        size = os.fstat(self.fd).st_size
        while self._load_record(size):
            pass
        os.ftruncate(self.fd, max(self._end, _BASES[0]))

    def _load_record(self, size: int) -> bool:
        raw = os.pread(self.fd, _HEAD.size, self._end)
        if len(raw) < _HEAD.size:
            return False
        length, check, kind, _, number = _HEAD.unpack(raw)
        if length < _LEAST or self._end + length > size:
            return False
        place = _Place(self._end, length)
        body = raw[8:] + os.pread(self.fd, length - _LEAST + 8, self._end + _HEAD.size)
        (count,) = _COUNT.unpack(os.pread(self.fd, _COUNT.size, place.count_at))
        if zlib.crc32(body) != check or not 0 < body[-1] <= 8:
            return False
        key = (kind, number)
        self._end += length
        self._place(key, place)
        self.records.pop(key, None)
        if count:
            self.records[key] = Record(body[_HEAD.size - 8 : -body[-1]], count)
        else:
            self._forget(key)
        return True

    def _place(self, key: Key, place: _Place) -> None:
        self._forget(key)
        self._places[key] = place
        self._live += place.size

    def _forget(self, key: Key) -> _Place | None:
        place = self._places.pop(key, None)
        if place is not None:
            self._live -= place.size
        return place

    def put(self, kind: int, number: int, value: bytes, count: int = 1) -> None:
        """Write a record, replacing the one with that key."""
        if self._end - self._base > COMPACT_FROM and self._live * 2 < self._end - self._base:
            self._compact()
        self._put((kind, number), value, count)

    def _put(self, key: Key, value: bytes, count: int) -> None:
        padding = 8 - len(value) % 8  # at least one byte, which holds their number
        value += bytes(padding - 1) + bytes([padding])
        size = _HEAD.size + len(value) + _COUNT.size
        body = _HEAD.pack(0, 0, key[0], 0, key[1])[8:] + value
        head = struct.pack("<II", size, zlib.crc32(body))
        old = self._places.get(key)
        os.pwrite(self.fd, head + body + _COUNT.pack(count), self._end)
        if old is not None:
            os.pwrite(self.fd, _COUNT.pack(0), old.count_at)
        self._place(key, _Place(self._end, size))
        self._end += size

    def count(self, kind: int, number: int, count: int) -> None:
        """Change a record's count; 0 removes it."""
        key = (kind, number)
        place = self._places.get(key) if count else self._forget(key)
        if place is not None:
            os.pwrite(self.fd, _COUNT.pack(count), place.count_at)

    def remove(self, kind: int, number: int) -> None:
        """Remove a record, if there is one."""
        self.count(kind, number, 0)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def clear(self) -> None:
        """Remove all records."""
        self.records.clear()
        self._places.clear()
        self._live = 0
        self._rewrite([])

    def _compact(self) -> None:
        kept = []
        for key, place in self._places.items():
            raw = os.pread(self.fd, place.size, place.offset)
            (count,) = _COUNT.unpack(raw[-_COUNT.size :])
            body = raw[_HEAD.size : -_COUNT.size]
            kept.append((key, body[: -body[-1]], count))
        self._rewrite(kept)

    def _rewrite(self, records: list[tuple[Key, bytes, int]]) -> None:
        """Write these records elsewhere in the file; that part becomes valid once it is
        complete.
        """
        old, end = self._base, self._end
        self._base = self._end = _BASES[1 - _BASES.index(old)]
        self._places.clear()
        self._live = 0
        for record in records:
            self._put(*record)
        os.pwrite(self.fd, _FILE.pack(_MAGIC, self._base), 0)
        if old > self._base:
            os.ftruncate(self.fd, self._end)
        elif end > old:
            syscalls.fallocate(self.fd, _PUNCH_HOLE, old, end - old)
