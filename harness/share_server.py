"""Shares for tests' virtual machines: the installed ``fsd virtiofs`` as a separate process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness.mounts import STOP_TIMEOUT, await_ready, command


@dataclass(frozen=True)
class Share:
    """A running server. ``paths`` are the guests' sockets, ``pid`` is the process that guests
    reach, in its sandbox; ``keeper`` is the process that was started.
    """

    paths: list[Path]
    pid: int
    keeper: int = 0

    def descriptors(self) -> list[str]:
        """The descriptors that the server has open."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(fd))
        return sorted(found)


def inside(pid: int) -> int:
    """The process in the sandbox of a server; the server itself if it has none."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return pid
    return int(children[0]) if children else pid


@contextmanager
def shared(
    source: Path,
    guests: int = 1,
    *options: str,
    cache: str | None = None,
    paths: Sequence[Path] = (),
    handed: bool = False,
) -> Iterator[Share]:
    """Serve ``source`` for the block, on new sockets or on ``paths``; ``handed``: on sockets that
    are passed as open descriptors.

    At the end the server must stop on SIGTERM with exit code 0, have printed no traceback and left
    no socket except those that were passed to it.
    """
    with tempfile.TemporaryDirectory(prefix="fsd-vm-") as scratch, ExitStack() as stack:
        sockets = [*paths] or [Path(scratch, f"socket{number}") for number in range(guests)]
        listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in sockets * handed]
        for listener, path in zip(listeners, sockets, strict=False):
            listener.bind(os.fspath(path))
            listener.listen(1)
        fds = [listener.fileno() for listener in listeners]
        log = Path(scratch, "log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [
                    command("fsd"),
                    "virtiofs",
                    f"--shared-dir={source}",
                    *(f"--fd={fd}" for fd in fds),
                    *(f"--socket-path={path}" for path in sockets if not handed),
                    *([f"--cache={cache}"] if cache else []),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=fds,
            )
        assert process.stdout is not None
        try:
            assert await_ready(process, process.stdout).startswith("fsd: ready: ")
            yield Share(sockets, inside(process.pid), process.pid)
            process.terminate()
            assert process.wait(STOP_TIMEOUT) == 0
            assert "Traceback" not in log.read_text(), "the server wrote a traceback"
            assert all(path.exists() is handed for path in sockets)
        except BaseException as error:
            error.add_note(f"--- stderr of the server:\n{log.read_text(errors='replace')}")
            raise
        finally:
            for pid in (inside(inside(process.pid)), inside(process.pid)):
                if pid != process.pid:  # outlives a keeper that is killed
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait(STOP_TIMEOUT)
            process.stdout.close()
