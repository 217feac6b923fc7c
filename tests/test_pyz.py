"""The archive that ships to guests: it runs alone, on an old Python and on this one."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Run in the tried Python: import every module of the archive, then say where the standard library
# is and where each module, of whatever origin, came from.
IMPORT_ALL = """
import importlib, json, sys, sysconfig, zipfile
archive = sys.argv[1]
sys.path.insert(0, archive)
for name in zipfile.ZipFile(archive).namelist():
    if name.endswith(".py") and not name.endswith("__main__.py"):
        importlib.import_module(name[:-3].replace("/", ".").replace(".__init__", ""))
origins = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print(json.dumps([[sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")], origins]))
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stderr}"
    return done.stdout


def oldest() -> str | None:
    """A Python 3.9, the oldest that the archive promises to run on, if this machine has one."""
    usual = [Path(f"/usr{local}/bin/python3.9") for local in ("", "/local")]
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob("3.9.*/bin/python3.9"))
    return next((str(path) for path in [*usual, *pyenv] if path.exists()), None)


# No skip where there is none: then the current Python alone is the check.
PYTHONS = [path for path in (oldest(), sys.executable) if path]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist") / "fsd-guest.pyz"
    run(sys.executable, ROOT / "script" / "build", target)
    return target


@pytest.mark.parametrize("python", PYTHONS)
def test_runs(archive: Path, python: str) -> None:
    assert "usage" in run(python, "-I", "-S", archive, "--help").lower()


def test_an_older_python_is_refused_in_one_line(archive: Path) -> None:
    script = "import runpy, sys; sys.version_info = (3, 8, 20); runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-I", "-S", "-c", script, str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "fsd-guest: Python 3.9 or later is needed, this is 3.8\n"


@pytest.mark.parametrize("python", PYTHONS)
def test_imports_only_the_standard_library_and_itself(archive: Path, python: str) -> None:
    # -I -S: without that Python's site-packages, which could hide what is missing.
    libraries, origins = json.loads(run(python, "-I", "-S", "-c", IMPORT_ALL, archive))
    ours = {name for name, origin in origins.items() if (origin or "").startswith(str(archive))}
    # protobuf comes along, as pure Python.
    assert {name.partition(".")[0] for name in ours} == {"guest_tools", "protocol", "google"}
    foreign = {
        name: origin
        for name, origin in origins.items()
        if name not in ours
        and origin is not None  # built in or frozen
        and ("site-packages" in origin or not origin.startswith(tuple(libraries)))
    }
    assert foreign == {}


@pytest.mark.parametrize("python", PYTHONS)
def test_only_checkpoints_need_protobuf(archive: Path, python: str, tmp_path: Path) -> None:
    without = tmp_path / "without.pyz"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(without, "w") as new:
        for name in old.namelist():
            if not name.startswith("google"):
                new.writestr(name, old.read(name))
    for name, says in (
        ("marks", "not an fsd mount"),
        ("agent", "not an fsd mount"),
        ("show", "checkpoints need the package protobuf"),
    ):
        command = [python, "-I", "-S", str(without), name, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_the_same_sources_give_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.pyz"
    run(sys.executable, ROOT / "script" / "build", again)
    assert again.read_bytes() == archive.read_bytes()
    assert archive.read_bytes().startswith(b"#!/usr/bin/env python3\n")
