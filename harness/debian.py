"""Files from Debian's packages, stored in .cache: other projects' tests, and what guests boot.

Apart because tests and benchmarks both need them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def source_files(package: str, names: Iterable[str], suite: str | None = None) -> Path:
    """A directory with these files of a source package (whose paths there end so).

    The package is of this machine's suites, or of another one. Fetches the files if they are not
    there yet; the machine's own apt sources are not changed.
    """
    folder = CACHE / (f"{package}-{suite}" if suite else package)
    missing = [name for name in names if not (folder / Path(name).name).exists()]
    if not missing:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        archive = source_archive(package, Path(scratch), suite)
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


def cache() -> Path:
    """The directory for all of it; git ignores it."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE


def depends(package: str, pattern: str) -> str:
    """The version in a package's one dependency whose name matches the pattern."""
    text = _run("apt-cache", "depends", package)
    found = [m[1] for line in text.splitlines() if (m := re.search(rf"Depends: {pattern}$", line))]
    assert len(found) == 1, f"{package} depends on {found}"
    return found[0]


def versions(packages: Iterable[str]) -> list[str]:
    """One line per binary package: what apt would install."""
    lines = _run("apt-get", "download", "--print-uris", *packages).splitlines()
    return [line.partition(" ")[0] for line in lines if line.startswith("'")]


def extract(packages: Iterable[str], tree: Path) -> None:
    """The files of binary packages, under ``tree``; nothing is installed."""
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        _run("apt-get", "-oAPT::Sandbox::User=root", "download", *packages, cwd=Path(scratch))
        for archive in sorted(Path(scratch).glob("*.deb")):
            _run("dpkg-deb", "-x", str(archive), str(tree))


def closure(suite: str, packages: Iterable[str]) -> Path:
    """A directory with the files of another suite's binary packages and all their dependencies.

    Fetched if it is not there yet; the machine's own apt sources are not changed.
    """
    names = sorted(packages)
    folder = CACHE / f"{suite}-{'-'.join(names)}"
    if folder.exists():
        return folder
    archive = _debian()[0].partition(" ")[0]
    with tempfile.TemporaryDirectory(dir=cache()) as name:
        scratch = Path(name)
        (scratch / "source.list").write_text(f"deb {_signed()}{archive} {suite} main\n")
        (scratch / "status").touch()  # nothing is installed: all of it is wanted
        _apt("update", cwd=scratch)
        _apt("install", "--yes", "--download-only", "--no-install-recommends", *names, cwd=scratch)
        for package in sorted((scratch / "archives").glob("*.deb")):
            _run("dpkg-deb", "-x", str(package), str(scratch / "tree"))
        (scratch / "tree").rename(folder)
    return folder


def source_archive(package: str, folder: Path, suite: str | None = None) -> Path:
    """The upstream archive of a source package, of this machine's suites or of another one."""
    sources = _debian() if suite is None else [f"{_debian()[0].partition(' ')[0]} {suite} main"]
    lines = (f"deb-src {_signed()}{line}\n" for line in sources)
    (folder / "source.list").write_text("".join(lines))
    _apt("update", cwd=folder)
    archive = f"{package}_*.orig.tar.*[!c]"  # not the signature, .asc
    try:
        _apt("source", "--download-only", "--tar-only", package, cwd=folder)
    except AssertionError:  # a mirror may lack another part, which is not needed
        if not list(folder.glob(archive)):
            raise
    (found,) = folder.glob(archive)
    return found


def _signed() -> str:
    return f"[signed-by={KEYS}] " if KEYS.exists() else ""


def _apt(*arguments: str, cwd: Path) -> None:
    """Run apt-get on separate lists."""
    (cwd / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (cwd / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options: dict[str, Path | str] = {
        "Dir::Etc::SourceList": cwd / "source.list",
        "Dir::Etc::SourceParts": cwd / "none",
        "Dir::State::Lists": cwd / "lists",
        "Dir::Cache": cwd,
        "APT::Sandbox::User": "root",  # _apt may not be able to write here
    }
    if (cwd / "status").exists():
        options["Dir::State::status"] = cwd / "status"
    _run("apt-get", *(f"-o{name}={value}" for name, value in options.items()), *arguments, cwd=cwd)


def _run(*command: str, cwd: Path | None = None) -> str:
    """Its output."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _debian() -> list[str]:
    """`URI CODENAME COMPONENT` of each of this machine's sources of its distribution."""
    form = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.removesuffix(" Debian") for line in lines if line.endswith(" Debian")]
    assert found, "apt knows no source of Debian's; apt-get update makes it know"
    return list(dict.fromkeys(found))
