"""Where a suite runs: it watches a mount, and what it changes is changed in the mount's source.

A suite runs at two places. At the first the mount is a bind mount of the source: what fails there
is the suite's own, or this machine's. At the other it is ``fsd mount``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.mounts import mounted

SHIM = Path(__file__).with_name("shim.c")


@dataclass(frozen=True)
class Place:
    """``source`` is the host's side, ``mount`` the guest's; ``env`` has programs change the one
    when they mean the other."""

    source: Path
    mount: Path
    env: Mapping[str, str]

    def copy(self, tree: Path, *leave: str) -> Path:
        """Copy a suite's files into the source; where the mount shows them."""
        shutil.copytree(
            tree, self.source / tree.name, symlinks=True, ignore=shutil.ignore_patterns(*leave)
        )
        return self.mount / tree.name


def compile_shim(folder: Path) -> Path:
    """The library that is preloaded; see shim.c."""
    library = folder / "shim.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    # The C library says that some of its calls get no null pointers; programs do give them.
    options += ["-Wno-nonnull-compare", "-fno-delete-null-pointer-checks"]
    subprocess.run(["gcc", *options, SHIM, "-o", library, "-ldl"], check=True, timeout=110)
    return library


def preloaded(shim: Path, source: Path, mount: Path) -> dict[str, str]:
    """The environment with which a program changes ``source`` when it means ``mount``."""
    return {
        "LD_PRELOAD": str(shim),
        "FSD_SUITE_MOUNT": str(mount),
        "FSD_SUITE_SOURCE": str(source),
        "UV_USE_IO_URING": "0",  # node's calls by io_uring would pass the library by
    }


@contextmanager
def place(base: Path, kind: str, *options: str) -> Iterator[Place]:
    """A place in the empty directory ``base``; ``kind`` is `bind` or `fsd`, with its options."""
    source, mount = base / "source", base / "mount"
    source.mkdir()
    mount.mkdir()
    made = Place(source, mount, os.environ | preloaded(compile_shim(base), source, mount))
    if kind == "fsd":
        with mounted(source, mount, *options):
            yield made
        return
    subprocess.run(["mount", "--bind", source, mount], check=True, timeout=20)
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", mount], check=True, timeout=20)
