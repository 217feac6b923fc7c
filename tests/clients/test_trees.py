"""Programs that watch a tree: each kind of change on the host arrives, in their own words."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.watchers import GENERAL, NODEMON, Client, Event, Place, Watcher

BEFORE = {
    "old.txt": "old\n",
    "ren.txt": "to be renamed\n",
    "gone.txt": "to be deleted\n",
    "leaving.txt": "to be moved out\n",
    "edit.txt": "to be edited\n",
    "sub/leaf.txt": "leaf\n",
    "sub/deep/leaf.txt": "deep leaf\n",
    "sub/goes.txt": "to another directory\n",
    "dir-old/content.txt": "content\n",
    "control/ping.txt": "ping\n",
}


def fill(source: Path) -> None:
    """The tree as the watcher finds it."""
    for name, text in BEFORE.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (source / "empty").mkdir()


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def save(path: Path, text: str) -> None:
    """As editors do: a new file beside it, then a rename over the old one."""
    beside = path.with_name("4913.tmp")
    beside.write_text(text)
    beside.rename(path)


@dataclass(frozen=True)
class Step:
    """A change on the host and what must come of it."""

    name: str
    change: Callable[[Place], object]
    reported: list[tuple[str, str]]
    """(plain word, path): what the program says, as far as it has a word for it."""
    arms: str | None = None
    """The new inode whose mark is waited for before the next step."""
    reads: tuple[str, str] | None = None
    """(path, text): what the program's handler reads, as late as at its last event."""


STEPS = [
    Step(
        "create a file",
        lambda place: (place.source / "new.txt").write_text("new\n"),
        [("create", "new.txt"), ("written", "new.txt")],
        reads=("new.txt", "new\n"),
    ),
    Step(
        "modify a file",
        lambda place: append(place.source / "old.txt", "and more\n"),
        [("modify", "old.txt"), ("written", "old.txt")],
        reads=("old.txt", "old\nand more\n"),
    ),
    Step(
        "modify a file two levels down",
        lambda place: append(place.source / "sub/deep/leaf.txt", "and more\n"),
        [("modify", "sub/deep/leaf.txt"), ("written", "sub/deep/leaf.txt")],
        reads=("sub/deep/leaf.txt", "deep leaf\nand more\n"),
    ),
    Step(
        "shorten a file",
        lambda place: os.truncate(place.source / "sub/leaf.txt", 1),
        [("modify", "sub/leaf.txt")],
        reads=("sub/leaf.txt", "l"),
    ),
    Step(
        "change a file's mode",
        lambda place: (place.source / "old.txt").chmod(0o600),
        [("attrib", "old.txt")],
    ),
    Step(
        "save as an editor does",
        lambda place: save(place.source / "edit.txt", "edited\n"),
        [("saved", "edit.txt")],
        arms="edit.txt",
        reads=("edit.txt", "edited\n"),
    ),
    Step(
        "rename a file",
        lambda place: (place.source / "ren.txt").rename(place.source / "renamed.txt"),
        [("moved from", "ren.txt"), ("moved to", "renamed.txt")],
    ),
    Step(
        "rename a file into another directory",
        lambda place: (place.source / "sub/goes.txt").rename(place.source / "went.txt"),
        [("moved from", "sub/goes.txt"), ("moved to", "went.txt")],
    ),
    Step(
        "delete a file",
        lambda place: (place.source / "gone.txt").unlink(),
        [("delete", "gone.txt")],
    ),
    Step(
        "save once more: the new inode is watched",
        lambda place: save(place.source / "edit.txt", "edited once more\n"),
        [("saved", "edit.txt")],
        arms="edit.txt",
        reads=("edit.txt", "edited once more\n"),
    ),
    Step(
        "make a directory",
        lambda place: (place.source / "fresh").mkdir(),
        [("mkdir", "fresh")],
        arms="fresh",
    ),
    Step(
        "create a file in the new directory",
        lambda place: (place.source / "fresh/inside.txt").write_text("inside\n"),
        [("create", "fresh/inside.txt")],
        reads=("fresh/inside.txt", "inside\n"),
    ),
    Step(
        "rename a directory",
        lambda place: (place.source / "dir-old").rename(place.source / "dir-new"),
        [("dir moved from", "dir-old"), ("dir moved to", "dir-new")],
    ),
    Step(
        "delete a directory",
        lambda place: (place.source / "empty").rmdir(),
        [("rmdir", "empty")],
    ),
    Step(
        "move a file in",
        lambda place: (place.outside / "arrives.txt").rename(place.source / "arrived.txt"),
        [("moved in", "arrived.txt")],
    ),
    Step(
        "move a file out",
        lambda place: (place.source / "leaving.txt").rename(place.outside / "left.txt"),
        [("moved out", "leaving.txt")],
    ),
    Step(
        "modify the saved file",
        lambda place: append(place.source / "edit.txt", "in place\n"),
        [("modify", "edit.txt")],
        reads=("edit.txt", "edited once more\nin place\n"),
    ),
]


def prepare(place: Place) -> None:
    fill(place.source)
    (place.outside / "arrives.txt").write_text("from outside\n")


def run(step: Step, client: Client) -> str | None:
    """Do the step; what is wrong with what the program said of it."""
    place, words = client.place, client.watcher.words
    wanted = [Event(words[plain], path) for plain, path in step.reported if plain in words]
    if wanted and client.watcher is NODEMON:
        wanted.append(Event("restart", "."))  # what its user waits for
    client.pace()
    since = len(client.events)
    step.change(place)
    try:
        client.wait_for(wanted, since)
        if step.arms and ((place.source / step.arms).is_dir() or client.watcher.marks_files):
            place.wait_armed(client.process.pid, [step.arms])
    except AssertionError as error:
        return f"{step.name}: {error}"
    if step.reads:
        path, text = step.reads

        def read(events: list[Event]) -> list[str]:
            return [event.text for event in events if event.path == path and event.text is not None]

        # The last event's handler must see the final content; earlier ones may see it or less.
        if read(client.events) and not client.wait_until(
            lambda events: read(events)[-1:] == [text], since, 5
        ):
            return f"{step.name}: the handler has read {read(client.events[since:])}, not {text!r}"
    return None


@pytest.mark.parametrize("watcher", GENERAL, ids=str)
def test_changes_on_the_host_arrive(watcher: Watcher, place: Place) -> None:
    prepare(place)
    with Client(watcher, place) as client:
        client.wait_ready()
        faults = [fault for step in STEPS if (fault := run(step, client))]
        assert not faults, "\n".join(faults)


@pytest.mark.parametrize("watcher", GENERAL, ids=str)
def test_nothing_arrives_without_an_agent(watcher: Watcher, silent: Place) -> None:
    """The counterpart: the program gets only the change that was made through the mount."""
    prepare(silent)
    with Client(watcher, silent) as client:
        client.wait_ready(armed=False)
        since = len(client.events)
        for step in STEPS:
            step.change(silent)
        client.stays_silent()
        append(silent.root / "control/ping.txt", "pong\n")
        client.wait_for([Event(watcher.words["modify"], "control/ping.txt")], since)
        heard = {event.path for event in client.events[since:]}
        assert heard <= {".", "control", "control/ping.txt"}  # directories are said to be modified
        # They are there for whoever looks: only the announcement was missing.
        assert (silent.root / "renamed.txt").is_file()
        assert (silent.root / "edit.txt").read_text().endswith("in place\n")
