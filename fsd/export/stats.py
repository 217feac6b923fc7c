"""The content of `fsd status`: counters and latencies of an export as plain JSON values."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from protocol import masks

from ..files.inode import Inode
from ..guests.guest import Guest, HandMarks, Observer
from ..guests.mount import MountGuest

if TYPE_CHECKING:
    from .export import Export


SHOWN_LIMIT = 8192
"""Marks of a guest, and directories without a watch, that are shown one by one: about 50 ms."""


def percentile(values: Iterable[float], share: float) -> float | None:
    """The value below which ``share`` (0..1) of the values lie; None if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def snapshot(export: Export, viewer: MountGuest | None = None) -> dict[str, Any]:
    """The state as a JSON object: all of it for this host, and through its own mount. A machine
    (``viewer``) sees its own part, and nothing of other guests and of the host.
    """
    if viewer is None or viewer.is_local:
        return _whole(export)
    return _of_machine(export, viewer)


def _whole(export: Export) -> dict[str, Any]:
    return {
        "source": export.source,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - export.started, 1),
        "inodes": len(export.table),
        "host_watches": len(export.watcher),
        "unwatched": _unwatched(export, export.watches.unwatched),
        "backlog": export.watcher.backlog,
        "counts": dict(export.counts),
        "by_kind": _by_kind(export.kinds),
        "guests": [_guest(export, guest) for guest in export.guests],
    }


def _of_machine(export: Export, viewer: MountGuest) -> dict[str, Any]:
    guests = [guest for guest in export.guests if guest is viewer or guest.via is viewer]
    marked = {inode for guest in guests for inode in export.interest.marks(guest) if inode}
    states = [_guest(export, guest) for guest in guests]
    for guest, state in zip(guests, states, strict=True):
        if guest is viewer:
            state["name"] = "mount"  # its own is a path of the host
    return {
        "source": "",
        "pid": 0,
        "uptime_s": round(time.time() - viewer.began, 1),
        "inodes": viewer.nodes_held,
        "host_watches": sum(bool(export.watcher.mask_of(inode)) for inode in marked),
        "unwatched": _unwatched(export, marked),
        "backlog": 0,
        "counts": dict(sum((guest.counts for guest in guests), Counter())),
        "by_kind": _by_kind(sum((guest.kinds for guest in guests), Counter())),
        "guests": states,
    }


def _unwatched(export: Export, inodes: Collection[Inode]) -> list[dict[str, str]]:
    shown = ((inode, why) for inode, why in export.watches.unwatched.items() if inode in inodes)
    return [
        {"path": inode.shown_path().decode(errors="backslashreplace"), "reason": reason}
        for inode, reason in itertools.islice(shown, SHOWN_LIMIT)
    ]


def _by_kind(kinds: Counter[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """{kind of event: {how it was handled: how often}}; a rename is of two kinds."""
    table: dict[str, dict[str, int]] = {}
    for (what, bits), times in kinds.items():
        for kind in masks.names(bits) if times else ():
            row = table.setdefault(kind, {})
            row[what] = row.get(what, 0) + times
    return table


_KINDS: dict[type[Guest], str] = {
    MountGuest: "mount",
    Observer: "observer",
    HandMarks: "by hand",
}


def _guest(export: Export, guest: Guest) -> dict[str, Any]:
    marks = export.interest.marks(guest)
    counts = guest.counts
    state: dict[str, Any] = {
        "name": guest.name,
        "kind": _KINDS[type(guest)],
        "marks": len(marks),
        "armed": [
            {
                "nodeid": inode.nodeid if inode is not None else 0,
                "generation": inode.generation if inode is not None else 0,
                "path": os.fsdecode(inode.shown_path()) if inode is not None else "",
                "mask": masks.names(mask),
                "watched": inode is None or bool(export.watcher.mask_of(inode)),
            }
            for inode, mask in itertools.islice(marks.items(), SHOWN_LIMIT)
        ],
        "depth": guest.depth,
        "max_depth": guest.max_depth,
        "forwarded": counts["forwarded"],
        "echo": counts["echo"],
        "coalesced": counts["coalesced"],
        "replayed": counts["replayed"],
        "failed": counts["failed"],
        "missed": counts["missed"],
        "overflows": counts["overflows"],
        "resyncs": counts["resyncs"],
        "refused": counts["refused"],
        "waited": counts["waited"],
        "waits_cut": counts["waits_cut"],
        "repeated": counts["repeated"],
        "by_kind": _by_kind(guest.kinds),
        "latency_ms": {
            "p50": _milliseconds(percentile(guest.latencies, 0.5)),
            "p99": _milliseconds(percentile(guest.latencies, 0.99)),
            "samples": len(guest.latencies),
        },
    }
    if isinstance(guest, MountGuest):
        state["transport"] = guest.transport
        state["agent"] = bool(guest.pid)
        state["agent_pid"] = guest.pid
        state["keeps_names"] = guest.keeps_names
        state["takes_calls"] = guest.cache is not None
        state["cache"] = None if guest.cache is None else guest.cache.state()
        state["passthrough"] = None if guest.passthrough is None else guest.passthrough.state()
    return state
