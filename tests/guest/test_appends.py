"""Guests and the host append to one file: in each mode of --cache, and past a new server."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fsd.fuse.nodes import CACHE_MODES
from harness.appending import check, line
from harness.restarts import kept
from harness.share_server import shared
from harness.vm import Guest, GuestProcess, guest

PROGRAM = ("-m", "harness.appending")
LINES = 300
"""Of a guest's writer; the host's, which is faster, writes ten times as many."""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, dict[str, Path]]]:
    """Each mode's share, as two guests: /MODE-0 and /MODE-1."""
    with ExitStack() as stack:
        sources: dict[str, Path] = {}
        shares: dict[str, Path] = {}
        for mode in CACHE_MODES:
            sources[mode] = tmp_path_factory.mktemp(mode)
            server = stack.enter_context(shared(sources[mode], 2, cache=mode))
            shares |= {f"{mode}-{number}": path for number, path in enumerate(server.paths)}
        machine = stack.enter_context(guest(shares))
        for name in shares:
            machine.mount(name, f"/{name}")
        yield machine, sources


def started(machine: Guest, *arguments: str) -> GuestProcess:
    process = machine.start(["python3", *PROGRAM, *arguments], cwd="/suite")
    assert process.line(60) == "READY"
    return process


def on_the_host(path: Path, who: str) -> subprocess.Popen[str]:
    command = [sys.executable, *PROGRAM, "write", str(path), who, str(10 * LINES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_no_line_is_lost(vm: tuple[Guest, dict[str, Path]], mode: str) -> None:
    machine, sources = vm
    log = sources[mode] / "log"
    log.touch()
    lines = {"a": LINES, "b": LINES, "c": LINES, "host": 10 * LINES}
    size = sum(len(line(who, i)) for who, count in lines.items() for i in range(count))
    writers = [
        started(machine, "write", f"/{mode}-{number}/log", who, str(LINES))
        for who, number in (("a", 0), ("b", 0), ("c", 1))
    ]
    with on_the_host(log, "host") as host:
        reader = started(machine, "read", f"/{mode}-1/log", str(size - 1))
        for writer in writers:
            assert writer.line(120) == "0"
        assert host.communicate(timeout=120)[0].split() == ["READY", "0"]
    content = log.read_bytes()
    check(content, lines)
    last = started(machine, "write", f"/{mode}-1/log", "last", "1")  # the reader's kernel asks anew
    assert last.line(60) == "0"
    assert reader.line(120) == hashlib.sha256(content[: size - 1]).hexdigest()


@pytest.mark.parametrize("way", ["replace", "kill"])
def test_no_line_is_lost_by_a_restart(tmp_path: Path, way: str) -> None:
    """What a server was doing when it was killed may be done or not, and is not done twice."""
    with (
        kept(tmp_path / "source") as server,
        guest({"share": server.share.paths[0]}) as machine,
    ):
        machine.mount("share")
        log = server.source / "log"
        log.touch()
        writer = started(machine, "write", "/mnt/log", "guest", str(5 * LINES))
        with on_the_host(log, "host") as host:
            for _ in range(4):
                server.again(way)
            assert host.communicate(timeout=120)[0].split() == ["READY", "0"]
        unsure = int(writer.line(120))
        assert unsure == 0 if way == "replace" else unsure <= 4
        check(log.read_bytes(), {"guest": 5 * LINES, "host": 10 * LINES}, unsure=unsure)
