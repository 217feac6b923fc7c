"""How programs of the host have files open: the last resort when no event follows an OPEN.

Read from /proc/PID/fdinfo, which asks no file system: a stat through /proc/PID/fd could be a
request to the mount that this server answers, and deadlock. All of /proc has to be read, so one
thread does it for all waiting files.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from protocol.mountinfo import parse_mountinfo

from ..pacing.guard import Guard
from . import syscalls

SCAN_EVERY = 0.05
"""Seconds between two scans, at least; and as long as the last one took."""
SCAN_TIME = 1.0
"""Seconds that a scan may take: about 40,000 descriptors. Files that it has not found stay
unknown."""

File = tuple[int, int]
"""st_dev, st_ino."""
_FIELDS = re.compile(rb"flags:\s*0*([0-7]+)\nmnt_id:\s*(\d+)\nino:\s*(\d+)\n")


def scan(files: Collection[File]) -> dict[File, bool]:
    """Those of the files that any visible process has open, and whether for writing. Empty in a
    sandbox, where no process is visible.
    """
    if not syscalls.sees_processes():
        return {}
    end = time.monotonic() + SCAN_TIME
    numbers = {ino for _, ino in files}
    devices = _devices({device for device, _ in files})
    found: dict[File, bool] = {}
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        directory = f"/proc/{pid}/fdinfo"
        try:
            fds = os.listdir(directory)
        except OSError:
            continue
        for fd in fds:
            if time.monotonic() > end:
                return found
            fields = _FIELDS.match(_read(f"{directory}/{fd}"), 0)
            if fields is None or int(fields[3]) not in numbers:
                continue
            file = (devices.get(int(fields[2]), -1), int(fields[3]))
            flags = int(fields[1], 8)
            if file in files and not flags & os.O_PATH:
                is_writing = flags & os.O_ACCMODE != os.O_RDONLY
                found[file] = is_writing or found.get(file, False)
    return found


def _read(path: str) -> bytes:
    with suppress(OSError), open(path, "rb", buffering=0) as info:
        text = info.read(256)
        return text[text.find(b"flags:") :]
    return b""


def _devices(wanted: set[int]) -> dict[int, int]:
    """The device of each mount of these devices."""
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        mounts = list(parse_mountinfo(mountinfo.read()))
    devices = ((mount.mnt_id, os.makedev(mount.major, mount.minor)) for mount in mounts)
    return {mount: device for mount, device in devices if device in wanted}


def is_open_for_writing(device: int, ino: int) -> bool | None:
    """The same for one file; None if no process has it open."""
    return scan([(device, ino)]).get((device, ino))


class Openers:
    """The results of scans. ``waiting`` are all files with a pending question."""

    def __init__(self, waiting: Callable[[], Iterable[File]]) -> None:
        self._waiting = waiting
        self._files: set[File] = set()
        self._found: dict[File, bool] = {}
        self._begun = -1.0
        self._next_scan = 0.0
        self._thread: threading.Thread | None = None

    def look(self, file: File, since: float) -> tuple[bool, bool | None]:
        """Whether it is known how a file is open, as of a moment after ``since``
        (time.monotonic()), and how: True = for writing, None = not at all. If it is not known, ask
        again soon.
        """
        if not syscalls.sees_processes():
            return True, None
        if self._thread is not None and self._thread.is_alive():
            return False, None
        if file in self._files and self._begun >= since:
            return True, self._found.get(file)
        if time.monotonic() >= self._next_scan:
            self._scan({file, *self._waiting()})
        return False, None

    def _scan(self, files: set[File]) -> None:
        self._files, self._found, self._begun = files, {}, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="openers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._next_scan = time.monotonic() + SCAN_TIME + SCAN_EVERY
        with Guard("finding out how files are open"):  # else nothing is found
            self._found = scan(self._files)
        took = time.monotonic() - self._begun
        self._next_scan = time.monotonic() + max(SCAN_EVERY, took)
