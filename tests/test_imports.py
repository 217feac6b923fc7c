"""Which package may import which, read from the source of every module: fsd -> protocol <-
guest_tools, and within fsd the packages of a table.

guest_tools needs nothing else, but for its images, which are protobuf's.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"fsd", "protocol", "guest_tools"}
STDLIB = sys.stdlib_module_names
# Package of fsd -> packages of fsd that it may import beside itself, type checking or not.
MAY_IMPORT = {
    "pacing": "",
    "linux": "pacing",
    "process": "linux pacing",
    "files": "linux pacing",
    "virtio": "process linux pacing",
    "events": "files linux pacing",
    "guests": "events files linux pacing",
    "cache": "files linux pacing",
    "export": "guests events files process linux pacing",
    "fuse": "cache export guests events files process linux pacing",
    "checkpoint": "export guests events files process linux pacing",
    "transports": "cache fuse export guests files virtio process linux pacing",
    "servers": "transports checkpoint fuse export guests files process linux pacing",
    "cli": "servers process pacing",
}
# Library -> packages and modules of fsd that may import it, type checking or not; any other is for
# none. The standard library is for all, but for ctypes, which takes what Python cannot check.
THIRD_PARTY = {
    "structlog": "*",
    "trio": "transports servers",
    "pyfuse3": "transports/libfuse.py transports/libfuse_operations.py",
    "pyinotify": "events/watcher.py",
    "google": "checkpoint/image.py checkpoint/server_pb2.py",
    "click": "cli",
    "rich": "cli/status.py",
    "ctypes": "linux process/seccomp.py process/sandbox.py process/scheduling.py virtio/mapping.py"
    " virtio/eventfds.py transports/libfuse_operations.py",
}
# Where guest_tools knows protobuf; the one is imported when a command needs it, the other by it.
PROTOBUF = (
    "guest_tools/watcher/images.py",
    "guest_tools/watcher/watcher_pb2.py",
)


def imports(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each import anywhere in a module, type checking or not."""
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: it stays inside its own package
                yield node.lineno, path.partition("/")[0]
            else:
                yield node.lineno, (node.module or "").partition(".")[0]


def offences(path: str, source: str) -> list[str]:
    """What the module at ``path`` (from the root, with slashes) imports and may not."""
    package = path.partition("/")[0]
    found = []
    for line, name in imports(source, path):
        match package:
            case "protocol":
                allowed = name in STDLIB or name == "protocol"
            case "guest_tools":
                allowed = name in STDLIB or name in {"guest_tools", "protocol"}
                allowed = allowed or (name == "google" and path in PROTOBUF)
            case _ if name in THIRD_PARTY:
                places = [f"fsd/{place}" for place in THIRD_PARTY[name].split()]
                allowed = any(fnmatch(path, at) or fnmatch(path, f"{at}/*") for at in places)
            case _:
                allowed = name in STDLIB or name in {"fsd", "protocol"}
        if not allowed:
            found.append(f"{path}:{line} imports {name}")
    return found


MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in sorted(OURS)
    for path in (ROOT / package).rglob("*.py")
)


def test_every_package_was_found() -> None:
    assert {path.partition("/")[0] for path in MODULES} == OURS


@pytest.mark.parametrize("path", MODULES)
def test_a_module_imports_only_what_it_may(path: str) -> None:
    assert offences(path, (ROOT / path).read_text()) == []


def of_fsd(path: Path) -> Iterator[str]:
    """The modules of fsd that one of them imports."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fsd."))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *filter(None, (node.module or "").split("."))]
            if base[0] == "fsd":
                for name in [alias.name for alias in node.names] if len(base) < 3 else [""]:
                    yield ".".join(filter(None, [*base, name]))


def test_a_package_imports_only_those_below_it() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), module)
        for path in (ROOT / "fsd").glob("*/*.py")
        for module in of_fsd(path)
        if module.split(".")[1] not in (path.parent.name, *MAY_IMPORT[path.parent.name].split())
    }
    assert not found


@pytest.mark.parametrize("path", MODULES)
def test_a_long_module_says_why(path: str) -> None:
    source = (ROOT / path).read_text()
    if source.count("\n") > 450 and not path.endswith("_pb2.py"):
        head = ast.get_docstring(ast.parse(source)) or ""
        assert re.search(r"\blong|one module", head, re.IGNORECASE), "above 450 lines: why?"


def test_each_package_is_in_the_table() -> None:
    assert {path.parent.name for path in (ROOT / "fsd").glob("*/__init__.py")} == MAY_IMPORT.keys()
    assert [path.name for path in (ROOT / "fsd").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("folder", ["bench", "examples", "harness"])
def test_what_tests_share_with_others_needs_no_test(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path.read_text(), folder)
        if name == "tests"
    ]
    assert found == []


def test_protobuf_is_imported_when_it_is_needed() -> None:
    code = "import sys, guest_tools.cli; print([name for name in sys.modules if 'google' in name])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("protocol/x.py", "import struct\nfrom protocol import y\nfrom . import z", True),
        ("protocol/x.py", "import fsd.export", False),
        ("protocol/x.py", "from trio import run", False),
        ("guest_tools/x.py", "import os.path, protocol.frames\nfrom guest_tools import y", True),
        ("guest_tools/x.py", "from fsd import export", False),
        ("guest_tools/x.py", "def f():\n    import click", False),
        ("guest_tools/x.py", "from google.protobuf import message", False),
        ("guest_tools/watcher/images.py", "from google.protobuf import message", True),
        ("protocol/images.py", "from google.protobuf import message", False),
        ("fsd/x/y.py", "import os, structlog, protocol", True),
        ("fsd/x/y.py", "import attrs", False),
        ("fsd/events/watcher.py", "import pyinotify", True),
        ("fsd/events/resolver.py", "import pyinotify", False),
        ("fsd/checkpoint/image.py", "from google.protobuf import message", True),
        ("fsd/files/reach.py", "import ctypes", False),
        ("fsd/linux/libc.py", "import ctypes", True),
        ("fsd/cli/status.py", "import click, rich", True),
        ("fsd/cli/main.py", "import rich", False),
        ("fsd/x.py", "import guest_tools.agent", False),
        ("fsd/x.py", "import trio", False),
        ("fsd/x.py", "if TYPE_CHECKING:\n    from pyfuse3 import FileHandleT", False),
        ("fsd/transports/libfuse.py", "import trio\nimport pyfuse3", True),
        ("fsd/transports/virtiofs.py", "import pyfuse3", False),
        ("fsd/cli/main.py", "import guest_tools", False),
        ("fsd/servers/x.py", "import trio", True),
        ("fsd/transports/virtiofs.py", "import trio", True),
    ],
)
def test_the_rules_themselves(path: str, source: str, allowed: bool) -> None:
    assert (offences(path, source) == []) is allowed
