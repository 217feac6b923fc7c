"""The memory of a guest, mapped: addresses of the guest and of its VMM become memoryviews.

Apart because all checks of addresses from a guest are made here, and only here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from protocol.vhostuser import Region

from .mapping import map_memory

MAX_REGIONS = 64
"""Regions of one guest: more than front-ends use (QEMU's RAM slots), and still few mappings."""
MAPPED_LIMIT = 1 << 43
"""Bytes of address space for one guest: more than machines have, and 16 such guests fit."""
_TOP = 1 << 64


class GuestMemoryError(Exception):
    """An address outside the guest's memory, or memory that cannot be mapped."""


class MappedRegion:
    """A region and its bytes. They stay mapped as long as a view of them exists."""

    def __init__(self, region: Region, fd: int, on_lost: Callable[[], None] = lambda: None) -> None:
        """Maps ``region`` of ``fd``; the descriptor stays the caller's, ``on_lost`` is that of
        map_memory. Raises GuestMemoryError.
        """
        if not region.size or max(region.guest_addr, region.user_addr) + region.size > _TOP:
            raise GuestMemoryError(f"memory region of {region.size:#x} bytes at {region}")
        self.region = region
        self.end = end = region.mmap_offset + region.size
        try:
            if end > MAPPED_LIMIT:
                raise ValueError(f"{end:#x} bytes, limit {MAPPED_LIMIT:#x}")
            # From 0 on: an offset must be a multiple of the page size, of huge pages too.
            whole = map_memory(fd, end, on_lost)
        except (OSError, ValueError, OverflowError) as error:
            raise GuestMemoryError(f"memory region cannot be mapped: {error}") from None
        self.view = whole[region.mmap_offset : end]


class GuestMemory:
    """All regions of a guest; they do not overlap."""

    def __init__(self) -> None:
        self._regions: list[MappedRegion] = []
        self._starts: list[int] = []
        self._guest: list[tuple[int, int, memoryview]] = []  # first address, the one behind, bytes

    def __len__(self) -> int:
        return len(self._regions)

    def replace(self, regions: list[MappedRegion]) -> None:
        """SET_MEM_TABLE. Raises GuestMemoryError, and then changes nothing."""
        ordered = sorted(regions, key=lambda mapped: mapped.region.guest_addr)
        for before, after in pairwise(ordered):
            if before.region.guest_addr + before.region.size > after.region.guest_addr:
                raise GuestMemoryError(f"{before.region} and {after.region} overlap")
        if len(ordered) > MAX_REGIONS:
            raise GuestMemoryError(f"{len(ordered)} memory regions, limit {MAX_REGIONS}")
        if sum(mapped.end for mapped in ordered) > MAPPED_LIMIT:
            raise GuestMemoryError(f"memory regions of more than {MAPPED_LIMIT:#x} bytes")
        self._regions = ordered
        self._starts = [mapped.region.guest_addr for mapped in ordered]
        self._guest = [
            (start, start + len(mapped.view), mapped.view)
            for start, mapped in zip(self._starts, ordered, strict=True)
        ]

    def add(self, mapped: MappedRegion) -> None:
        """ADD_MEM_REG. Raises GuestMemoryError."""
        self.replace([*self._regions, mapped])

    def remove(self, region: Region) -> None:
        """REM_MEM_REG: by its addresses and its size. Raises GuestMemoryError if there is none."""
        kept = [mapped for mapped in self._regions if mapped.region[:3] != region[:3]]
        if len(kept) == len(self._regions):
            raise GuestMemoryError(f"no memory region {region}")
        self.replace(kept)

    def at_user(self, address: int, length: int) -> memoryview:
        """Bytes at an address of the VMM, in one region. Raises GuestMemoryError."""
        for mapped in self._regions:
            offset = address - mapped.region.user_addr
            if offset >= 0 and offset + length <= mapped.region.size:
                return mapped.view[offset : offset + length]
        raise GuestMemoryError(f"{length} bytes at user address {address:#x} are not in a region")

    def views(self, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Bytes from each first address of the guest up to its end address, in parts if they span
        regions.

        Raises GuestMemoryError if any of them is outside the guest's memory.
        """
        views: list[memoryview] = []
        start = behind = 0
        for begin, end in spans:
            while begin < end:
                if not start <= begin < behind:  # mostly all are in one region
                    start, behind, view = self._region(begin)
                views.append(view[begin - start : end - start])
                begin = behind
        return views

    def _region(self, address: int) -> tuple[int, int, memoryview]:
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._guest[index][1]:
            return self._guest[index]
        raise GuestMemoryError(f"address {address:#x} is not the guest's memory")
