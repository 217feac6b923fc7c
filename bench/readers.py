"""Starts bench/reader.py on a directory, and collects its events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from protocol.masks import Mask

SCRIPT = Path(__file__).with_name("reader.py")
PATIENCE = 60.0  # seconds for the rest of the queues, in a storm on a busy machine


class Seen(NamedTuple):
    """One event as the reader got it, with CLOCK_MONOTONIC in ns."""

    when: int
    mask: int
    name: str


class Watching(Protocol):
    """A running reader. ``host`` is the directory that it watches, where the host changes it."""

    @property
    def host(self) -> Path:
        """The directory."""

    def finish(self) -> list[Seen]:
        """All events that it saw, in order, with the host's times."""


@dataclass(frozen=True)
class Reader:
    """A running reader. ``host`` is the directory that it watches, where the host changes it."""

    host: Path
    process: subprocess.Popen[str]

    def finish(self, patience: float = PATIENCE) -> list[Seen]:
        """All events that it saw, in order. Ends it by creating ~end, which comes last."""
        os.mknod(self.host / "~end")
        output, _ = self.process.communicate(timeout=patience)
        (self.host / "~end").unlink()
        return [Seen(*event) for event in json.loads(output)]


@contextmanager
def reading(host: Path, watched: Path, mask: Mask, *, recursive: bool = False) -> Iterator[Reader]:
    """A reader on ``watched``, which is ``host`` itself or the same directory in a mount."""
    options = ["-r"] if recursive else []
    command = [sys.executable, str(SCRIPT), str(int(mask)), *options, str(watched)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            assert ready == "READY\n", f"the reader did not start on {watched}"
            yield Reader(host, process)
        finally:
            process.kill()
