"""Mounts of an ordinary user's."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .mounts import Mount, await_ready, command
from .namespace import UID, as_user, device_of_everybody, private, python_of_everybody


@contextmanager
def users_mount(
    tmp_path: Path, *options: str, setup: str = "", below: str = ""
) -> Iterator[tuple[Mount, Path]]:
    """A mount of the user nobody, by fusermount3, in a separate namespace, after lines ``setup``;
    source and mountpoint are in a directory of the name ``below``.
    """
    with tempfile.TemporaryDirectory(prefix="fsd-user-") as name:
        top = Path(name)
        top.chmod(0o755)
        if below:
            top /= below
            top.mkdir()
        source, mountpoint = top / "source", top / "mount"
        for directory in (source, mountpoint):
            directory.mkdir()
            os.chown(directory, UID, UID)
        setup += f"\n{device_of_everybody(tmp_path)}\n{python_of_everybody(tmp_path)}"
        words: list[str | Path] = [*as_user(), command("fsd"), "mount", source, mountpoint]
        with subprocess.Popen(
            private(setup, *words, *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                assert process.stdout is not None
                ready = await_ready(process, process.stdout)
                assert ready == f"fsd: ready: {source} on {mountpoint}", (
                    process.stderr.read() if process.stderr and process.poll() is not None else ""
                )
                try:
                    yield Mount(source, mountpoint, process), top
                finally:
                    process.terminate()
                    process.wait(20)
            finally:
                process.kill()
