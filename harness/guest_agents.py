"""Starts the agent and watchers in a guest, and reads their marks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.mounts import wait_until
from harness.vm import Guest, GuestProcess


def start_agent(vm: Guest, directory: str = "/mnt") -> GuestProcess:
    """The guest's agent, connected: its long poll is always under way."""
    agent = vm.start(["/fsd-guest.pyz", "agent", directory])
    agent.wait_output("fsd-guest: ready", 30)
    return agent


def start_watcher(vm: Guest, *paths: str, form: str = "%e %f") -> GuestProcess:
    """inotifywait, with all its watches established."""
    watcher = vm.start(["inotifywait", "-m", "--format", form, *(paths or ("/mnt",))])
    watcher.wait_output("Watches established.", of="err")
    return watcher


def marks(vm: Guest, directory: str = "/mnt") -> list[dict[str, Any]]:
    """The output of fsd-guest marks."""
    found: list[dict[str, Any]] = json.loads(
        vm.run(["/fsd-guest.pyz", "marks", directory, "--json"]).stdout
    )
    return found


def status(vm: Guest, directory: str = "/mnt") -> dict[str, Any]:
    """The server's statistics."""
    found: dict[str, Any] = json.loads(vm.run(["cat", f"{directory}/.fsd/status"]).stdout)
    return found


def wait_armed(vm: Guest, pid: int, paths: Sequence[Path], timeout: float = 40) -> None:
    """Wait until the server has armed the marks of a process on these paths."""
    wanted = {str(path) for path in paths}

    def armed() -> bool:
        return wanted <= {m["path"] for m in marks(vm) if m["armed"] and m["pid"] == pid}

    wait_until(armed, timeout, f"armed marks of {pid} on {len(wanted)} paths")
