"""python -m bench WHAT [--json FILE]; WHAT as in COMMANDS"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path

import click
from rich.console import Console

from .report import Report, machine

COMMANDS = {
    "latency": "latency",
    "throughput": "throughput",
    "rest": "idle",
    "memory": "memory",
    "workloads": "workloads",
    "virtiofs": "virtiofs",
    "checkpoint": "checkpoint",
    "guest-latency": "guest_latency",
}


@click.command()
@click.argument("what", type=click.Choice([*COMMANDS]))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures there.")
def main(what: str, json_path: Path | None) -> None:
    """Measure the installed fsd on this machine; keep the machine idle meanwhile."""
    console = Console()
    on = machine()
    console.print(
        f"{on['cores']} cores, Linux {on['kernel']}, Python {on['python']}, load {on['load'][0]}"
        " (other programs' work is in the figures)",
        highlight=False,
    )
    with tempfile.TemporaryDirectory() as images:
        os.environ["STATE_DIRECTORY"] = images
        report: Report = importlib.import_module(f"bench.{COMMANDS[what]}").measure()
    report.show(console)
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
