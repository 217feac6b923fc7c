"""`fsd status` for people: tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def mounts() -> list[str]:
    """Where fsd is mounted, as this process sees it."""
    paths = []
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        for line in mountinfo:
            fields, _, rest = line.partition(b" - ")
            if rest.split(b" ", 1)[0] == b"fuse.fsd":
                path = fields.split(b" ")[4]
                paths.append(
                    path.decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
                )
    return paths


def render(path: str, state: dict[str, Any]) -> None:
    """Print one mount's state."""
    console = Console()
    counts = state["counts"]
    console.print(f"[bold]{path}[/bold] shares {state['source']} (server pid {state['pid']})")
    console.print(
        f"  inodes {state['inodes']}, host watches {state['host_watches']}"
        f" ({len(state['unwatched'])} refused by the host), events in {counts.get('in', 0)},"
        f" backlog {state['backlog']}, host overflows {counts.get('overflows', 0)},"
        f" resyncs {counts.get('resyncs', 0)}"
    )
    table = Table()
    columns = ["guest", "agent", "marks", "forwarded", "echo", "coalesced", "replayed", "failed"]
    columns += ["queued", "overflows", "resyncs", "p50 ms", "p99 ms"]
    for column in columns:
        table.add_column(column, justify="left" if column == "guest" else "right")
    for guest in state["guests"]:
        agent = {True: "yes", False: "no", None: "-"}[guest.get("agent")]
        latency = guest["latency_ms"]
        cells = [guest["name"], agent, guest["marks"], guest["forwarded"], guest["echo"]]
        cells += [guest["coalesced"], guest["replayed"], guest["failed"], guest["depth"]]
        cells += [guest["overflows"], guest["resyncs"], latency["p50"], latency["p99"]]
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    console.print(table)
    kinds = Table()
    kinds.add_column("event")
    for guest in state["guests"]:
        kinds.add_column(guest["name"], justify="right")
    for kind in sorted({kind for guest in state["guests"] for kind in guest["by_kind"]}):
        cells = [str(guest["by_kind"].get(kind, 0)) for guest in state["guests"]]
        kinds.add_row(kind.replace(".", " "), *cells)
    if kinds.row_count:
        console.print(kinds)
