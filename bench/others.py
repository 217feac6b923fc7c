"""Passthrough file systems to compare with: bindfs and libfuse's example passthrough_ll, in C."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.debian import source_files
from harness.mounts import mounts_at, wait_until

_FILES = ("example/passthrough_ll.c", "example/passthrough_helpers.h")


def passthrough_ll() -> Path:
    """The example's binary, compiled from Debian's source package if it does not exist yet."""
    folder = source_files("fuse3", _FILES)
    binary = folder / "passthrough_ll"
    if not binary.exists():
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        part = folder / "passthrough_ll.part"
        source = str(folder / "passthrough_ll.c")
        subprocess.run(["gcc", "-O2", "-w", "-o", str(part), source, *flags], check=True)
        part.rename(binary)
    return binary


@contextmanager
def served_by(command: list[str], mountpoint: Path) -> Iterator[None]:
    """Another file system's server, in the foreground, for the block."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: mounts_at(mountpoint), 10, f"{command[0]} has mounted")
            yield
        finally:
            if mounts_at(mountpoint):
                tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
                subprocess.run([*tool, str(mountpoint)], check=True)
            process.terminate()


def bindfs(source: Path, mountpoint: Path) -> list[str]:
    """Its command; empty if it is not installed."""
    return ["bindfs", "-f", str(source), str(mountpoint)] if shutil.which("bindfs") else []
