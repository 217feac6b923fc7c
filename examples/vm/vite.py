"""Vite's dev server in a virtual machine: an edit on the host updates the page, once an agent runs.

    script/demo-vm vite

The guest has three shares: the project, the host's node, and Vite with a program that stands for
the browser (tests/clients, as script/bootstrap has installed it).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.guest_node import ENVIRONMENT, NODE, node_guest
from harness.vm import GuestError, GuestProcess

PAGE = {
    "index.html": '<!doctype html>\n<script type="module" src="/main.js"></script>\n',
    "main.js": "export const greeting = 'hello';\nimport.meta.hot.accept();\n",
}
SILENCE = 3.0
"""Seconds in which nothing comes without an agent."""
PATIENCE = 60.0


def messages(vite: GuestProcess) -> Iterator[dict[str, Any]]:
    """What comes for the page; GuestError when nothing does."""
    while True:
        line = vite.line(PATIENCE)
        if line.startswith("{"):  # else it is Vite's own words
            yield json.loads(line)


def main() -> int:
    """Run the demo; returns the exit status."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="fsd-demo-") as top:
        project = Path(top)
        for name, text in PAGE.items():
            (project / name).write_text(text)
        with node_guest(project) as vm:
            console.print(f"guest# uname -r\n{vm.release}")
            console.print("guest# mount -t virtiofs share /mnt && vite /mnt")
            vite = vm.start(
                [NODE, "/clients/drivers/vite.mjs", "/mnt", "/tmp/vite", "/main.js"],
                env=ENVIRONMENT,
            )
            reported = messages(vite)
            assert "ready" in next(reported)
            for greeting, agent in (("nobody hears", False), ("good morning", True)):
                if agent:
                    console.print("\nguest# fsd-guest agent /mnt &")
                    vm.start(["/fsd-guest.pyz", "agent", "/mnt"]).wait_output("ready", 30)
                console.print(f"\n[bold]host$ sed -i s/hello/'{greeting}'/ main.js[/bold]")
                before = vite.stdout
                begun = time.monotonic()
                (project / "main.js").write_text(PAGE["main.js"].replace("hello", greeting))
                if not agent:
                    time.sleep(SILENCE)
                    nothing = vite.stdout == before
                    console.print("  page: " + ("-" if nothing else "updated without an agent?"))
                    continue
                update = next(
                    message for message in reported if greeting in (message["text"] or "")
                )
                after = (time.monotonic() - begun) * 1000
                [source] = re.findall(r"export .*;", update["text"])
                console.print(f"  page: {update['event']} {update['path']}: {source}")
                console.print(f"  [green]{after:.0f} ms[/green]")
            vm.power_off()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuestError as error:
        sys.exit(f"demo: {error}")
