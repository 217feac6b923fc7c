"""The process that asks for something, on behalf of which the server acts on the host."""

from __future__ import annotations

from typing import NamedTuple


class Caller(NamedTuple):
    """Its numbers: what creating a file needs.

    ``groups`` None: a process of this machine, and /proc has them. Else a guest's, whose kernel
    has checked permissions and names just those that matter.
    """

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] | None = None
    umask: int = 0
