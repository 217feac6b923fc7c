"""Files out of Debian's source packages, kept in .cache: other people's tests and examples.

Apart because tests and benchmarks both want some.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def source_files(package: str, names: Iterable[str]) -> Path:
    """A directory with these files (their paths in the source end so) of a source package.

    Fetches them when they are not there yet; the machine's own apt sources stay as they are.
    """
    folder = CACHE / package
    missing = [name for name in names if not (folder / Path(name).name).exists()]
    if not missing:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = _download(package, Path(scratch))
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for name in missing:
                (member,) = (m for m in members if m.name.endswith(f"/{name}"))
                content = tar.extractfile(member)
                assert content is not None
                part = Path(scratch, "part")
                part.write_bytes(content.read())
                shutil.move(part, folder / Path(name).name)  # in one step: there or not
    return folder


def _download(package: str, folder: Path) -> Path:
    """The upstream archive of a source package."""
    signed = f"[signed-by={KEYS}] " if KEYS.exists() else ""
    (folder / "source.list").write_text("".join(f"deb-src {signed}{line}\n" for line in _debian()))
    _apt("update", cwd=folder)
    _apt("source", "--download-only", package, cwd=folder)
    (archive,) = folder.glob(f"{package}_*.orig.tar.*[!c]")  # not the signature, .asc
    return archive


def _apt(*arguments: str, cwd: Path) -> None:
    """Run apt-get on lists of its own."""
    (cwd / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::Etc::SourceList": cwd / "source.list",
        "Dir::Etc::SourceParts": cwd / "none",
        "Dir::State::Lists": cwd / "lists",
        "Dir::Cache": cwd,
        "APT::Sandbox::User": "root",  # _apt may not be able to write here
    }
    command = ["apt-get", *(f"-o{name}={value}" for name, value in options.items()), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"


def _debian() -> list[str]:
    """`URI CODENAME COMPONENT` of each source that this machine has of its distribution."""
    form = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.removesuffix(" Debian") for line in lines if line.endswith(" Debian")]
    assert found, "apt knows no source of Debian's; apt-get update makes it know"
    return list(dict.fromkeys(found))
