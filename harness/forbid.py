"""Takes a system call away from this process and its children, by a seccomp filter: the kernel then
answers like one that lacks the call (ENOSYS), or like a container's filter (EPERM).

``python forbid.py NUMBER ERRNO COMMAND …`` runs a command in this way.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

OPENAT2 = 437
STATX = {"x86_64": 332}.get(os.uname().machine, 291)
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000


def forbid(number: int, error: int) -> None:
    """Make system call ``number`` fail with ``error`` from now on."""
    program = struct.Struct("=HBBI")
    code = b"".join(
        [
            program.pack(_LOAD, 0, 0, 0),  # seccomp_data.nr
            program.pack(_JUMP_EQUAL, 0, 1, number),
            program.pack(_RETURN, 0, 0, _ERRNO | error),
            program.pack(_RETURN, 0, 0, _ALLOW),
        ]
    )
    buffer = ctypes.create_string_buffer(code)
    filter_ = struct.pack("@HP", len(code) // program.size, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _MODE_FILTER, filter_, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid(int(sys.argv[1]), int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])
