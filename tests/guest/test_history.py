"""In a real guest: its own requests and what the host has just done are one history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.guest_agents import marks, start_agent, status
from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import Guest, GuestProcess, guest

PROGRAM = """
import os, sys
held = []
print("here", flush=True)
for line in sys.stdin:
    what, name = line.split()
    path = f"/mnt/d/{name}"
    if what == "make":
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    elif what == "remove":
        os.unlink(path)
    elif what == "enter":
        os.chdir(path)
        print(*{os.getcwd() for _ in range(200)}, flush=True)
        os.chdir("/")
        continue
    elif what == "open":
        held.append(os.open(path, os.O_RDONLY))
    elif what == "names":
        print(*(os.readlink(f"/proc/self/fd/{fd}") for fd in held), flush=True)
        continue
    print("done", flush=True)
"""


@pytest.mark.parametrize("cache", ["auto", "never"])
def test_host_and_guest_in_turns(tmp_path: Path, cache: str) -> None:
    source = tmp_path / "d"
    source.mkdir()
    with shared(tmp_path, cache=cache) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        start_agent(vm)
        events = ["-e", "create", "-e", "delete", "-e", "move"]
        watcher = vm.start(["inotifywait", "-m", "--format", "%e %f", *events, "/mnt/d"])
        watcher.wait_output("Watches established.", of="err")
        wait_until(lambda: any(mark["armed"] for mark in marks(vm)), 60, "a mark in the server")
        program = vm.start(["python3", "-c", PROGRAM])
        assert program.line() == "here"

        def storm() -> None:
            for i in range(10):
                (source / f"s{i}").touch()
                (source / f"s{i}").unlink()

        made_anew(program, source, storm)
        in_use(program, source, storm)
        (source / "end").touch()
        watcher.wait_output("CREATE end", 60)
        reported = [line.split() for line in watcher.stdout.splitlines()]
        last = {name: kind for kind, name in reported if kind in ("CREATE", "DELETE")}
        assert {last[name] for name in ("x0", "x1", "x2")} == {"CREATE"}
        assert {last[name] for name in ("y0", "y1", "y2")} == {"DELETE"}
        counts = figures(vm)
        assert counts["waited"]
        if not counts["repeated"]:
            kinds = [
                kind for kind, name in reported if name == "x1" and kind in ("CREATE", "DELETE")
            ]
            assert kinds == ["CREATE", "DELETE", "CREATE"]


def made_anew(program: GuestProcess, source: Path, storm: Callable[[], None]) -> None:
    for i in range(3):
        (source / f"x{i}").touch()
        storm()
        (source / f"x{i}").unlink()
        program.write(b"make x%d\n" % i)
        assert program.line() == "done"
        storm()
        (source / f"y{i}").touch()
        program.write(b"remove y%d\n" % i)
        assert program.line() == "done"


def in_use(program: GuestProcess, source: Path, storm: Callable[[], None]) -> None:
    for i in range(10):
        storm()
        (source / f"dir{i}").mkdir()
        program.write(b"enter dir%d\n" % i)
        assert program.line() == f"/mnt/d/dir{i}"
        (source / "new").touch()
        (source / "new").rename(source / f"file{i}")
        program.write(b"open file%d\n" % i)
        assert program.line() == "done"
    program.write(b"names -\n")
    assert program.line() == " ".join(f"/mnt/d/file{i}" for i in range(10))


def figures(vm: Guest) -> dict[str, int]:
    """The server's, of the guest."""
    (mount,) = (each for each in status(vm)["guests"] if each["kind"] == "mount")
    found: dict[str, int] = mount
    return found
