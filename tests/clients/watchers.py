"""Real watcher programs as processes of their own: how each is started, and how its words are read.

Apart from the tests, because each program runs in many places: natively on a plain directory (which
shows that driver and expectation are right), on a mount, and on one without an agent (the
counterpart).
Every program's output becomes Events with paths relative to the watched root; a program's own words
for what happened are kept: ``Watcher.words`` is its vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from harness.mounts import Mount, wait_until

HERE = Path(__file__).parent
DRIVERS = HERE / "drivers"
MODULES = HERE / "node_modules"

PATIENCE = 15.0
"""The bound of a wait for an event: two busy cores, and a node process that just started."""

QUIET = 1.0
"""How long a counterpart listens before its control change: many times what an event takes."""


class Event(NamedTuple):
    """What a program said: its own word, the path below the root, the content that it then read."""

    word: str
    path: str
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.word} {self.path}"


READY = Event("(ready)", "")

Parser = Callable[[str, Path], Iterable[Event]]


def relative(path: str, root: Path) -> str:
    """``path`` as seen from ``root``; as it is if it lies elsewhere."""
    return os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path)


# --- The place ------------------------------------------------------------------------------------


def kernel_marks(pid: int) -> set[tuple[int, int]]:
    """(st_ino, st_dev) of each inode that process ``pid`` watches by inotify or fanotify."""
    found = set()
    for fdinfo in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = fdinfo.read_text().splitlines()
        except OSError:
            continue  # closed while we looked
        for line in lines:
            words = line.split()
            if words and words[0] in ("inotify", "fanotify") and "ino:" in line:
                values = dict(word.split(":", 1) for word in words[1:])
                device = int(values["sdev"], 16)
                found.add((int(values["ino"], 16), os.makedev(device >> 20, device & 0xFFFFF)))
    return found


@dataclass(frozen=True)
class Place:
    """Where a program watches, ``root``, and where that is changed, ``source``: the host's side."""

    source: Path
    root: Path
    mount: Mount | None = None

    @property
    def outside(self) -> Path:
        """A directory of the host, of the same file system, that is not shared."""
        path = self.source.parent / "outside"
        path.mkdir(exist_ok=True)
        return path

    def wait_marked(self, pid: int, paths: Iterable[str], timeout: float = PATIENCE) -> None:
        """Wait until the kernel has marks of ``pid`` on the paths, armed by a server or not."""
        # Looked up on the source, whose inode numbers the mount shows: a look-up in the mount would
        # be one of those by which the server learns what may be watched.
        device = self.root.stat().st_dev
        inodes = {path: ((self.source / path).stat().st_ino, device) for path in paths}

        def missing() -> list[str]:
            marks = kernel_marks(pid)
            return [path for path, inode in inodes.items() if inode not in marks]

        try:
            wait_until(lambda: not missing(), timeout)
        except AssertionError:
            left = missing()
            message = f"after {timeout} s process {pid} has no mark on these {len(left)} paths"
            raise AssertionError(f"{message} of {len(inodes)}: {left[:20]}") from None

    def wait_armed(self, pid: int, paths: Iterable[str], timeout: float = PATIENCE) -> None:
        """Wait until ``pid`` has marks below the root, and until the server has armed them."""
        names = list(paths)
        self.wait_marked(pid, names, timeout)  # first, because it is the cheaper question
        if self.mount is None:
            return
        wanted = {str(self.root / name) for name in names}
        try:
            self.mount.wait_armed(*map(Path, wanted), pid=pid, timeout=timeout)
        except AssertionError:
            marks = self.mount.marks()
            left = wanted - {mark["path"] for mark in marks if mark["armed"] and mark["pid"] == pid}
            message = f"after {timeout} s the server has not armed these {len(left)} marks"
            raise AssertionError(f"{message} of {len(wanted)}: {sorted(left)[:20]}") from None


# --- The programs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watcher:
    """A program: its command line for a root, the parser of its output and its vocabulary."""

    name: str
    command: Callable[[Path], list[str]]
    parse: Parser
    words: Mapping[str, str] = field(default_factory=dict)
    """The program's word for each plain one (create, modify, ...); what it never says is absent."""
    marks_files: bool = False
    """It has a mark on each file too, not only on directories."""
    in_root: bool = False
    """It is run with the root as its working directory, as its users run it."""
    says_ready: bool = True
    window: float = 0
    """How long it drops further changes of a path by design; a test keeps them apart by that."""

    def __str__(self) -> str:
        return self.name


def parse_json(line: str, root: Path) -> Iterable[Event]:
    """Lines of our own drivers."""
    if not line.startswith("{"):
        return  # the library's own chatter; kept in Client.lines for the report of a failure
    said: dict[str, Any] = json.loads(line)
    if said.get("ready"):
        yield READY
    elif dest := said.get("dest"):
        yield Event(f"{said['event']}_from", relative(said["path"], root))
        yield Event(f"{said['event']}_to", relative(dest, root))
    else:
        yield Event(said["event"], relative(said["path"], root), said["text"])


