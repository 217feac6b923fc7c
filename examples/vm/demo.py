"""A virtual machine whose inotify sees the host: builds a guest, boots it, changes files here.

    script/demo-vm

The guest is Debian's stock kernel with busybox, Python and inotify-tools out of Debian's packages;
nothing is installed here. What boots it is what boots the guests of the tests.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from harness.share_server import shared
from harness.vm import guest

PATIENCE = 20.0


def changes(host: Path) -> list[tuple[str, Callable[[], object], str]]:
    """What is done on the host, and the last event that it makes in the guest."""
    notes, moved = host / "notes.txt", host / "src" / "notes.txt"
    return [
        ("echo hello > notes.txt", lambda: notes.write_text("hello\n"), "CLOSE_WRITE,CLOSE"),
        ("chmod 600 notes.txt", lambda: notes.chmod(0o600), "ATTRIB"),
        ("mv notes.txt src/", lambda: notes.rename(moved), "MOVED_TO"),
        ("rm src/notes.txt", moved.unlink, "DELETE"),
    ]


def main() -> int:
    """Run the demo; returns the exit status."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fsd-demo-") as top:
        host = Path(top)
        (host / "src").mkdir()
        console.print("$ fsd virtiofs --shared-dir=… --socket-path=…, and a guest of Debian's")
        with (
            shared(host, 1, "--log-level=error") as server,
            guest({"share": server.paths[0]}) as vm,
        ):
            console.print(f"guest# uname -r\n{vm.release}")
            console.print("guest# mount -t virtiofs share /mnt && fsd-guest agent /mnt &")
            vm.mount("share")
            vm.start(["/fsd-guest.pyz", "agent", "/mnt"]).wait_output("ready", 30)
            console.print("guest# inotifywait -m -r /mnt")
            watcher = vm.start(["inotifywait", "-m", "-r", "--format", "%e %w%f", "/mnt"])
            watcher.wait_output("Watches established.", of="err")
            for what, change, last in changes(host):
                console.print(f"\n[bold]host$ {what}[/bold]")
                begun = time.monotonic()
                change()
                line = ""
                while not line.startswith(last):
                    line = watcher.line(PATIENCE)
                    after = (time.monotonic() - begun) * 1000
                    console.print(f"  guest: {line}  [green]{after:.1f} ms[/green]")
            vm.power_off()
    return 0


if __name__ == "__main__":
    sys.exit(main())
