"""The agent's process: started with the mount, restarted when it exits, stopped before the unmount.

Apart because the server and its agent share only the mount and the life of this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import structlog
import trio

log = structlog.get_logger()
STABLE = 10.0
"""Seconds after which an agent counts as stable."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds before another agent is started: doubled each time, until one was stable."""
STOP_TIMEOUT = 3.0
"""Seconds for an agent to exit; it does nothing that takes longer."""
_READY = b"fsd-guest: ready"
_OUTPUT = 4096


class AgentError(Exception):
    """Why the agent did not start, in one line for the user."""


class AgentProcess:
    """Keeps one agent running on a mount. ``dismiss`` makes the server answer the agent's waiting
    read.
    """

    def __init__(self, mountpoint: str, dismiss: Callable[[], None]) -> None:
        self._mountpoint = mountpoint
        self._dismiss = dismiss
        self._process: trio.Process | None = None
        self._stopping = False

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Run until ``stop``, or until an agent finds that its mount is gone. ``on_ready`` is
        called once. Raises AgentError if the first agent does not become ready.
        """
        pause = FIRST_PAUSE
        came_up = False
        while True:
            begun = trio.current_time()
            try:
                self._process = process = await self._start()
            except OSError as error:  # no process or descriptor is available now
                if not came_up:
                    raise AgentError(f"the agent cannot be started: {error.strerror}") from None
                log.warning("agent cannot be started, will try again", error=error.strerror)
            else:
                assert process.stdout is not None
                ready, said = await _first_words(process.stdout)
                if ready and not came_up:
                    on_ready()
                    came_up = True
                if came_up:
                    await _pass_on(said, process.stdout)
                status = await process.wait()
                if self._stopping or (came_up and status == 0):
                    return
                if not came_up:
                    reason = said.decode(errors="replace").strip().rpartition("\n")[2]
                    failure = f"the agent did not start (exit status {status})"
                    raise AgentError(f"{failure}: {reason}" if reason else failure)
                log.warning("agent exited, starting another", status=status)
            if trio.current_time() - begun > STABLE:
                pause = FIRST_PAUSE
            await trio.sleep(pause)
            if self._stopping:
                return
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _start(self) -> trio.Process:
        return await trio.lowlevel.open_process(
            [sys.executable, "-m", "guest_tools", "agent", self._mountpoint],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # a caller of --daemon may read the server's to its end
            process_group=0,  # a Ctrl-C goes to the server, which then stops the agent
            cwd="/",
        )

    async def stop(self) -> None:
        """Stop it. Its unfinished orders stay with the server."""
        self._stopping = True
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        self._dismiss()  # a process in a read of the mount ends when that is answered
        with trio.move_on_after(STOP_TIMEOUT):
            await process.wait()
            return
        process.kill()


async def _first_words(output: trio.abc.ReceiveStream) -> tuple[bool, bytes]:
    """Whether it has become ready, and its other output up to then or up to its end."""
    said = b""
    while data := await output.receive_some(_OUTPUT):
        said = (said + data)[-_OUTPUT:]
        before, ready, after = said.partition(_READY)
        if ready and b"\n" in after:
            return True, before + after.partition(b"\n")[2]
    return False, said


async def _pass_on(said: bytes, output: trio.abc.ReceiveStream) -> None:
    """Copy to our stderr until it ends. In a thread: writing may block."""
    while True:
        with suppress(OSError):
            await trio.to_thread.run_sync(os.write, 2, said, abandon_on_cancel=True)
        said = bytes(await output.receive_some(_OUTPUT))
        if not said:
            return
