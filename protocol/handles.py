"""File handles of FUSE inodes: the form in which a guest's kernel shows the server's nodes.

fs/fuse/inode.c, fuse_encode_fh: fileid type 0x81 (FILEID_INO64_GEN) contains {nodeid high, nodeid
low, generation}, each a native u32.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

FILEID_INO64_GEN = 0x81
FILEID_INO64_GEN_PARENT = 0x82
_FH = struct.Struct("=III")


class NodeKey(NamedTuple):
    """Identity of an inode on the wire: nodeid and generation."""

    nodeid: int
    generation: int


def encode_fh(key: NodeKey) -> bytes:
    """The f_handle bytes with which open_by_handle_at(2) finds the inode on the mount."""
    return _FH.pack(key.nodeid >> 32, key.nodeid & 0xFFFF_FFFF, key.generation)


def decode_fh(kind: int, handle: bytes) -> NodeKey:
    """NodeKey of a FUSE handle. Raises ValueError for any other kind of handle."""
    if kind not in (FILEID_INO64_GEN, FILEID_INO64_GEN_PARENT) or len(handle) < _FH.size:
        raise ValueError(f"not a FUSE file handle: type {kind:#x}, {len(handle)} bytes")
    high, low, generation = _FH.unpack_from(handle)
    return NodeKey(high << 32 | low, generation)
