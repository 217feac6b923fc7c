"""Vite's dev server on the mount: an edit on the host becomes a hot update of the page, in the
content that the page then fetches; what cannot be replaced reloads the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.clients.watchers import CHOKIDAR_WINDOW, Client, Event, Place, Watcher, node, parse_json

PROJECT = {
    "index.html": """<!doctype html>
<link rel="stylesheet" href="/linked.css">
<script type="module" src="/main.js"></script>
""",
    "linked.css": "body { color: black }\n",
    "style.css": "p { color: black }\n",
    "main.js": """import './style.css';
import { text } from './src/deep/hot.js';
import { cold } from './src/cold.js';
import './control.js';
export const pages = import.meta.glob('./pages/**/*.js');
console.log(text, cold);
""",
    "src/deep/hot.js": "export const text = 'first';\nimport.meta.hot.accept();\n",
    "src/cold.js": "export const cold = 'cold';\n",
    "pages/home.js": "export default 'home';\n",
    "control.js": "export {};\nimport.meta.hot.accept();\n",
}
URLS = (
    *("/main.js", "/style.css", "/linked.css", "/control.js"),
    *("/src/deep/hot.js", "/src/cold.js", "/pages/home.js"),
)
HOT = "src/deep/hot.js"


def vite(cache: Path) -> Watcher:
    return Watcher(
        "vite",
        lambda root: node("vite.mjs", root, cache, *URLS),
        parse_json,
        marks_files=True,
        in_root=True,
        window=CHOKIDAR_WINDOW,
    )


def start(place: Place) -> Client:
    for name, text in PROJECT.items():
        path = place.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cache = place.source.parent / "vite-cache"  # outside: Vite writes there
    return Client(vite(cache), place)


def hot(text: str) -> str:
    return PROJECT[HOT].replace("first", text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def save(path: Path, text: str) -> None:
    """As editors do: a new file beside it, then a rename over the old one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.rename(path)


@dataclass(frozen=True)
class Edit:
    """What is done on the host, and the message that the page gets: word, path, content."""

    name: str
    change: Callable[[Path], object]
    word: str
    path: str
    content: str = ""
    """Must be in what the page then fetches."""
    arms: str | None = None


RELOAD = "full-reload"
EDITS = [
    Edit(
        "write a module that accepts itself",
        lambda source: (source / HOT).write_text(hot("second")),
        *("js-update", HOT, "second"),
    ),
    Edit(
        "write a style sheet that a module imports",
        lambda source: (source / "style.css").write_text("p { color: red }\n"),
        *("js-update", "style.css", "color: red"),
    ),
    Edit(
        "write a style sheet that the page links",
        lambda source: (source / "linked.css").write_text("body { color: blue }\n"),
        *("css-update", "linked.css?direct", "color: blue"),
    ),
    Edit(
        "save as an editor does",
        lambda source: save(source / HOT, hot("third")),
        *("js-update", HOT, "third"),
        arms=HOT,
    ),
    Edit(
        "write a module that nobody accepts",
        lambda source: (source / "src/cold.js").write_text("export const cold = 'colder';\n"),
        *(RELOAD, "src/cold.js"),
    ),
    Edit(
        "a new file for a glob import",
        lambda source: (source / "pages/about.js").write_text("export default 'about';\n"),
        *(RELOAD, "pages/about.js"),
    ),
    Edit(
        "delete a file of a glob import",
        lambda source: (source / "pages/about.js").unlink(),
        *(RELOAD, "pages/about.js"),
    ),
    Edit(
        "save once more: the new inode is watched",
        lambda source: save(source / HOT, hot("fourth")),
        *("js-update", HOT, "fourth"),
        arms=HOT,
    ),
    Edit(
        "write the page",
        lambda source: (source / "index.html").write_text(PROJECT["index.html"] + "<p>\n"),
        *(RELOAD, "index.html"),
    ),
    Edit(
        "a new directory with a file for a glob import",
        lambda source: write(source / "pages/more/deep.js", "export default 'deep';\n"),
        *(RELOAD, "pages/more/deep.js"),
    ),
    Edit(
        "delete the file in the new directory",
        lambda source: (source / "pages/more/deep.js").unlink(),
        *(RELOAD, "pages/more/deep.js"),
    ),
    Edit(
        "write the saved module in place",
        lambda source: (source / HOT).write_text(hot("fifth")),
        *("js-update", HOT, "fifth"),
    ),
]


def run(edit: Edit, client: Client) -> str | None:
    place = client.place
    client.pace()
    since = len(client.events)
    edit.change(place.source)
    wanted = Event(edit.word, edit.path)

    def fresh(events: list[Event]) -> bool:
        # An update may be announced twice (the file is emptied, then written): the last one counts.
        texts = [event.text or "" for event in events if event[:2] == wanted[:2]]
        return bool(texts) and edit.content in texts[-1]

    try:
        client.wait_for([wanted], since)
        if not client.wait_until(fresh, since, 5):
            return f"{edit.name}: stale content: {client.events[since:]}"
        if edit.arms:
            place.wait_armed(client.process.pid, [edit.arms])
    except AssertionError as error:
        return f"{edit.name}: {error}"
    return None


def test_edits_on_the_host_reach_the_page(place: Place) -> None:
    with start(place) as client:
        client.wait_ready()
        faults = [fault for edit in EDITS if (fault := run(edit, client))]
        assert not faults, "\n".join(faults)


def test_no_edit_reaches_the_page_without_an_agent(silent: Place) -> None:
    with start(silent) as client:
        client.wait_ready(armed=False)
        since = len(client.events)
        for edit in EDITS:
            edit.change(silent.source)
        client.stays_silent()
        with (silent.root / "control.js").open("a") as file:
            file.write("console.log('pong');\n")
        client.wait_for([Event("js-update", "control.js")], since)
        assert {event.path for event in client.events[since:]} == {"control.js"}
