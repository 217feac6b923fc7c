"""The process that makes a request, on behalf of which the server acts on the host."""

from __future__ import annotations

from typing import NamedTuple


class Caller(NamedTuple):
    """Its uid, gid and so on, as creating a file needs them.

    ``groups`` None: a process of this machine, and /proc has them. Else a guest's process, whose
    kernel has checked permissions and names only those that matter.
    """

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] | None = None
    umask: int = 0
