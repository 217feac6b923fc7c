"""A watcher in a guest, saved and made again there: another kernel, virtiofs, and the one file."""

from __future__ import annotations

import json
from pathlib import Path

from harness.guest_agents import start_agent, start_watcher, wait_armed
from harness.share_server import shared
from harness.vm import guest

TOOL = "/fsd-guest.pyz"
READER = """
import os, struct
print(os.getpid(), flush=True)
while True:
    data = os.read(3, 4096)
    while data:
        wd, mask, cookie, size = struct.unpack_from("=iIII", data)
        print(wd, hex(mask), data[16 : 16 + size].rstrip(b"\\0").decode(), flush=True)
        data = data[16 + size :]
"""


def test_a_watcher_of_the_share(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with shared(tmp_path) as server, guest({"share": server.paths[0]}) as vm:
        vm.mount("share")
        start_agent(vm)
        watcher = start_watcher(vm, "/mnt/a", "/mnt/b", "/tmp", "/proc")
        pid = str(watcher.pid)
        done = vm.run([TOOL, "checkpoint", "--search", "/proc", "--pid", pid, "/saved"])
        assert (done.status, done.stderr) == (0, "")
        state = json.loads(vm.run([TOOL, "show", "/saved", "--json"]).stdout)
        assert "virtiofs" in [row["type"] for row in state["filesystems"]]
        (file,) = (row for row in state["files"] if row["kind"] == "inotify")
        assert file["fds"][0]["fd"] == 3
        assert [(row["wd"], row["path"]) for row in file["watches"]] == [
            (1, "/mnt/a"), (2, "/mnt/b"), (3, "/tmp"), (4, "/proc")
        ]  # fmt: skip
        kinds = [row["handle"]["kind"] for row in file["watches"]]
        assert kinds == ["decodable"] * 3 + ["encodable only"]
        before = vm.run(f"grep inotify /proc/{watcher.pid}/fdinfo/3 | sort").stdout
        watcher.signal(9)
        watcher.wait()

        words = [TOOL, "restore", "--overflow", "always", "/saved", "--"]
        again = vm.start([*words, "python3", "-c", READER])
        pid = again.line(30)
        assert "restored 4 watches" in again.stderr
        assert vm.run(f"grep inotify /proc/{pid}/fdinfo/3 | sort").stdout == before
        assert again.line() == "-1 0x4000 "
        wait_armed(vm, int(pid), [Path("/mnt/a"), Path("/mnt/b")])
        (tmp_path / "b" / "new").touch()
        again.wait_output("2 0x100 new")
