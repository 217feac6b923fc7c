"""Whether programs of this machine hold marks that the agent has not reported yet.

If a mount is this machine's own, the server can check at the decisive moment: when something
happens in a directory that was just looked up, or when it is looked up again. It reads
/proc/PID/fdinfo, which asks no file system. Apart from the agent, which finds out what the marks
are, and from ``arming``, which decides what to deliver.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from protocol.fdinfo import MarkInfo, parse_fdinfo
from protocol.handles import NodeKey, decode_fh

from ..linux import syscalls

SHARE = 4.0
"""After a look comes a rest of at least this many times its duration, if something happens; of a
quarter of that if the look would decide a guest's request."""
BURST = 0.02
"""Seconds of such rest that requests may owe: a few of them are decided however close they are."""
SLOW = 0.005
"""Duration of a look in seconds after which its threads are left to the agent for SLOW_SHARE times
as long: they have very many marks."""
SLOW_SHARE = 99.0
DESCRIPTORS_LIMIT = 256
"""Descriptors of a process that are read; a process with more is left to the agent."""
TEXT_LIMIT = 1 << 18
"""Characters of fdinfo read in a look, about 2,500 marks: a user may have a million."""
_NOTIFY = ("anon_inode:inotify", "anon_inode:[fanotify]")


class NewMarks:
    """Reads marks from /proc."""

    def __init__(self) -> None:
        self.rest = 0.0
        """time.monotonic() from which ``may_be`` can be asked again."""
        self.rest_of_requests = 0.0
        """The same for a request."""
        self._slow: dict[int, float] = {}  # threads: until when they are left to the agent

    def of(self, threads: Iterable[int], device: int) -> list[tuple[NodeKey, int]] | None:
        """The inotify marks of the threads' processes on the mount with that st_dev, as far as they
        can be seen; None if one of the threads runs, and may just set another.
        """
        began = time.thread_time()
        sdev = os.major(device) << 20 | os.minor(device)
        try:
            if not syscalls.sees_processes():
                return []
            if any(map(_runs, threads)):
                return None
            marks = [mark for text in _texts(threads) for mark in parse_fdinfo(text)]
            return [
                (decode_fh(mark.handle_type, mark.handle), mark.mask)
                for mark in marks
                if mark.family == "inotify" and mark.sdev == sdev
            ]
        except (OSError, ValueError):  # a thread has ended, or there is too much
            return []
        finally:
            owed = max(self.rest_of_requests, time.monotonic() - BURST)
            self.rest_of_requests = owed + (1 + SHARE / 4) * (time.thread_time() - began)

    def holders(self, threads: Iterable[int], device: int, marked: set[NodeKey]) -> list[int]:
        """Those of the threads whose processes hold one of these marks on the mount with that
        st_dev. Empty if one of them cannot be seen, if it takes longer
        than SLOW, or during the rest that a look has earned.
        """
        began = time.thread_time()
        if time.monotonic() < self.rest or not syscalls.sees_processes():
            return []
        sdev = os.major(device) << 20 | os.minor(device)
        found = []
        try:
            for thread in threads:
                if time.thread_time() - began > SLOW:
                    return []
                with suppress(FileNotFoundError):  # it has ended, and so have its marks
                    marks = [mark for text in _texts([thread]) for mark in parse_fdinfo(text)]
                    keys = (decode_fh(m.handle_type, m.handle) for m in marks if m.sdev == sdev)
                    if not marked.isdisjoint(keys):
                        found.append(thread)
        except (OSError, ValueError):  # it cannot be read, or has too many
            return []
        finally:
            self.rest = time.monotonic() + SHARE * (time.thread_time() - began)
        return found

    def may_be(
        self, threads: Iterable[int], device: int, is_known: Callable[[NodeKey, int], bool]
    ) -> bool:
        """Whether one of the threads' processes may hold a mark on the mount with that st_dev which
        ``is_known`` denies. False is certain, as of now.
        """
        began, worked = time.monotonic(), time.thread_time()
        if not syscalls.sees_processes():
            return True
        sdev = os.major(device) << 20 | os.minor(device)
        try:
            if any(self._slow.get(thread, 0.0) > began for thread in threads):
                return True
            texts = _texts(threads)
            return any(_is_new(m, sdev, is_known) for text in texts for m in parse_fdinfo(text))
        except (OSError, ValueError):  # it cannot be read, has ended, or has too many
            return True
        finally:
            took = time.thread_time() - worked  # not what others have done meanwhile
            now = time.monotonic()
            self.rest = now + SHARE * took
            owed = max(self.rest_of_requests, now - BURST)
            self.rest_of_requests = owed + (1 + SHARE / 4) * took
            if took > SLOW:
                self._slow = {pid: end for pid, end in self._slow.items() if end > now}
                self._slow.update(dict.fromkeys(threads, now + SLOW_SHARE * took))


def _runs(thread: int) -> bool:
    """Whether a thread runs or waits for a processor. Raises OSError."""
    with open(f"/proc/{thread}/stat", "rb", buffering=0) as file:
        return file.read(512).rpartition(b")")[2].split()[:1] == [b"R"]


def _texts(threads: Iterable[int]) -> Iterator[str]:
    """fdinfo of the inotify and fanotify descriptors of the threads' processes. Raises OSError, and
    ValueError if there is too much of it or a thread has ended.
    """
    room = TEXT_LIMIT
    for thread in threads:
        seen = 0
        with os.scandir(f"/proc/{thread}/fd") as entries:
            for entry in entries:
                seen += 1
                if seen > DESCRIPTORS_LIMIT:
                    raise ValueError("too many descriptors")
                try:
                    if os.readlink(entry.path) not in _NOTIFY:
                        continue
                    with open(f"/proc/{thread}/fdinfo/{entry.name}") as info:
                        text = info.read(room + 1)
                except FileNotFoundError:  # closed meanwhile
                    continue
                room -= len(text)
                if room < 0:
                    raise ValueError("too many marks")
                yield text
        if not seen:
            raise ValueError("a thread that has ended, perhaps the first of others")


def _is_new(mark: MarkInfo, sdev: int, is_known: Callable[[NodeKey, int], bool]) -> bool:
    if mark.family != "inotify":
        return mark.sdev in (0, sdev)  # of a mount, or with bits of its own: the agent's
    if mark.sdev != sdev:
        return False
    return not is_known(decode_fh(mark.handle_type, mark.handle), mark.mask)
