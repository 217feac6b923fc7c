"""An upgrade under load: a guest works on its share and watches it, the host changes files without
a pause, and the server is replaced again and again.

    script/demo-upgrade
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from harness.guest_agents import start_agent, wait_armed
from harness.mounts import wait_until
from harness.restarts import NAMES, Stop, kept, native_watcher, storm
from harness.vm import guest

UPGRADES = 5


def main() -> int:
    """Run the demo; returns the exit status."""
    say = Console().print
    with tempfile.TemporaryDirectory(prefix="fsd-demo-") as top:
        say("$ fsd virtiofs --keep --shared-dir=… --socket-path=…, and a guest of Debian's")
        with (
            kept(Path(top, "share"), "--log-level=error") as server,
            guest({"share": server.share.paths[0]}) as vm,
        ):
            folder = server.source / "storm"
            folder.mkdir()
            vm.mount("share")
            start_agent(vm)
            busy = vm.start(["python3", "-m", "harness.busy_files", "/mnt/b"], cwd="/suite")
            busy.line(20)
            say("guest# inotifywait -m /mnt/storm, and a program that works on files of the share")
            watcher = vm.start(["inotifywait", "-m", *NAMES, "--format", "%e %f", "/mnt/storm"])
            watcher.wait_output("Watches established.", of="err")
            wait_armed(vm, watcher.pid, [Path("/mnt/storm")])
            say("host$ inotifywait -m …/storm, and files that come, move and go there")
            stop = Stop()
            with native_watcher(folder) as native, ThreadPoolExecutor() as threads, stop:
                stormed = threads.submit(storm, folder, stop)
                for _ in range(UPGRADES):
                    time.sleep(1)
                    begun = time.monotonic()
                    server.again("replace")
                    took = time.monotonic() - begun
                    say(f"host$ kill -USR2 …   [green]another server, {took:.2f} s[/green]")
                stop.set()
                steps = stormed.result()
                (folder / "last").touch()
                watcher.wait_output("CREATE last", 60)
                wait_until(lambda: "CREATE last" in native.read_text(), 5)
                there = native.read_text().splitlines()
            busy.write(None)
            busy.wait()
            here = watcher.stdout.splitlines()
            rounds, longest, *failures = busy.stdout.splitlines()[1:]
            kinds = Counter(line.partition(" ")[0] for line in there)
            say(f"\n{steps} steps of the host: {dict(kinds)}")
            say(f"the same events in the guest, in the same order: [bold]{here == there}[/bold]")
            say(f"{rounds} rounds of the guest's program, the longest {longest} s")
            say(f"calls that failed: [bold]{len(failures)}[/bold] {' '.join(failures)}")
            vm.power_off()
    return 0 if here == there and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