def parse_inotifywait(line: str, root: Path) -> Iterable[Event]:
    """``--format %e|%w%f``: names of events with commas; fanotify merges several into one line."""
    if line == "Watches established.":
        yield READY
        return
    words, bar, path = line.partition("|")
    if bar:
        names = words.split(",")
        path = path.removesuffix(" (deleted)")  # fsnotifywait takes the path from /proc/self/fd
        isdir = ",ISDIR" if "ISDIR" in names else ""
        for name in names:
            if name not in ("ISDIR", "CLOSE"):  # CLOSE only repeats CLOSE_WRITE or CLOSE_NOWRITE
                yield Event(name + isdir, relative(path, root))


class Nodemon:
    """Lines of ``nodemon --verbose``; it names a file when it has heard of it, then restarts."""

    CHECK = "[nodemon] files triggering change check: "

    def __call__(self, line: str, root: Path) -> Iterable[Event]:
        if line.startswith("[nodemon] watching ") and line.endswith((" file", " files")):
            yield READY
        elif line.startswith(self.CHECK):
            for path in line.removeprefix(self.CHECK).split(", "):
                yield Event("check", relative(path, root))
        elif line == "[nodemon] restarting due to changes...":
            yield Event("restart", ".")


def node(script: str, *arguments: str | Path) -> list[str]:
    """A script of a package from package-lock.json, or one of our drivers."""
    package = MODULES / script
    assert MODULES.is_dir(), f"{MODULES} is missing: run script/bootstrap (npm ci in {HERE})"
    return ["node", str(package if package.exists() else DRIVERS / script), *map(str, arguments)]


def python(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(DRIVERS / script), *map(str, arguments)]


INOTIFY_WORDS = {
    "create": "CREATE",
    "modify": "MODIFY",
    "written": "CLOSE_WRITE",
    "attrib": "ATTRIB",
    "delete": "DELETE",
    "moved from": "MOVED_FROM",
    "moved to": "MOVED_TO",
    "moved in": "MOVED_TO",
    "moved out": "MOVED_FROM",
    "saved": "MOVED_TO",
    "mkdir": "CREATE,ISDIR",
    "rmdir": "DELETE,ISDIR",
    "dir moved from": "MOVED_FROM,ISDIR",
    "dir moved to": "MOVED_TO,ISDIR",
}
CHOKIDAR_WORDS = {
    "create": "add",
    "modify": "change",
    "delete": "unlink",
    "moved from": "unlink",
    "moved to": "add",
    "moved in": "add",
    "moved out": "unlink",
    "saved": "change",
    "mkdir": "addDir",
    "rmdir": "unlinkDir",
    "dir moved from": "unlinkDir",
    "dir moved to": "addDir",
}

CHOKIDAR_WINDOW = 0.06
"""chokidar announces no second change of a path within 50 ms."""

FORMAT = ("--format", "%e|%w%f")
CHANGES = "create,modify,attrib,close_write,delete,move"
"""Without open, access and close_nowrite: a recursive watcher makes those itself when it lists."""

INOTIFYWAIT = Watcher(
    "inotifywait-r",
    lambda root: ["inotifywait", "-m", "-r", "-e", CHANGES, *FORMAT, str(root)],
    parse_inotifywait,
    INOTIFY_WORDS,
)
FSNOTIFYWAIT = Watcher(
    "fsnotifywait-r",
    lambda root: ["fsnotifywait", "-F", "-m", "-r", "-e", CHANGES, *FORMAT, str(root)],
    parse_inotifywait,
    INOTIFY_WORDS,
)
WATCHDOG = Watcher(
    "watchdog",
    lambda root: python("watchdog_driver.py", root, "--text"),
    parse_json,
    {
        "create": "created",
        "modify": "modified",
        "written": "closed",
        "attrib": "attrib",
        "delete": "deleted",
        "moved from": "moved_from",
        "moved to": "moved_to",
        "moved in": "created",
        "moved out": "deleted",
        "saved": "moved_to",
        "mkdir": "created",
        "rmdir": "deleted",
        "dir moved from": "moved_from",
        "dir moved to": "moved_to",
    },
)
WATCHFILES = Watcher(
    "watchfiles",
    lambda root: python("watchfiles_driver.py", root, "--text"),
    parse_json,
    {
        "create": "added",
        "modify": "modified",
        "attrib": "modified",
        "delete": "deleted",
        "moved from": "deleted",
        "moved to": "added",
        "moved in": "added",
        "moved out": "deleted",
        "saved": "added",
        "mkdir": "added",
        "rmdir": "deleted",
        "dir moved from": "deleted",
        "dir moved to": "added",
    },
)
CHOKIDAR = Watcher(
    "chokidar",
    lambda root: node("chokidar.mjs", root, "--text"),
    parse_json,
    CHOKIDAR_WORDS,
    marks_files=True,
    window=CHOKIDAR_WINDOW,
)
NODEMON = Watcher(
    "nodemon",
    # -I: it reads no commands; --delay: restarts follow the change by a tenth of a second, not one
    lambda root: node(
        *("nodemon/bin/nodemon.js", "--no-colors", "-V", "-I", "-w", "."),
        *("-e", "txt", "--delay", "0.1", "--exec", "true"),
    ),
    Nodemon(),
    {
        plain: "check"
        for plain, word in CHOKIDAR_WORDS.items()
        if not word.endswith("Dir")  # it restarts for files only
    },
    marks_files=True,
    in_root=True,
    window=CHOKIDAR_WINDOW,
)
GENERAL = [INOTIFYWAIT, FSNOTIFYWAIT, WATCHDOG, WATCHFILES, CHOKIDAR, NODEMON]
"""Those that watch a tree and name what has changed; entr and Vite have tests of their own."""


