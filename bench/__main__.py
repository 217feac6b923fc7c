"""python -m bench WHAT [--json FILE]; WHAT as in COMMANDS, or local"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path

import click
from rich.console import Console

from .local import local
from .report import Report, machine

COMMANDS = {
    "latency": "latency",
    "throughput": "throughput",
    "storms": "storms",
    "rest": "idle",
    "coherence": "coherence",
    "memory": "memory",
    "scale": "scale",
    "virtiofs": "virtiofs",
    "checkpoint": "checkpoint",
    "guest-latency": "guest_latency",
}
"""Those that only measure and print, and the modules that they are in."""


@click.group()
@click.pass_context
def main(context: click.Context) -> None:
    """Measure the installed fsd on this machine; keep the machine idle meanwhile."""
    on = machine()
    Console().print(
        f"{on['cores']} cores, Linux {on['kernel']}, Python {on['python']}, load {on['load'][0]}"
        " (other programs' work is in the figures)",
        highlight=False,
    )
    os.environ["STATE_DIRECTORY"] = context.with_resource(tempfile.TemporaryDirectory())


def _command(name: str) -> click.Command:
    @click.option(
        "--json", "json_path", type=click.Path(path_type=Path), help="Write figures there."
    )
    def run(json_path: Path | None) -> None:
        report: Report = importlib.import_module(f"bench.{COMMANDS[name]}").measure()
        report.show(Console())
        if json_path is not None:
            json_path.write_text(json.dumps(report.as_json(), indent=1) + "\n")

    return click.command(name)(run)


for _name in COMMANDS:
    main.add_command(_command(_name))
main.add_command(local)

if __name__ == "__main__":
    main()
