"""What ends a command: apart because the commands' modules and the command line both use it."""

from __future__ import annotations


class Failure(Exception):
    """What failed, on what, and what to do: one line."""
