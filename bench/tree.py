"""The tree for file-system workloads: files, a git repository of them, an archive."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path


def fill(source: Path, files: Iterable[Path]) -> None:
    """Make ``files``, all below ``source``/tree, and what else the workloads need."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name}\n" * 100)
    with tarfile.open(source / "tree.tar", "w") as tar:
        tar.add(source / "tree", "tree")
    (source / "unpacked").mkdir()
    git = ["git", "-C", str(source / "tree"), "-c", "user.name=b", "-c", "user.email=b@b.invalid"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
