"""Servers that end under a running guest: restart, upgrade and SIGKILL, and the guest goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.agents import start_agent, start_watcher, status
from tests.support.mounts import wait_until
from tests.support.share_server import Share, inside, shared
from tests.support.vm import guest

Restart = Callable[[], None]


@contextmanager
def kept(source: Path) -> Iterator[tuple[Share, dict[str, Restart]]]:
    """A share with a keeper, and the ways to start it again."""
    with shared(source, 1, "--keep") as server:
        keeper = server.keeper

        def serving() -> int:
            """The process that guests reach."""
            return inside(inside(keeper))

        def again(end: Callable[[int], None]) -> None:
            before = serving()
            end(before)
            wait_until(lambda: serving() not in (before, keeper), 20, "another server")

        yield (
            server,
            {
                "kill": lambda: again(lambda pid: os.kill(pid, signal.SIGKILL)),
                "replace": lambda: again(lambda _: os.kill(keeper, signal.SIGUSR2)),
            },
        )


def test_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("content\n")
    with kept(source) as (server, restarts), guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        vm.run("mkdir /mnt/dir; echo one > /mnt/dir/file")
        agent = start_agent(vm)
        watcher = start_watcher(vm)
        (source / "first").touch()
        watcher.wait_output("CREATE first")
        reader = vm.start(["sh", "-c", "cd /mnt/dir; echo un > unlinked; "
                          "exec 3< file 4>> log 5<> unlinked; rm unlinked; echo ready; "
                          "while read line; do eval \"$line\"; done"])
        assert reader.line() == "ready"
        for name, restart in restarts.items():
            restart()
            assert vm.run("cat /mnt/file").stdout == "content\n", name
            reader.write(b"pwd; ls\n")
            assert [reader.line() for _ in range(3)] == ["/mnt/dir", "file", "log"]
            (source / name).touch()
            try:
                watcher.wait_output(f"CREATE {name}", 12)
            except Exception:
                print("AGENT", agent.status, agent.stdout, agent.stderr)
                print(vm.run(f"cat /proc/{agent.pid}/wchan; cat /proc/{agent.pid}/stack; for t in /proc/{agent.pid}/task/*; do echo $t; cat $t/wchan; done; ls -l /proc/{agent.pid}/fd", check=False))
                print(status(vm))
                raise
        reader.write(b"read x <&3; echo $x\n")
        assert reader.line() == "one"
