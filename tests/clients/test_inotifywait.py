"""inotifywait on the mount says, line by line, what it says natively on the source.

Whether a stream is the same down to cookies is tests/fidelity's business; here the tool itself is
run in the ways in which scripts use it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import pytest

from tests.clients.watchers import (
    CHANGES,
    FORMAT,
    PATIENCE,
    Client,
    Event,
    Place,
    Watcher,
    parse_inotifywait,
)


def inotifywait(name: str, *options: str, target: str = ".") -> Watcher:
    return Watcher(
        name,
        lambda root: ["inotifywait", *options, *FORMAT, os.path.normpath(root / target)],
        parse_inotifywait,
    )


def write(path: Path | str, text: str, mode: str = "w") -> None:
    with open(path, mode) as file:
        file.write(text)


def touch(source: Path, *options: str) -> None:
    subprocess.run(["touch", *options, source / "file"], check=True, timeout=10)


def short_lived(source: Path) -> None:
    """Gone before anybody can look."""
    write(source / "brief", "x")
    (source / "brief").unlink()


def save_with_backup(source: Path) -> None:
    """As vim does by default: the old file becomes the backup, the name gets a new inode."""
    (source / "file").rename(source / "file~")
    write(source / "file", "new text")
    (source / "file").chmod(0o640)
    (source / "file~").unlink()


def save_over(source: Path) -> None:
    write(source / ".file.new", "newer text")
    (source / ".file.new").rename(source / "file")


Change = Callable[[Path], object]

FLAT: dict[str, Change] = {
    "create": lambda source: (source / "file").touch(),
    "write": lambda source: write(source / "file", "text"),
    "append": lambda source: write(source / "file", "more", "a"),
    "read": lambda source: (source / "file").read_bytes(),
    "truncate": lambda source: os.truncate(source / "file", 2),
    "chmod": lambda source: (source / "file").chmod(0o600),
    "both times": lambda source: os.utime(source / "file", (1, 1)),
    "touch": lambda source: touch(source),
    "mtime alone": lambda source: touch(source, "-m", "-d", "@5"),
    "atime alone": lambda source: touch(source, "-a", "-d", "@5"),
    "xattr": lambda source: os.setxattr(source / "file", "user.fsd", b"x"),
    "hard link": lambda source: os.link(source / "file", source / "hard"),
    "write through a hard link": lambda source: write(source / "hard", "y", "a"),
    "unlink a hard link": lambda source: (source / "hard").unlink(),
    "symlink": lambda source: (source / "soft").symlink_to("file"),
    "unlink a symlink": lambda source: (source / "soft").unlink(),
    "fifo": lambda source: os.mkfifo(source / "pipe"),
    "unlink a fifo": lambda source: (source / "pipe").unlink(),
    "rename": lambda source: (source / "file").rename(source / "file2"),
    "rename back": lambda source: (source / "file2").rename(source / "file"),
    "save with backup": save_with_backup,
    "save over": save_over,
    "short-lived file": short_lived,
    "mkdir": lambda source: (source / "dir").mkdir(),
    "chmod a directory": lambda source: (source / "dir").chmod(0o700),
    "create below an unwatched directory": lambda source: (source / "dir/in").touch(),
    "move out of a directory": lambda source: (source / "dir/in").rename(source / "out"),
    "move into a directory": lambda source: (source / "out").rename(source / "dir/in"),
    "rename a directory": lambda source: (source / "dir").rename(source / "dir2"),
    "empty a directory": lambda source: (source / "dir2/in").unlink(),
    "rmdir": lambda source: (source / "dir2").rmdir(),
    "move in": lambda source: (source / "../outside/arrives").rename(source / "arrived"),
    "move out": lambda source: (source / "arrived").rename(source / "../outside/left"),
    "a name of 255 bytes": lambda source: (source / ("n" * 255)).touch(),
    "a name that is not UTF-8": lambda source: write(source / os.fsdecode(b"n\xff"), "x"),
    "a name with blanks": lambda source: (source / " two  words ").touch(),
    "a name like an option": lambda source: (source / "-rf").touch(),
    "unlink": lambda source: (source / "file").unlink(),
}

DEEP: dict[str, tuple[Change, tuple[str, ...]]] = {
    "create two levels down": (lambda source: write(source / "a/b/file", "x"), ()),
    "move between directories": (
        lambda source: (source / "a/b/file").rename(source / "a/file"),
        (),
    ),
    "mkdir": (lambda source: (source / "a/new").mkdir(), ("a/new",)),
    "create in it": (lambda source: write(source / "a/new/file", "x"), ()),
    "mkdir in it": (lambda source: (source / "a/new/newer").mkdir(), ("a/new/newer",)),
    "create in that": (lambda source: write(source / "a/new/newer/file", "x"), ()),
    "unlink three levels down": (lambda source: (source / "a/new/newer/file").unlink(), ()),
    "rmdir a watched directory": (lambda source: (source / "a/new/newer").rmdir(), ()),
    "make it again": (lambda source: (source / "a/new/newer").mkdir(), ("a/new/newer",)),
    "create in it again": (lambda source: write(source / "a/new/newer/file", "x"), ()),
    "move a watched directory out": (
        lambda source: (source / "c").rename(source / "../outside/c"),
        (),
    ),
}


def collapsed(events: Iterable[Event]) -> list[Event]:
    """inotify merges equal neighbours if the program has not read the first yet."""
    return [event for event, _ in groupby(events)]


def own_looking(event: Event) -> bool:
    """Whoever lists a directory, a server too, is seen to open it: not the change under test."""
    kind, _, isdir = event.word.partition(",")
    return bool(isdir) and kind in ("OPEN", "ACCESS", "CLOSE_NOWRITE")


class Pair:
    """The tool on the mount, and natively on the source."""

    def __init__(self, mounted: Client, oracle: Client) -> None:
        self.mounted, self.oracle = mounted, oracle
        self.source = mounted.place.source
        self._fences = 0

    def fence(self) -> Event:
        """A landmark: when it is reported, everything before it has been."""
        self._fences += 1
        path = self.source / f"fence-{self._fences}"
        path.touch()
        path.unlink()
        return Event("DELETE", path.name)

    def fault(self, change: Change) -> str | None:
        """Make the change; how what the two said of it differs."""
        start = [len(client.events) for client in (self.mounted, self.oracle)]
        change(self.source)
        end = self.fence()
        said = []
        for client, since in zip((self.mounted, self.oracle), start, strict=True):
            try:
                events = client.wait_for([end], since)
            except AssertionError as error:
                return str(error)
            said.append(collapsed(event for event in events if not own_looking(event)))
        if said[0] == said[1]:
            return None
        mounted, oracle = ([str(event) for event in events] for events in said)
        return f"\n  on the mount: {mounted}\n  natively:     {oracle}"


def test_every_event_of_a_directory(place: Place) -> None:
    watcher = inotifywait("inotifywait-m", "-m")
    (place.outside / "arrives").write_text("from outside")
    with (
        Client(watcher, place) as client,
        Client(watcher, Place(place.source, place.source)) as oracle,
    ):
        client.wait_ready()
        oracle.wait_ready()
        pair = Pair(client, oracle)
        faults = [f"{name}: {fault}" for name, do in FLAT.items() if (fault := pair.fault(do))]
        assert not faults, "\n".join(faults)
        words = {event.word for event in client.events}
        kinds = "ACCESS ATTRIB CLOSE_NOWRITE CLOSE_WRITE CREATE DELETE MODIFY MOVED_FROM MOVED_TO"
        assert {*kinds.split(), "OPEN", "CREATE,ISDIR", "DELETE,ISDIR"} <= words


def test_every_event_of_a_directory_without_an_agent(silent: Place) -> None:
    (silent.outside / "arrives").write_text("from outside")
    with Client(inotifywait("inotifywait-m", "-m"), silent) as client:
        client.wait_ready(armed=False)
        since = len(client.events)
        for change in FLAT.values():
            change(silent.source)
        client.stays_silent()
        (silent.root / "control").touch()
        events = client.wait_for([Event("CREATE", "control")], since)
        assert {event.path for event in events} == {"control"}


def test_every_change_in_a_tree(place: Place) -> None:
    watcher = inotifywait("inotifywait-m-r", "-m", "-r", "-e", f"{CHANGES},delete_self,move_self")
    (place.source / "a/b").mkdir(parents=True)
    (place.source / "c").mkdir()
    assert place.outside.is_dir()
    with (
        Client(watcher, place) as client,
        Client(watcher, Place(place.source, place.source)) as oracle,
    ):
        client.wait_ready()
        oracle.wait_ready()
        pair = Pair(client, oracle)
        faults = []
        for name, (change, arms) in DEEP.items():
            if fault := pair.fault(change):
                faults.append(f"{name}: {fault}")
            for one in (client, oracle):
                one.place.wait_armed(one.process.pid, arms)
        assert not faults, "\n".join(faults)


def test_every_change_in_a_tree_without_an_agent(silent: Place) -> None:
    watcher = inotifywait("inotifywait-m-r", "-m", "-r", "-e", f"{CHANGES},delete_self,move_self")
    (silent.source / "a/b").mkdir(parents=True)
    (silent.source / "c").mkdir()
    assert silent.outside.is_dir()
    with Client(watcher, silent) as client:
        client.wait_ready(armed=False)
        since = len(client.events)
        for change, _ in DEEP.values():
            change(silent.source)
        client.stays_silent()
        (silent.root / "control").touch()
        events = client.wait_for([Event("CREATE", "control")], since)
        assert {event.path for event in events} == {"control"}


FILE: dict[str, Change] = {
    "append": lambda source: write(source / "file", "more", "a"),
    "read": lambda source: (source / "file").read_bytes(),
    "chmod": lambda source: (source / "file").chmod(0o600),
    "rename": lambda source: (source / "file").rename(source / "renamed"),
    "append under the new name": lambda source: write(source / "renamed", "more", "a"),
    "unlink": lambda source: (source / "renamed").unlink(),
}


def test_a_watched_file_until_it_is_gone(place: Place) -> None:
    """The mark is on the file alone; it follows the inode, not the name."""
    watcher = inotifywait("inotifywait-m FILE", "-m", target="file")
    write(place.source / "file", "text")
    with (
        Client(watcher, place) as client,
        Client(watcher, Place(place.source, place.source)) as oracle,
    ):
        client.wait_ready(paths=["file"])
        oracle.wait_ready(paths=["file"])
        for change in FILE.values():
            change(place.source)
        gone = Event("DELETE_SELF", "file")
        said = [collapsed(one.wait_for([gone])) for one in (client, oracle)]
        assert list(map(str, said[0])) == list(map(str, said[1]))
        words = [event.word for event in said[0]]
        assert {"MODIFY", "CLOSE_WRITE", "ACCESS", "MOVE_SELF", "ATTRIB"} <= set(words)


def test_a_watched_file_without_an_agent(silent: Place) -> None:
    write(silent.source / "file", "text")
    write(silent.source / "control", "text")
    watcher = Watcher(
        "inotifywait-m FILES",
        lambda root: [
            *("inotifywait", "-m", "-e", "modify,move_self,delete_self,close_write", *FORMAT),
            *(str(root / "file"), str(root / "control")),
        ],
        parse_inotifywait,
    )
    with Client(watcher, silent) as client:
        client.wait_ready(armed=False, paths=["file", "control"])
        since = len(client.events)
        for change in FILE.values():
            change(silent.source)
        client.stays_silent()
        write(silent.root / "control", "more", "a")
        events = client.wait_for([Event("CLOSE_WRITE", "control")], since)
        assert {event.path for event in events} == {"control"}


UPLOADS = Watcher(
    "inotifywait -e close_write",
    lambda root: ["inotifywait", "-m", "-q", "-e", "close_write", "--format", "%w%f", str(root)],
    lambda line, root: [Event("finished", os.path.relpath(line, root))],
    says_ready=False,
)


def test_close_write_comes_when_the_file_is_finished(place: Place) -> None:
    """The script that processes uploads: a line a file, and none before it has been closed."""
    with Client(UPLOADS, place) as client:
        client.wait_ready()
        with (place.source / "upload").open("w") as upload:
            for part in ("one", "two", "three"):
                upload.write(part)
                upload.flush()
            write(place.source / "other", "x")
            events = client.wait_for([Event("finished", "other")])
            assert [event.path for event in events] == ["other"]
        (place.source / "upload").read_text()
        write(place.source / "last", "x")
        events = client.wait_for([Event("finished", "last")])
        assert [event.path for event in events] == ["other", "upload", "last"]


def test_close_write_without_an_agent(silent: Place) -> None:
    with Client(UPLOADS, silent) as client:
        client.wait_ready(armed=False)
        write(silent.source / "upload", "x")
        client.stays_silent()
        write(silent.root / "control", "x")
        events = client.wait_for([Event("finished", "control")])
        assert [event.path for event in events] == ["control"]


@pytest.mark.parametrize("target", [".", "file"])
def test_a_script_waits_for_one_change(place: Place, target: str) -> None:
    """``inotifywait -e modify PATH && deploy``."""
    watcher = inotifywait("inotifywait", "-t", "15", "-e", "modify", target=target)
    write(place.source / "file", "text")
    with Client(watcher, place) as client:
        client.wait_ready(paths=[target])
        write(place.source / "file", "more", "a")
        client.wait_for([Event("MODIFY", "file")])
        assert client.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("target", [".", "file"])
def test_a_script_waits_in_vain_without_an_agent(silent: Place, target: str) -> None:
    watcher = inotifywait("inotifywait", "-t", "2", "-e", "modify", target=target)
    write(silent.source / "file", "text")
    with Client(watcher, silent) as client:
        client.wait_ready(armed=False, paths=[target])
        write(silent.source / "file", "more", "a")
        assert client.process.wait(PATIENCE) == 2, "the exit code of a time-out"
