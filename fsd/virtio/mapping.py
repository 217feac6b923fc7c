"""Maps the memory that a VMM shares. A VMM may shorten the file at any time, and a full tmpfs or an
empty pool of huge pages has no page left: an access there causes a SIGBUS, which by default ends
the process, with all guests. Here it ends the mapping: zeros take its place.

Seals of a memfd would forbid the shortening, but not every VMM's memory has them or can get them
(/dev/shm, hugetlbfs, Cloud Hypervisor's memfd), and a hole may lack its page in spite of them.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import signal
import weakref
from collections.abc import Callable
from threading import Lock

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_F_GET_SEALS = 1034  # linux/fcntl.h
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_SA_SIGINFO, _SA_NODEFER = 4, 0x4000_0000
_SI_ADDR = 2 * ctypes.sizeof(ctypes.c_void_p) if ctypes.sizeof(ctypes.c_void_p) == 8 else 12
"""Offset of the fault's address in siginfo_t."""


class _SigAction(ctypes.Structure):  # struct sigaction of the C library
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (1024 // 8 // ctypes.sizeof(ctypes.c_ulong))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_mapped: dict[int, tuple[int, int, Callable[[], None]]] = {}  # start, length, callback
_numbers = itertools.count()
_lock = Lock()


def is_memory(fd: int) -> bool:
    """Whether a descriptor is a memfd or a file on tmpfs or hugetlbfs, where no other party has to
    provide a page. Asks no file system, as one in user space may not answer (fcntl(2), F_GET_SEALS:
    EINVAL on any other).
    """
    try:
        fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return False
    return True


def map_memory(fd: int, size: int, on_lost: Callable[[], None]) -> memoryview:
    """The first ``size`` bytes of a VMM's file, shared; ``fd`` stays the caller's. They stay mapped
    as long as a view of them exists.

    ``on_lost`` is called once they are not the VMM's any more, in the middle of the access: it must
    only schedule work. Raises OSError, and ValueError for what cannot be mapped, and for memory for
    which is_memory is false.
    """
    if not is_memory(fd):
        raise OSError("it is no memfd and no file on tmpfs or hugetlbfs")
    if os.fstat(fd).st_size < size:
        raise ValueError("the file is smaller")
    with _lock:
        _handle_faults()
    whole = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    page = os.fstatvfs(fd).f_bsize  # of hugetlbfs: it maps whole pages
    # By a number: its address may belong to another mapping when its end is noticed.
    number = next(_numbers)
    _mapped[number] = start, (size + page - 1) // page * page, on_lost
    weakref.finalize(whole, _mapped.pop, number)
    return memoryview(whole)


def _on_fault(number: int, info: int, _context: int) -> None:
    """SIGBUS, in the thread that has touched the memory. It does not come from outside: this runs
    at an instruction of a known kind, a copy from or to a memoryview.
    """
    address = ctypes.c_void_p.from_address(info + _SI_ADDR).value or 0
    for start, length, on_lost in reversed(list(_mapped.values())):
        if start <= address < start + length:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            if _libc.mmap(start, length, protection, flags, -1, 0) == start:
                on_lost()
                return
    # Not a region of this module: the fault repeats, and ends the process.
    _libc.sigaction(number, ctypes.byref(_SigAction()), None)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_fault)
_action = _SigAction(
    handler=ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO | _SA_NODEFER
)


def _handle_faults() -> None:
    if _libc.sigaction(signal.SIGBUS, ctypes.byref(_action), None):
        raise OSError(ctypes.get_errno(), "SIGBUS cannot be handled")
