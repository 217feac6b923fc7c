"""Debian's CRIU, as the tests run it: the one that is installed, or a newer release's.

That of Debian 12 knows no kernel from 6.13 on (checkpoint-restore/criu#2532). Where the installed
one cannot run, Debian 13's is unpacked into .cache, with its C library, and nothing is installed.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from harness import debian

SUITE = "trixie"
READ = """
import json, sys
sys.path.append(sys.argv[1])  # behind our own protobuf
from pycriu import images
with open(sys.argv[2], "rb") as image:
    print(json.dumps(images.load(image, pretty=False)["entries"]))
"""


class Criu(NamedTuple):
    """How to start it, and where its Python is."""

    command: tuple[str | Path, ...]
    python: Path

    def run(self, action: str, directory: Path, *options: str | Path | int) -> str:
        """The log of a dump or a restore."""
        directory.mkdir(exist_ok=True)
        words = [*self.command, action, "-D", directory, "-v4", "-o", f"{action}.log", *options]
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, timeout=100, check=False
        )
        log = (directory / f"{action}.log").read_text(errors="replace")
        assert done.returncode == 0, f"criu {action}: {log[-3000:]}"
        return log

    def entries(self, image: Path) -> list[dict[str, Any]]:
        """An image, decoded by CRIU's own library: numbers as they are."""
        words = [sys.executable, "-c", READ, str(self.python), str(image)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        entries: list[dict[str, Any]] = json.loads(done.stdout)
        return entries


@functools.cache
def criu() -> Criu:
    """One that works on this kernel. Raises AssertionError with what it says."""
    said = []
    installed = shutil.which("criu", path=os.defpath + ":/usr/sbin:/sbin")
    if installed:
        found = Criu((installed,), Path("/usr/lib/python3/dist-packages"))
        said.append(_check(found))
        if not said[-1]:
            return found
    tree = debian.closure(SUITE, ["criu", "python3-pycriu"])
    (loader,) = tree.glob("usr/lib/*/ld-linux-*.so.*")
    program = (loader, "--library-path", loader.parent, tree / "usr/sbin/criu")
    found = Criu(program, tree / "usr/lib/python3/dist-packages")
    said.append(_check(found))
    assert not said[-1], "no CRIU runs here:\n" + "\n".join(said)
    return found


def _check(found: Criu) -> str:
    """What `criu check` complains about, '' if nothing that watchers need is missing."""
    words = [*map(str, found.command), "check"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stderr
