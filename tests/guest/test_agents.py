"""Agents that are killed, servers that start again, guests that must not know of one another."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from pathlib import Path

from harness.guest_agents import marks, start_agent, start_watcher, status
from harness.mounts import wait_until
from harness.share_server import shared
from harness.vm import guest


def created(output: str) -> list[str]:
    """Names of inotifywait's CREATE lines."""
    return [line.partition(" ")[2] for line in output.splitlines() if line.startswith("CREATE")]


def test_an_agent_is_killed(tmp_path: Path) -> None:
    """The next one delivers what happened without it, and each event once."""
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        agent = start_agent(vm)
        watcher = start_watcher(vm)
        (tmp_path / "before").touch()
        watcher.wait_output("CREATE before")
        for number in range(2):
            agent.signal(signal.SIGKILL)
            name = f"meanwhile{number}"
            (tmp_path / name).touch()
            if number:
                # It ends only when its read is answered; here that is what bounds the wait.
                assert agent.wait(20).status == -signal.SIGKILL
                wait_until(lambda: not status(vm)["guests"][0]["agent"], 10)
            agent = start_agent(vm)  # the first time while the old one still is in its read
            watcher.wait_output(f"CREATE {name}", 20)
            (tmp_path / f"after{number}").touch()
            watcher.wait_output(f"CREATE after{number}", 20)
        assert created(watcher.stdout) == ["before", "meanwhile0", "after0", "meanwhile1", "after1"]
        assert vm.run("ls /mnt").stdout.split() == sorted(created(watcher.stdout))


def test_two_guests_and_their_interests(tmp_path: Path) -> None:
    """Each sees what it watches, what anyone else does there once and its own once; and nothing
    shows a guest that there is another.
    """
    for name in ("both", "of-one", "of-two"):
        (tmp_path / name).mkdir()
    with (
        shared(tmp_path, guests=2) as server,
        guest({"share": server.paths[0]}, name="one") as one,
        guest({"share": server.paths[1]}, name="two") as two,
    ):
        watchers = []
        for vm, own in ((one, "of-one"), (two, "of-two")):
            vm.mount("share")
            start_agent(vm)
            watchers.append(start_watcher(vm, "/mnt/both", f"/mnt/{own}", form="%e %w%f"))
        one.run("mkdir /mnt/both/by-one /mnt/of-two/by-one /mnt/of-one/by-one")
        two.run("mkdir /mnt/both/by-two /mnt/of-two/by-two /mnt/of-one/by-two")
        for folder in ("of-one", "of-two", "both"):
            (tmp_path / folder / "by-host").mkdir()
        for watcher, own in zip(watchers, ("of-one", "of-two"), strict=True):
            # Marks that are not armed yet get what they missed, after what others get.
            for folder in (own, "both"):
                watcher.wait_output(f"CREATE,ISDIR /mnt/{folder}/by-host", 30)
            seen = [x.removeprefix("/mnt/") for x in created(watcher.stdout)]
            assert sorted(seen) == [
                f"{folder}/{who}"
                for folder in ("both", own)
                for who in ("by-host", "by-one", "by-two")
            ]
        for vm, own, other in ((one, "of-one", "of-two"), (two, "of-two", "of-one")):
            wait_until(lambda: {m["armed"] for m in marks(vm)} == {True}, 20)  # noqa: B023
            assert {m["path"] for m in marks(vm)} == {"/mnt/both", f"/mnt/{own}"}
            (state,) = status(vm)["guests"]
            assert sorted(mark["path"] for mark in state["armed"]) == ["both", own]
            # Of each folder: the other's and the host's. Nothing of what the other one watches.
            # Whether they came at once, and whether its own were seen as such, depends on when
            # the marks were armed.
            assert {k: n["replayed"] for k, n in state["by_kind"].items()} == {"create": 4}
            assert state["failed"] == 0
            assert state["refused"] == 0
            assert f'"{other}' not in json.dumps(status(vm)), "what another guest watches"


def test_a_server_starts_again(tmp_path: Path) -> None:
    """QEMU 7.2 does not connect vhost-user-fs again: calls on the share wait, as for any server,
    the rest of the guest continues, and the next machine on that socket is served.
    """
    source, path = tmp_path / "source", tmp_path / "socket"
    source.mkdir()
    (source / "file").write_text("content\n")
    with ExitStack() as first:
        first.enter_context(shared(source, paths=[path]))
        with guest({"share": path}) as vm:
            vm.mount("share")
            assert vm.run("cat /mnt/file").stdout == "content\n"
            first.close()
            with shared(source, paths=[path]):
                caller = vm.start("ls /mnt")
                vm.run(f"until grep -q request_wait /proc/{caller.pid}/wchan; do :; done")
                assert vm.run("echo lives > /tmp/x; cat /tmp/x").stdout == "lives\n"
                assert caller.status is None
                vm.close()
                with guest({"share": path}) as other:
                    other.mount("share")
                    assert other.run("cat /mnt/file").stdout == "content\n"


FANOTIFY = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
group = libc.fanotify_init(0, os.O_RDONLY)
assert libc.fanotify_mark(group, 0x11, ctypes.c_uint64(8), -100, b"/mnt") == 0  # the mount
print("marked", flush=True)
time.sleep(1000)
"""


def test_what_a_guest_mounts_below_is_its_own(tmp_path: Path) -> None:
    """The host's events are not made in it, not even while the agent works through the mount."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/data").touch()
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        start_agent(vm)
        watcher = start_watcher(vm, "/mnt", "/mnt/sub", form="%e %w%f")
        vm.run("mount -t tmpfs volume /mnt/sub && echo precious > /mnt/sub/data")
        for number in range(2):
            (tmp_path / "sub/data").unlink()
            (tmp_path / "sub/dir").mkdir()
            (tmp_path / "sub/dir").rename(tmp_path / f"sub/dir{number}")
            (tmp_path / f"end{number}").mkdir()
            watcher.wait_output(f"CREATE,ISDIR /mnt/end{number}", 20)
            assert vm.run("ls /mnt/sub; cat /mnt/sub/data").stdout.split() == ["data", "precious"]
            for seen in ("DELETE /mnt/sub/data", f"MOVED_TO,ISDIR /mnt/sub/dir{number}"):
                watcher.wait_output(seen)
            assert not status(vm)["guests"][0]["failed"]
            (tmp_path / "sub/data").touch()
            if not number:
                program = vm.start(["python3", "-c", FANOTIFY])
                program.wait_output("marked")
                wait_until(lambda: any(mark["wd"] < 0 and mark["armed"] for mark in marks(vm)), 40)
