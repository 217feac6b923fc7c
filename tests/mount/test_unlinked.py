"""What a host program does with a file that is open and has lost its name: reported as natively, to
watchers that want it and (IN_EXCL_UNLINK) to those that do not.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from guest_tools.watcher import notify
from harness.mounts import Mount, wait_until
from protocol.inotify import parse_events
from protocol.masks import Mask, describe
from tests.mount.observing import idle
from tests.mount.posix_support import opened, write

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
EXCL_UNLINK = 0x0400_0000
MASKS = {
    "modify": Mask.MODIFY | Mask.ATTRIB,
    "access": Mask.ACCESS | Mask.MODIFY,
    "changes": Mask.MODIFY
    | Mask.ATTRIB
    | Mask.CREATE
    | Mask.DELETE
    | Mask.MOVED_FROM
    | Mask.MOVED_TO,
    "all": Mask.MODIFY | Mask.CREATE | Mask.DELETE | Mask.MOVED_TO | Mask.OPEN | Mask.CLOSE_WRITE,
}


def unlink(d: Path) -> None:
    (d / "f").unlink()


def replace(d: Path) -> None:
    (d / "other").rename(d / "f")


def make_anew(d: Path) -> None:
    (d / "f").unlink()
    write(d / "f", b"another")


@contextmanager
def watches(d: Path, mask: Mask) -> Iterator[list[int]]:
    """Two watchers, without IN_EXCL_UNLINK and with it."""
    with ExitStack() as stack:
        fds = []
        for flag in (0, EXCL_UNLINK):
            fds.append(notify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
            notify.add_watch(fds[-1], str(d), int(mask) | flag)
        yield fds


def heard(fd: int) -> list[str]:
    """All events up to the one of `last`; those alike side by side are one, as in a queue."""
    events: list[str] = []
    while not events or not events[-1].endswith(" last"):
        assert select.select([fd], [], [], 20)[0], f"no more than {events}"
        for event in parse_events(os.read(fd, 65536)):
            text = f"{describe(event.mask)} {os.fsdecode(event.name)}"
            if text not in events[-1:]:
                events.append(text)
    return events[: next(i for i, event in enumerate(events) if event.endswith(" last"))]


def run(
    watched: Path,
    host: Path,
    mask: Mask,
    lose: Callable[[Path], None],
    pause: Callable[[], object],
    armed: Callable[[], object],
) -> list[list[str]]:
    for name in ("f", "other", "last"):
        write(host / name, b"content")
    with watches(watched, mask) as fds:
        armed()
        with opened(host / "f", os.O_RDWR) as fd:
            steps: list[Callable[[], object]] = [
                lambda: os.pwrite(fd, b"x", 0),
                lambda: lose(host),
                lambda: os.pwrite(fd, b"y", 0),
                lambda: os.pread(fd, 1, 0),
                lambda: os.fchmod(fd, 0o600),
                lambda: os.pwrite(fd, b"z", 0),
            ]
            for step in steps:
                step()
                pause()
        pause()
        with opened(host / "last", os.O_RDWR) as last:
            os.pwrite(last, b"x", 0)
        return [heard(fd) for fd in fds]


def both(
    share: Mount, native: Path, mask: Mask, lose: Callable[[Path], None]
) -> tuple[list[list[str]], list[list[str]]]:
    """What the two watchers hear natively, and on the mount."""

    def pause() -> None:
        wait_until(lambda: idle(share.mountpoint), 20, "all is delivered")

    def armed() -> None:
        share.wait_armed(share.mountpoint, pid=os.getpid(), timeout=20)

    native.mkdir()
    expected = run(native, native, mask, lose, lambda: None, lambda: None)
    assert expected[0] != expected[1], "there is nothing that is excluded"
    return expected, run(share.mountpoint, share.source, mask, lose, pause, armed)


@pytest.mark.parametrize("mask", MASKS)
def test_as_natively(share: Mount, mask: str, tmp_path: Path) -> None:
    expected, reported = both(share, tmp_path / "native", MASKS[mask], unlink)
    assert reported == expected


@pytest.mark.parametrize("lose", [replace, make_anew])
def test_what_is_not_excluded(share: Mount, lose: Callable[[Path], None], tmp_path: Path) -> None:
    """The host's events of the two files have one name: they are reported for the newer."""
    expected, reported = both(share, tmp_path / "native", MASKS["changes"], lose)
    assert reported[0] == reported[1] == expected[0] != expected[1]


def test_a_close_is_not_excluded_without_a_mark_for_delete(share: Mount, tmp_path: Path) -> None:
    """The guest's kernel still has the name."""
    mask = Mask.OPEN | Mask.CLOSE_WRITE
    expected, reported = both(share, tmp_path / "native", mask, unlink)
    assert reported[0] == reported[1] == expected[0] != expected[1]
