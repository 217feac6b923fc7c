"""What a guest's kernel keeps, in each mode of --cache: never what somebody there watches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from fsd.fuse.nodes import CACHE_MODES
from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import Guest, guest

_PROGRAM = """
import ctypes, os, sys
path = sys.argv[1]
kept = os.open(path, os.O_RDONLY)
def look():
    status = os.stat(path)
    with open(path) as file:
        opened = file.read()
    held = os.pread(kept, 9, 0).decode()
    os.stat(path)  # reading has put its atime in doubt, and the kernel asks for all or nothing
    print(status.st_mtime_ns, opened, held, len(os.listdir(os.path.dirname(path))), flush=True)
look()
"""
"""Prints what is to be seen of a file: its mtime, what a new open and what an old one reads, and
how many files are beside it."""
LOOK = (
    _PROGRAM
    + """
for line in sys.stdin:
    look()
"""
)
"""Looks when asked to."""
WATCH = (
    _PROGRAM
    + """
libc = ctypes.CDLL(None)
inotify = libc.inotify_init1(0)
assert libc.inotify_add_watch(inotify, os.path.dirname(path).encode(), 2) > 0  # IN_MODIFY
print("watching", flush=True)
while os.read(inotify, 4096):
    look()
"""
)
"""Looks, watches, and looks at each MODIFY."""


class Side(NamedTuple):
    """A share in its mode."""

    mode: str
    source: Path
    vm: Guest

    @property
    def mountpoint(self) -> str:
        return f"/{self.mode}"

    def change(self, name: str, text: str) -> str:
        """On the host, make a file, then change another, its size remaining. What is then to be
        seen of its mtime."""
        path = self.source / name
        path.with_name(text).touch()
        with path.open("r+") as file:
            file.write(text)
        return str(path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Side]]:
    with ExitStack() as stack:
        sources, shares = {}, {}
        for mode in CACHE_MODES:
            source = sources[mode] = tmp_path_factory.mktemp(mode)
            for directory in ("seen", "other"):
                (source / directory).mkdir()
                (source / directory / "f").write_text("old")
            shares[mode] = stack.enter_context(shared(source, cache=mode)).paths[0]
        machine = stack.enter_context(guest(shares))
        for mode in CACHE_MODES:
            machine.mount(mode, f"/{mode}")
            agent = machine.start(["/fsd-guest.pyz", "agent", f"/{mode}"])
            agent.wait_output("ready", 60)
        yield {mode: Side(mode, source, machine) for mode, source in sources.items()}


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_what_is_watched_is_new_at_each_event(vm: dict[str, Side], mode: str) -> None:
    """Also what the kernel had kept from before the watch."""
    side = vm[mode]
    watcher = side.vm.start(["python3", "-c", WATCH, f"{side.mountpoint}/seen/f"])
    assert watcher.line().split()[1:] == ["old", "old", "1"]
    assert watcher.line() == "watching"
    wait_until(lambda: _armed(side), 20, "a mark in the server")
    for count, text in (("2", "new"), ("3", "two")):
        mtime = side.change("seen/f", text)
        assert watcher.line().split() == [mtime, text, text, count]
    watcher.signal()


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_what_nobody_watches_is_as_old_as_its_mode_says(vm: dict[str, Side], mode: str) -> None:
    side = vm[mode]
    looker = side.vm.start(["python3", "-c", LOOK, f"{side.mountpoint}/other/f"])
    old, *data = looker.line().split()
    assert data == ["old", "old", "1"]
    mtime = side.change("other/f", "new")
    assert mtime != old
    if mode == "auto":
        time.sleep(1.2)  # that is what it promises
    looker.write(b"\n")
    expected = {
        "never": [mtime, "new", "new", "2"],
        "auto": [mtime, "new", "new", "2"],
        "metadata": [old, "new", "new"],  # and a listing that may be old
        "always": [old, "old", "old"],
    }
    wanted = expected[mode]
    assert looker.line().split()[: len(wanted)] == wanted
    looker.write(None)


def _armed(side: Side) -> bool:
    command = ["/fsd-guest.pyz", "marks", side.mountpoint, "--json"]
    return any(mark["armed"] for mark in json.loads(side.vm.run(command).stdout))
