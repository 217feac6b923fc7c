"""A host unpacks 5,000 files in 500 directories: in the end a recursive watcher on the mount knows
what the same program knows on the source.

What is natively true differs.

- watchdog marks each new directory before it lists it: it knows every path at any depth.
- chokidar marks it after it has listed it: what is made between is natively missed, until something
  else happens in the directory. So the directories lie in the root, which is marked already, and
  the whole picture is demanded after one more file has been put into each.
- inotifywait and watchfiles (Rust's notify) list no files at all: which of the first ones they name
  depends on which is faster, natively too, and inotifywait marks as late as chokidar. Their picture
  is: every directory, nothing that is not there, and, because in the end each directory has its
  mark, every file that comes later and every directory that goes.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from harness.mounts import Mount
from tests.clients.watchers import (
    CHOKIDAR,
    INOTIFYWAIT,
    QUIET,
    WATCHDOG,
    WATCHFILES,
    Client,
    Event,
    Place,
    Watcher,
    node,
    python,
)

LONG = 120.0
"""The bound for the whole tree. chokidar makes some 50 requests of each file: 15 s on an idle
machine of two cores, 40 on one that other tests keep busy."""

FILES = 10
"""Files in each directory."""

FLAT = [f"dir-{number:03}" for number in range(500)]
DEEP = [f"top-{number % 20:02}" + f"/{number // 20:02}" * (number >= 20) for number in range(500)]

APPEARS = {"CREATE", "MOVED_TO", "created", "added", "add", "addDir"}
VANISHES = {"DELETE", "MOVED_FROM", "deleted", "unlink", "unlinkDir"}

# Without --text: with it the drivers would open each file, and be slower than their users.
PROGRAMS = [
    pytest.param(INOTIFYWAIT, FLAT, False, id="inotifywait"),
    pytest.param(
        replace(WATCHFILES, command=lambda root: python("watchfiles_driver.py", root)),
        *(FLAT, False),
        id="watchfiles",
    ),
    pytest.param(
        replace(WATCHDOG, command=lambda root: python("watchdog_driver.py", root)),
        *(DEEP, True),
        id="watchdog",
    ),
    pytest.param(
        replace(CHOKIDAR, command=lambda root: node("chokidar.mjs", root)),
        *(FLAT, True),
        id="chokidar",
    ),
]


def picture(events: Iterable[Event]) -> set[str]:
    """The paths that exist, for whoever knows nothing but these events."""
    known = set()
    for event in events:
        kind = event.word.removesuffix(",ISDIR")
        if kind in APPEARS:
            known.add(event.path)
        elif kind in VANISHES:
            known.discard(event.path)
    return known


def truth(source: Path) -> set[str]:
    return {str(path.relative_to(source)) for path in source.rglob("*")}


def unpack(directories: list[str], source: Path) -> None:
    """As a user does: by tar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for directory in directories:
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
            for number in range(FILES):
                content = f"{directory}/{number}\n".encode()
                entry = tarfile.TarInfo(f"{directory}/file-{number}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    command = ["tar", "-x", "-f", "-", "-C", str(source)]
    subprocess.run(command, input=packed.getvalue(), check=True, timeout=60)


@pytest.mark.timeout(480)
@pytest.mark.parametrize(("watcher", "directories", "complete"), PROGRAMS)
def test_the_picture_is_the_same_as_natively(
    watcher: Watcher, directories: list[str], complete: bool, share: Mount
) -> None:
    source = share.source
    places = [Place(source, source), Place(source, share.mountpoint, share)]
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(watcher, place)) for place in places]
        for client in clients:
            client.wait_ready()

        unpack(directories, source)
        for client in clients:
            client.place.wait_armed(client.process.pid, directories, LONG)
        for directory in directories:
            (source / directory / "later").touch()
        later = {f"{directory}/later" for directory in directories}
        check(clients, set(directories) | later, source, complete)

        gone = {name for name in directories if name in ("dir-007", "dir-499", "top-03", "top-19")}
        assert len(gone) == 2
        for name in gone:
            shutil.rmtree(source / name)
        left = {path for path in set(directories) | later if path.split("/")[0] not in gone}
        check(clients, left, source, complete)


def check(clients: list[Client], least: set[str], source: Path, complete: bool) -> None:
    """Natively and on the mount: at least this is known, nothing else than the truth."""
    there = truth(source)
    assert least <= there
    for client in clients:
        where = "the source" if client.place.root == source else "the mount"

        def fits(events: list[Event]) -> bool:
            known = picture(events)
            return known == there if complete else least <= known <= there

        if not client.wait_until(fits, 0, LONG):
            known = picture(client.events)
            missing = sorted((there if complete else least) - known)
            phantoms = sorted(known - there)
            pytest.fail(
                f"{client.watcher} on {where} knows {len(known)} paths of {len(there)}; it does not"
                f" know these {len(missing)}: {missing[:20]};"
                f" and these {len(phantoms)} do not exist: {phantoms[:20]}"
            )


def test_the_picture_stays_empty_without_an_agent(silent: Place) -> None:
    """The counterpart, of all programs at once: none sees what is unpacked."""
    watchers = [
        watcher for program in PROGRAMS if isinstance(watcher := program.values[0], Watcher)
    ]
    (silent.source / "control").mkdir()
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(watcher, silent)) for watcher in watchers]
        for client in clients:
            client.wait_ready(armed=False)
        since = [len(client.events) for client in clients]
        unpack(FLAT[:20] + DEEP[:40], silent.source)
        for client in clients:
            client.stays_silent(QUIET / len(clients))
        (silent.root / "control/ping").touch()
        for client, start in zip(clients, since, strict=True):
            assert client.wait_until(lambda events: "control/ping" in picture(events), start, LONG)
            assert picture(client.events[start:]) == {"control/ping"}