# --- The process ----------------------------------------------------------------------------------


class Client:
    """A running watcher; use it as a context manager, inside the mount's."""

    def __init__(self, watcher: Watcher, place: Place, *, stdin: str | None = None) -> None:
        self.watcher = watcher
        self.place = place
        self.events: list[Event] = []
        self.lines: list[str] = []
        self._changed = threading.Condition()
        environment = {key: value for key, value in os.environ.items() if "CHOKIDAR" not in key}
        self.process = subprocess.Popen(
            watcher.command(place.root),
            cwd=place.root if watcher.in_root else place.source.parent,
            env=environment | {"NO_UPDATE_NOTIFIER": "1", "PYTHONPATH": "", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
        )
        if stdin is not None:
            assert self.process.stdin is not None
            self.process.stdin.write(stdin)
            self.process.stdin.close()
        # Apart, because long lines written to one pipe by two threads would be mixed up.
        outputs = [pipe for pipe in (self.process.stdout, self.process.stderr) if pipe is not None]
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in outputs
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                if not line.endswith("\n"):
                    break  # it was ended in the middle of a word
                events = list(self.watcher.parse(line.rstrip("\n"), self.place.root))
                with self._changed:
                    self.lines.append(line)
                    self.events += events
                    self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for reader in self._readers:
            reader.join(5)
        if error is not None:
            said = "".join(self.lines[-60:])
            where = "mount" if self.place.root != self.place.source else "native"
            error.add_note(f"--- {self.watcher} ({where}) wrote, at the end:\n{said}")

    def pace(self) -> None:
        """Change nothing sooner than its users would: within its window it would not say so."""
        time.sleep(self.watcher.window)

    def tree(self) -> list[str]:
        """What it has marks on by its nature: each directory, for some programs each file too."""
        found = ["."]
        for top, directories, files in os.walk(self.place.source):
            names = directories + (files if self.watcher.marks_files else [])
            found += [os.path.relpath(os.path.join(top, name), self.place.source) for name in names]
        return found

    def wait_ready(self, *, armed: bool = True, paths: Iterable[str] | None = None) -> None:
        """Wait until it says that it is ready and its marks (all, or ``paths``) can work.

        ``armed=False`` is for counterparts: nothing arms marks there, the kernel's list must do.
        """
        if self.watcher.says_ready:
            self.wait_for([READY])
        paths = self.tree() if paths is None else paths
        if armed:
            self.place.wait_armed(self.process.pid, paths)
        else:
            self.place.wait_marked(self.process.pid, paths)

    def wait_until(
        self, condition: Callable[[list[Event]], bool], since: int, timeout: float
    ) -> bool:
        """Wait until ``condition`` holds for the events since then: False if it never does."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not condition(self.events[since:]):
                left = deadline - time.monotonic()
                if left <= 0 or not any(reader.is_alive() for reader in self._readers):
                    return condition(self.events[since:])
                self._changed.wait(min(left, 0.5))
        return True

    def wait_for(
        self, wanted: Iterable[Event], since: int = 0, timeout: float = PATIENCE
    ) -> list[Event]:
        """Wait for all of ``wanted``, in any order; the events since then, or AssertionError."""
        keys = {event[:2] for event in wanted}
        found = self.wait_until(
            lambda events: keys <= {event[:2] for event in events}, since, timeout
        )
        events = self.events[since:]
        missing = sorted(" ".join(key) for key in keys - {event[:2] for event in events})
        said = [str(event) for event in events]
        assert found, f"{self.watcher} has not said {missing}; since then it has said {said}"
        return events

    def stays_silent(self, seconds: float = QUIET) -> None:
        """Nothing is reported for that long. Only for counterparts: absence takes time."""
        since = len(self.events)
        self.wait_until(bool, since, seconds)
        said = [str(event) for event in self.events[since:]]
        assert not said, f"{self.watcher} has heard of a change that nobody announced: {said}"
