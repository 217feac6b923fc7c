"""How a command ends: one line on stderr and a status. Shared by `fsd` and `fsd-virtiofsd`."""

from __future__ import annotations

import sys

import click


def run_command(command: click.Command) -> None:
    """Run a command and exit: with status 1 for what fails, 2 for wrong usage."""
    try:
        status = command(standalone_mode=False)
    except click.UsageError as error:
        hint = f"; see '{error.ctx.command_path} --help'" if error.ctx else ""
        print(f"fsd: {error.format_message().rstrip('.')}{hint}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        print(f"fsd: {error.format_message()}", file=sys.stderr)
        sys.exit(1)
    except click.Abort:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
