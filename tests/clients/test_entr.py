"""entr: it watches the listed files themselves, and with -d their directory for new ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harness.mounts import wait_until
from tests.clients.watchers import PATIENCE, Client, Event, Place, Watcher, relative


def parse_entr(line: str, root: Path) -> Iterable[Event]:
    """What the utility prints that entr runs."""
    verb, blank, path = line.partition(" ")
    if blank and verb == "ran":
        yield Event(verb, relative(path, root))


def entr(*options: str) -> Watcher:
    # -n: no terminal; -p: the first run only after a change
    return Watcher(
        "entr",
        lambda root: ["entr", "-n", "-p", *options, "echo", "ran", "/_"],
        parse_entr,
        says_ready=False,
    )


def start(watcher: Watcher, place: Place) -> Client:
    names = ("one.c", "two.c", "control.c")
    for name in names:
        (place.source / name).write_text("int x;\n")
    return Client(watcher, place, stdin="".join(f"{place.root / name}\n" for name in names))


def wait_idle(client: Client) -> None:
    """Wait for its endless poll: it drops what comes within 50 ms of its start or of a run."""
    syscall = Path(f"/proc/{client.process.pid}/syscall")

    def polls_without_end() -> bool:
        arguments = syscall.read_text().split()[1:]
        return len(arguments) > 2 and int(arguments[2], 16) & 0xFFFFFFFF == 0xFFFFFFFF

    wait_until(polls_without_end, what="entr polls without end")


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("int y;\n")


def save(path: Path) -> None:
    beside = path.with_name("beside.tmp")
    beside.write_text("int z;\n")
    beside.rename(path)


def test_a_change_of_a_listed_file_runs_the_utility(place: Place) -> None:
    with start(entr(), place) as client:
        client.wait_ready(paths=["one.c", "two.c"])
        for name in ("one.c", "two.c", "one.c"):
            wait_idle(client)
            since = len(client.events)
            append(place.source / name)
            client.wait_for([Event("ran", name)], since)


def test_a_file_saved_by_an_editor_stays_watched(place: Place) -> None:
    with start(entr(), place) as client:
        client.wait_ready(paths=["one.c", "two.c"])
        for change in (save, save, append):
            wait_idle(client)
            since = len(client.events)
            change(place.source / "one.c")
            client.wait_for([Event("ran", "one.c")], since)
            place.wait_armed(client.process.pid, ["one.c"])


def test_a_new_file_ends_it_for_a_new_list(place: Place) -> None:
    """``while :; do ls | entr -d make; done``"""
    with start(entr("-d"), place) as client:
        client.wait_ready(paths=[".", "one.c", "two.c"])
        wait_idle(client)
        (place.source / "three.c").write_text("int three;\n")
        assert client.process.wait(PATIENCE) == 2


def test_nothing_runs_without_an_agent(silent: Place) -> None:
    with start(entr("-d"), silent) as client:
        client.wait_ready(armed=False, paths=[".", "one.c", "two.c", "control.c"])
        wait_idle(client)
        append(silent.source / "one.c")
        save(silent.source / "two.c")
        (silent.source / "three.c").write_text("int three;\n")
        client.stays_silent()
        assert client.process.poll() is None
        append(silent.root / "control.c")
        client.wait_for([Event("ran", "control.c")])
        assert {event.path for event in client.events} == {"control.c"}
