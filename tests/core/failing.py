"""System calls that fail: a table of all that the server's core makes, and an injector for each.

The table is read from the source: every function of fsd.linux.syscalls and credentials, and every
call of os, fcntl, select or open in the modules that the operations and the Export are made of."""

from __future__ import annotations

import ast
import builtins
import ctypes
import fcntl
import inspect
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyinotify

import fsd
from fsd.linux import credentials, syscalls

ROOTS = ("export.export", "fuse.operations")
PURE = {
    "os.fsencode", "os.fsdecode", "os.strerror", "os.major", "os.minor", "os.getpid", "os.geteuid",
    "os.makedev", "os.getegid", "os.uname", "os.sched_yield", "os.path", "os.umask",
    "os.getgroups", "os.stat_result", "os.statvfs_result", "os.DirEntry", "os.fspath",
    "os.set_blocking", "os.set_inheritable", "select.poll",
    "syscalls.is_gone", "syscalls.fd_path", "syscalls.fdinfo_path", "syscalls.mountinfo_path",
    "syscalls.use_working_directory_as_process", "syscalls.sees_processes",
}  # fmt: skip
"""Names in the table's sources that make no system call, or one that cannot fail."""
LEFT_OUT = {
    "os.close": "close(2) gives the descriptor back whatever it answers",
}
_MODULES = {
    "os": os,
    "fcntl": fcntl,
    "select": select,
    "syscalls": syscalls,
    "credentials": credentials,
}


class Call(NamedTuple):
    """A function whose failure is tried."""

    owner: Any
    name: str
    label: str


def _imports(name: str, path: Path) -> Iterator[str]:
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            module = ".".join(filter(None, base))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    """The files that the core is made of: what the roots import, and so on."""
    top = Path(fsd.__file__).parent
    found: dict[str, Path] = {}
    todo = [*ROOTS]
    while todo:
        name = todo.pop()
        path = top / f"{name.replace('.', '/')}.py"
        if name not in found and path.exists() and not name.endswith("_pb2"):
            found[name] = path
            todo += _imports(name, path)
    return found


def _called(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = _MODULES.get(node.value.id)
            if owner is not None and callable(getattr(owner, node.attr, None)):
                yield f"{node.value.id}.{node.attr}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "open"
        ):
            yield "open"


def table() -> list[Call]:
    """All of them."""
    labels = {label for path in modules().values() for label in _called(path)}
    labels |= {
        f"{label}.{name}"
        for label, module in (("syscalls", syscalls), ("credentials", credentials))
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if member.__module__ == module.__name__ and not name.startswith("_")
    }
    labels = {label for label in labels if label not in PURE and label not in LEFT_OUT}
    labels = {label for label in labels if not isinstance(_function(label), type)}
    calls = [Call(pyinotify.WatchManager, "add_watch", "inotify_add_watch")]
    for label in sorted(labels):
        owner, _, name = label.rpartition(".")
        calls.append(Call(_MODULES.get(owner, builtins), name, label))
    return calls


def _function(label: str) -> object:
    owner, _, name = label.rpartition(".")
    return getattr(_MODULES.get(owner, builtins), name)


class Injector:
    """Counts the core's calls of a function; from the ``first`` on, ``times`` of them fail."""

    def __init__(self, call: Call, number: int, first: int, times: int) -> None:
        self._call = call
        self._number = number
        self._failing = range(first, first + times)
        self.count = 0
        self.failed = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """For a with block."""
        owner, name, _ = self._call
        real = getattr(owner, name)
        setattr(owner, name, self._wrapper(real))
        try:
            yield
        finally:
            setattr(owner, name, real)

    def _wrapper(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not _is_core(sys._getframe(1).f_globals):
                return real(*args, **kwargs)
            self.count += 1
            if self.count not in self._failing:
                return real(*args, **kwargs)
            self.failed += 1
            if self._call.name == "add_watch":  # pyinotify answers so, and leaves the errno
                ctypes.set_errno(self._number)
                return {args[1]: -1}
            raise OSError(self._number, os.strerror(self._number))

        return wrapper


def _is_core(caller: dict[str, Any]) -> bool:
    module: str = caller.get("__name__", "")
    return module.startswith("fsd.")
