"""The suites, pinned, as the registries carry them, and what they need; kept in .cache/suites.

script/bootstrap runs this: ``python -m tests.suites.sources``. The registries' own clients fetch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness import debian

HERE = Path(__file__).parent
FOLDER = debian.CACHE / "suites"
PYTHON = FOLDER / "python"
"""Where the Python packages are that the suites import beside what .venv has."""
NODE = FOLDER / "node" / "node_modules"


class Source(NamedTuple):
    """A source archive; ``suite`` is Debian's, None if it is PyPI's."""

    name: str
    version: str
    sha256: str
    suite: str | None = None

    @property
    def path(self) -> Path:
        """Its files, once it has been fetched."""
        return FOLDER / f"{self.name}-{self.version}-{self.sha256[:8]}"


WATCHDOG = Source(
    "watchdog", "7.1.0", "d3861e255416f49a1384474cb2efa097de165fb330d4c5432ce6708b509ed922"
)
WATCHFILES = Source(
    "watchfiles", "1.3.0", "99aee4a07847c06820765fd7b1b49ceac4f3f711ccb7d104655a33231de1c207"
)
INOTIFY_TOOLS = Source(
    "inotify-tools",
    "3.22.6.0",
    "c6b7e70f1df09e386217102a1fe041cfc15fa4f3d683d2970140b6814cf2ed12",
    "bookworm",
)
ENTR = Source(
    "entr", "5.7", "90c5d943820c70cef37eb41a382a6ea4f5dd7fd95efef13b2b5520d320f5d067", "trixie"
)
CHOKIDAR = Source(
    "node-chokidar",
    "3.6.0",
    "504a3d883381883ad3df8f904ec0e182473cf3f3f31375fede491499645f07c2",
    "trixie",
)
SOURCES = (WATCHDOG, WATCHFILES, INOTIFY_TOOLS, ENTR, CHOKIDAR)

# pip asks an archive of PyPI for its metadata with the archive's own build backend. Nothing is
# built here, and watchfiles' backend wants Rust: this one answers in its place.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(directory, settings=None):
    info = Path(directory, "{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
"""


def fetch(source: Source) -> None:
    """The files of a source, when they are not there yet.

    Raises AssertionError when a registry does not give what is pinned.
    """
    if source.path.exists():
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        scratch = Path(name)
        if source.suite:
            archive = debian.source_archive(source.name, scratch, source.suite)
        else:
            archive = _from_pypi(source, scratch)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == source.sha256, f"{archive.name} has sha256 {found}, not {source.sha256}"
        with tarfile.open(archive) as tar:
            tar.extractall(scratch / "tree", filter="data")
        (tree,) = (scratch / "tree").iterdir()
        tree.rename(source.path)


def _from_pypi(source: Source, scratch: Path) -> Path:
    (scratch / "maturin.py").write_text(BACKEND.format(name=source.name, version=source.version))
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-binary", source.name, f"{source.name}=={source.version}", "--dest", str(scratch)),
        env={"PYTHONPATH": str(scratch)},
    )
    (archive,) = scratch.glob("*.tar.gz")
    return archive


def install() -> None:
    """What suites import, from the lock files beside this one."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes")
    _anew(PYTHON)
    _run(
        *pip, "--root-user-action=ignore", "--target", str(PYTHON), "-r", str(HERE / "python.lock")
    )
    _anew(NODE.parent)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / "node" / name, NODE.parent)
    npm = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
    _run(*npm, "--prefix", str(NODE.parent))


def _anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


def main() -> None:
    """Fetch all; exit status 1, and a line for each, if one is not to be had."""
    debian.cache()
    FOLDER.mkdir(exist_ok=True)
    failed = False
    for source in SOURCES:
        try:
            fetch(source)
        except AssertionError as error:
            failed = True
            print(f"suites: {source.name} {source.version}: {error}", file=sys.stderr)
    install()
    sys.exit(failed)


if __name__ == "__main__":
    main()
