"""When an application sees an event, its own stat and read see the new state.

The host does rounds of operations; the kth event of one kind and name belongs to round k, because
no such events follow one another directly and so none are merged. Whatever is seen then must be of
round k or later. Run on the host itself first: that proves what is expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.mounts import Mount, mounted

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
CREATE, DELETE, ISDIR = 0x100, 0x200, 0x40000000
MASK = MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE
TIMEOUT = 30.0

Seen = dict[str, Any] | None


class Operation(NamedTuple):
    """What is done in a round, and the events it makes: the last of them ends a paced step."""

    do: Callable[[Path, int], None]
    events: list[tuple[int, str]]


def count(root: Path, number: int) -> None:
    """Overwrite in place: neither size nor inode changes, only a cache would show it."""
    fd = os.open(root / "counter", os.O_WRONLY)
    os.pwrite(fd, b"%08d" % number, 0)
    os.close(fd)


def log(root: Path, number: int) -> None:
    with open(root / "log", "ab", buffering=0) as file:
        file.write(b"%08d" % number)


def replace(root: Path, number: int) -> None:
    (root / "value.tmp").write_text(str(number))
    (root / "value.tmp").rename(root / "value")


def rewrite(root: Path, number: int) -> None:
    (root / "config").write_text(str(number))


OPERATIONS = [
    Operation(count, [(MODIFY, "counter"), (CLOSE_WRITE, "counter")]),
    Operation(lambda root, n: (root / "link").symlink_to(str(n)), [(CREATE, "link")]),
    Operation(log, [(MODIFY, "log"), (CLOSE_WRITE, "log")]),
    Operation(
        replace,
        [
            *[(kind, "value.tmp") for kind in (CREATE, MODIFY, CLOSE_WRITE, MOVED_FROM)],
            (MOVED_TO, "value"),
        ],
    ),
    Operation(lambda root, _: (root / "sub").mkdir(), [(CREATE | ISDIR, "sub")]),
    Operation(rewrite, [(CLOSE_WRITE, "config")]),
    Operation(lambda root, _: (root / "link").unlink(), [(DELETE, "link")]),
    Operation(lambda root, n: os.utime(root / "stamp", (n, n)), [(ATTRIB, "stamp")]),
    Operation(lambda root, _: (root / "sub").rmdir(), [(DELETE | ISDIR, "sub")]),
]
EXPECTED = [event for operation in OPERATIONS for event in operation.events]


def prepare(root: Path) -> None:
    for name in ("counter", "value", "config"):
        (root / name).write_text("0")
    (root / "log").touch()
    (root / "stamp").touch()
    os.utime(root / "stamp", (0, 0))


def version(name: str, seen: dict[str, Any]) -> int:
    """Which round something is of; 0 if it is being written."""
    if name == "stamp":
        return int(seen["mtime"])
    text: str = seen["text"]
    assert name != "log" or len(text) % 8 == 0
    return int((text[-8:] if name == "log" else text) or 0)


def check(kind: int, name: str, number: int, seen: Seen, paced: bool, rounds: int) -> str:
    """Say what is wrong with what was seen at the event of a round; empty if nothing is."""
    gone = bool(kind & (DELETE | MOVED_FROM))
    if seen is None:
        if gone or name == "value.tmp" or (not paced and name in {"link", "sub"}):
            return ""
        return "it does not exist"
    if "error" in seen:
        return "it cannot be read"
    if name == "sub":
        return "it still exists" if gone and paced else ""
    found = version(name, seen)
    if found > rounds:
        return f"it is of round {found}"
    if gone:
        return "" if found > number or (name == "value.tmp" and not found) else "it still exists"
    if name in {"value.tmp", "config"} and not found and not (paced and name == "config"):
        return ""  # emptied by a later round, which has not written yet
    if found < number or (paced and found != number):
        return f"it is of round {found}"
    return ""


class Handler:
    """The handler program; its lines are read as they come, so that it never waits for us."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fidelity.handler", directory, hex(MASK)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self.lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.lines.get(timeout=TIMEOUT) == b"READY\n"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def next(self) -> tuple[int, str, int, Seen]:
        kind, name, number, seen = json.loads(self.lines.get(timeout=TIMEOUT))
        return kind, name, number, seen

    def __enter__(self) -> Handler:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        code = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert code == 0


@contextlib.contextmanager
def shared(side: str, source: Path, mountpoint: Path) -> Iterator[tuple[Path, Mount | None]]:
    if side == "native":
        yield source, None
    else:
        with mounted(source, mountpoint, f"--cache={side}") as mount:
            yield mountpoint, mount


@pytest.mark.parametrize(("pace", "rounds"), [("paced", 30), ("burst", 200)])
@pytest.mark.parametrize("side", ["native", "never", "coherent"])
def test_a_handler_sees_the_new_state(tmp_path: Path, side: str, pace: str, rounds: int) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    prepare(source)
    wrong: list[str] = []
    counts: Counter[tuple[int, str]] = Counter()

    with shared(side, source, mountpoint) as (watched, mount), Handler(watched) as handler:
        if mount:
            mount.wait_armed(mountpoint, pid=handler.process.pid)

        def handle_until(last: tuple[int, str, int]) -> None:
            place: tuple[int, str, int] | None = None
            while place != last:
                kind, name, number, seen = handler.next()
                place = kind, name, number
                counts[kind, name] += 1
                if (kind, name) not in EXPECTED:
                    continue  # O_TRUNC and write may be one IN_MODIFY or two
                if problem := check(kind, name, number, seen, pace == "paced", rounds):
                    wrong.append(f"event {kind:#x} {name} of round {number}: {problem} ({seen})")

        for number in range(1, rounds + 1):
            for operation in OPERATIONS:
                operation.do(source, number)
                if pace == "paced":
                    handle_until((*operation.events[-1], number))
        if pace == "burst":
            handle_until((*EXPECTED[-1], rounds))
    assert not wrong, "\n".join(wrong)
    assert {event: counts[event] for event in EXPECTED} == dict.fromkeys(EXPECTED, rounds)


def test_the_check_has_teeth() -> None:
    old = {"mode": 0o100644, "mtime": 1, "text": "00000004"}
    for kind, name, seen in [
        (MODIFY, "counter", old),
        (MODIFY, "counter", None),
        (MODIFY, "log", {**old, "text": "0000000300000004"}),
        (MOVED_TO, "value", None),
        (DELETE, "link", old),
        (DELETE, "link", {**old, "text": "5"}),
        (ATTRIB, "stamp", old),
        (CREATE, "link", old),
    ]:
        assert check(kind, name, 5, seen, False, 9), (kind, name, seen)
        assert check(kind, name, 5, seen, True, 9), (kind, name, seen)
    new = {**old, "text": "00000006", "mtime": 6}
    for name in ("counter", "log", "value", "link", "stamp"):
        assert not check(MODIFY, name, 5, new, False, 9)
        assert check(MODIFY, name, 5, new, True, 9)
    assert check(CREATE, "link", 5, None, True, 9)
    assert not check(CREATE, "link", 5, None, False, 9)
    assert check(CLOSE_WRITE, "config", 5, {**old, "text": ""}, True, 9)
