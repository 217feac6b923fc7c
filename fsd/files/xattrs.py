"""Which extended attributes guests may see and change: of those whose names carry rights, two.

Apart because it is a rule about names that every transport shares.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

ACL_ACCESS = b"system.posix_acl_access"
_ACLS = frozenset({ACL_ACCESS, b"system.posix_acl_default"})
_SYSTEM = b"system."
"""The kernel leaves it to the file system who may set these (xattr(7), fs/xattr.c): POSIX, NFSv4,
SMB and NTFS ACLs. So a guest's kernel asks for them on any user's behalf. Before it asks, it checks
who may set user.*, trusted.* (CAP_SYS_ADMIN) and security.* (CAP_SETFCAP for security.capability,
else CAP_SYS_ADMIN, or what its LSM requires). The host checks these again, for the server: the
sandbox has no CAP_SYS_ADMIN, and an LSM of the host checks its own labels."""


def is_open(name: bytes, *, acls: bool) -> bool:
    """Whether guests may use an attribute. ``acls``: POSIX ACLs too, because the guest's kernel
    checks who sets them; it has then agreed to FUSE_POSIX_ACL.
    """
    return not name.startswith(_SYSTEM) or (acls and name in _ACLS)


def check(name: bytes, *, acls: bool) -> None:
    """Raises OSError EOPNOTSUPP for an attribute that guests may not use."""
    if not is_open(name, acls=acls):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def listed(names: Iterable[bytes], *, acls: bool) -> list[bytes]:
    """The names that a guest may see."""
    return [name for name in names if is_open(name, acls=acls)]
