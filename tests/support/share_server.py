"""Shares a directory with virtual machines, without a command line: for tests.

    python -m tests.support.share_server SOURCE SOCKET...

A socket for each guest; prints a line when they are there, ends with SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from fsd.export import Export
from fsd.transports.pump import Pump
from fsd.transports.virtiofs import listen, serve
from tests.support.mounts import STOP_TIMEOUT, await_ready

ROOT = Path(__file__).parents[2]


async def _main(source: str, paths: list[str]) -> None:
    os.umask(0)
    export = Export(source)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Pump(export).run)
            for path in paths:
                nursery.start_soon(partial(serve, listen(path), export, name=path))
            print("ready", flush=True)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()
                    break
    finally:
        export.close()


@dataclass(frozen=True)
class Share:
    """A running server; ``paths`` are the guests' sockets."""

    paths: list[Path]
    pid: int

    def descriptors(self) -> list[str]:
        """What the server has open."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(fd))
        return sorted(found)


@contextmanager
def shared(source: Path, guests: int = 1) -> Iterator[Share]:
    """Serve ``source`` for the block. At the end the server must stop on SIGTERM with exit code 0,
    and have written no traceback.
    """
    with tempfile.TemporaryDirectory(prefix="fsd-vm-") as scratch:
        paths = [Path(scratch, f"socket{number}") for number in range(guests)]
        log = Path(scratch, "log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.share_server", source, *paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
            )
        assert process.stdout is not None
        try:
            assert await_ready(process, process.stdout) == "ready"
            yield Share(paths, process.pid)
            process.terminate()
            assert process.wait(STOP_TIMEOUT) == 0
            assert "Traceback" not in log.read_text(), "the server wrote a traceback"
        except BaseException as error:
            error.add_note(f"--- stderr of the server:\n{log.read_text(errors='replace')}")
            raise
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT)
            process.stdout.close()


if __name__ == "__main__":
    trio.run(_main, sys.argv[1], sys.argv[2:])
