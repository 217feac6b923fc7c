"""How the host's programs have a file open: the last resort when an OPEN stays alone.

From /proc/PID/fdinfo, which asks no file system: a stat through /proc/PID/fd could be a request
to the very mount that this server answers, and wait for itself.
"""

from __future__ import annotations

import os

from . import host


def is_open_for_writing(device: int, ino: int) -> bool | None:
    """Whether any visible process has the file (st_dev, st_ino) open for writing; None where none
    has it open at all, and in a sandbox, where none is visible.
    """
    if not host.sees_processes():
        return None
    found = None
    mounts = _mounts_of(device)
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        directory = f"/proc/{pid}/fdinfo"
        try:
            fds = os.listdir(directory)
        except OSError:
            continue
        for fd in fds:
            try:
                with open(f"{directory}/{fd}") as info:
                    fields = dict(line.split(":", 1) for line in info if ":" in line)
            except OSError:
                continue
            if int(fields.get("ino", 0)) == ino and int(fields.get("mnt_id", -1)) in mounts:
                flags = int(fields["flags"], 8)
                if flags & os.O_PATH:
                    continue
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    return True
                found = False
    return found


def _mounts_of(device: int) -> set[int]:
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", errors="surrogateescape") as mountinfo:
        fields = (line.split(" ", 3) for line in mountinfo)
        return {int(mount_id) for mount_id, _parent, number, _rest in fields if number == wanted}
