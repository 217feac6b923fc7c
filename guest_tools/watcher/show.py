"""Prints a checkpoint's state, as text and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from protocol import masks
from protocol.inotify import parse_events

from .state import (
    Epoll,
    Fanotify,
    FanotifyMark,
    File,
    FileSystemMark,
    Inotify,
    MountMark,
    Object,
    ObjectMark,
    Queue,
    State,
    Target,
)

_EPOLL_BITS = {
    0x1: "IN", 0x2: "PRI", 0x4: "OUT", 0x8: "ERR", 0x10: "HUP", 0x2000: "RDHUP",
    0x1000_0000: "EXCLUSIVE", 0x2000_0000: "WAKEUP", 0x4000_0000: "ONESHOT", 0x8000_0000: "ET",
}  # fmt: skip


def as_json(state: State) -> dict[str, Any]:
    """The state as JSON; numbers are the kernel's, with the names of bits in addition."""
    return {
        "pid": state.pid,
        "command": os.fsdecode(state.command),
        "kernel": state.kernel,
        "filesystems": [
            {
                "s_dev": filesystem.sdev,
                "type": os.fsdecode(filesystem.fstype),
                "source": os.fsdecode(filesystem.source),
                "fsid": filesystem.fsid,
            }
            for filesystem in state.filesystems
        ],
        "files": [_file_json(state, file) for file in state.files],
    }


def as_text(state: State) -> Iterator[str]:
    """Lines."""
    yield f"process {state.pid} ({os.fsdecode(state.command)}), Linux {state.kernel}"
    for file in state.files:
        numbers = ", ".join(str(fd) for fd in state.fds(file.id))
        kind = type(file).__name__.lower()
        extra = (
            f" init {file.init_flags:#x} events {file.event_flags:#o}"
            if isinstance(file, Fanotify)
            else ""
        )
        yield f"descriptor {numbers}: {kind}, flags {file.flags:#o}{extra}"
        if isinstance(file, Inotify):
            for watch in file.watches:
                yield f"  wd {watch.wd} {masks.describe(watch.mask)} {_object_text(watch.object)}"
        elif isinstance(file, Fanotify):
            yield from (_mark_text(mark) for mark in file.marks)
        else:
            yield from (_target_text(state, target) for target in file.targets)
        if not isinstance(file, Epoll) and file.queue.size:
            saved = "saved" if file.queue.events else "not saved"
            yield f"  queued: {file.queue.size} bytes, {saved}"
            for event in parse_events(file.queue.events):
                what = f"{masks.describe(event.mask)} {event.cookie} {os.fsdecode(event.name)}"
                yield f"    wd {event.wd} {what}".rstrip()


def _device(sdev: int) -> str:
    return f"{sdev >> 20}:{sdev & 0xFFFFF}"


def _object_text(thing: Object) -> str:
    identity = thing.identity
    handle = f"{identity.handle_type:x}:{identity.handle.hex()}, " if identity.handle else ""
    name = os.fsdecode(thing.path) or "?"
    deleted = " (deleted)" if thing.deleted else ""
    return (
        f"{_device(identity.sdev)} inode {identity.ino} handle {handle}{thing.kind} {name}{deleted}"
    )


def _mark_text(mark: FanotifyMark) -> str:
    bits = f"mask {mark.mask:#x} ignored {mark.ignored_mask:#x} flags {mark.mflags:#x}"
    if isinstance(mark, ObjectMark):
        return f"  file {bits} {_object_text(mark.object)}"
    if isinstance(mark, MountMark):
        return f"  mount {bits} {_device(mark.sdev)} id {mark.mnt_id} {os.fsdecode(mark.path)}"
    return f"  file system {bits} {_device(mark.sdev)}"


def _target_text(state: State, target: Target) -> str:
    events = "|".join(_epoll_names(target.events)) or "0"
    if not target.pid:
        where = "not found"
    elif target.id:
        where = f"descriptor {target.fd}"
    elif target.pid == state.pid:
        where = f"descriptor {target.fd} ({os.fsdecode(target.what)}), not a part of this"
    else:
        where = f"process {target.pid}, descriptor {target.fd} ({os.fsdecode(target.what)})"
    return f"  tfd {target.tfd} toff {target.toff} {events} data {target.data:#x} -> {where}"


def _epoll_names(events: int) -> list[str]:
    known = [f"EPOLL{name}" for bit, name in _EPOLL_BITS.items() if events & bit]
    rest = events & ~sum(_EPOLL_BITS)
    return [*known, hex(rest)] if rest else known


def _file_json(state: State, file: File) -> dict[str, Any]:
    cloexec = {descriptor.fd: descriptor.cloexec for descriptor in state.descriptors}
    row: dict[str, Any] = {
        "kind": type(file).__name__.lower(),
        "fds": [{"fd": fd, "cloexec": cloexec[fd]} for fd in state.fds(file.id)],
        "flags": file.flags,
        "owner": file.owner._asdict(),
    }
    if isinstance(file, Inotify):
        row["watches"] = [
            {
                "wd": watch.wd,
                **_mask_json(watch.mask),
                "ignored_mask": watch.ignored_mask,
                **_object_json(watch.object),
            }
            for watch in file.watches
        ]
    elif isinstance(file, Fanotify):
        row["init_flags"], row["event_flags"] = file.init_flags, file.event_flags
        row["marks"] = [_mark_json(mark) for mark in file.marks]
    else:
        row["targets"] = [_target_json(target) for target in file.targets]
    if not isinstance(file, Epoll):
        row["queue"] = _queue_json(file.queue)
    return row


def _mask_json(mask: int) -> dict[str, Any]:
    return {"mask": mask, "mask_names": masks.names(mask)}


def _object_json(thing: Object) -> dict[str, Any]:
    return {
        "s_dev": thing.identity.sdev,
        "ino": thing.identity.ino,
        "handle": {
            "kind": thing.kind,
            "type": thing.identity.handle_type,
            "bytes": thing.identity.handle.hex(),
        },
        "path": os.fsdecode(thing.path) or None,
        "deleted": thing.deleted,
    }


def _mark_json(mark: FanotifyMark) -> dict[str, Any]:
    bits = {"mask": mark.mask, "ignored_mask": mark.ignored_mask, "mflags": mark.mflags}
    if isinstance(mark, ObjectMark):
        return {"on": "file", **bits, **_object_json(mark.object)}
    if isinstance(mark, FileSystemMark):
        return {"on": "file system", **bits, "s_dev": mark.sdev}
    path = os.fsdecode(mark.path)
    return {"on": "mount", **bits, "s_dev": mark.sdev, "mnt_id": mark.mnt_id, "path": path}


def _target_json(target: Target) -> dict[str, Any]:
    return {
        "tfd": target.tfd,
        "toff": target.toff,
        "events": target.events,
        "event_names": _epoll_names(target.events),
        "data": target.data,
        "pos": target.pos,
        "ino": target.ino,
        "s_dev": target.sdev,
        "target": {
            "pid": target.pid or None,
            "fd": target.fd if target.pid else None,
            "saved": bool(target.id),
            "what": os.fsdecode(target.what),
        },
    }


def _queue_json(queue: Queue) -> dict[str, Any]:
    return {
        "size": queue.size,
        "saved": len(queue.events) == queue.size,
        "events": [
            {
                "wd": event.wd,
                **_mask_json(event.mask),
                "cookie": event.cookie,
                "name": os.fsdecode(event.name),
            }
            for event in parse_events(queue.events)
        ],
    }
