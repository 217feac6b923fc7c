"""Passthrough file systems to compare with: bindfs, and libfuse's examples in C and C++."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.debian import closure, source_files
from harness.mounts import mounts_at, wait_until

_FOUND = ["UTIMENSAT", "SETXATTR", "FALLOCATE", "POSIX_FALLOCATE", "COPY_FILE_RANGE"]
"""What libfuse's own build finds on Linux; without it passthrough_hp cannot set times."""
_HEADERS = ("example/passthrough_helpers.h", "example/cxxopts.hpp")


def passthrough_ll(source: Path, mountpoint: Path, cache: str = "") -> list[str]:
    """Its command; without ``cache`` the kernel may keep names and attributes for a second."""
    options = f"source={source}" + (f",cache={cache}" if cache else "")
    return [str(_example("passthrough_ll.c", "gcc")), "-f", "-o", options, str(mountpoint)]


def passthrough_hp(source: Path, mountpoint: Path, *, cached: bool = True) -> list[str]:
    """Its command; ``cached``, the kernel may keep everything for a day, what is written too."""
    options = ["--foreground", *([] if cached else ["--nocache"])]
    return [str(_example("passthrough_hp.cc", "g++")), *options, str(source), str(mountpoint)]


def passthrough_hp_of_trixie(source: Path, mountpoint: Path) -> list[str]:
    """The same of Debian 13, whose libfuse has FUSE_PASSTHROUGH: it runs beside its own libraries.

    Of what it caches, it does not write back: the kernel itself reads and writes the files.
    """
    name = "passthrough_hp.cc"
    folder = source_files("fuse3", (f"example/{name}", *_HEADERS), "trixie")
    tree = closure("trixie", ["libfuse3-dev", "libstdc++6"])
    (library,) = tree.glob("usr/lib/*/libfuse3.so.4")
    flags = [f"-I{tree}/usr/include/fuse3", str(library), "-Wl,--allow-shlib-undefined"]
    binary = _compiled(folder / name, "g++", flags)
    (loader,) = tree.glob("usr/lib/*/ld-linux-*.so.*")
    program = [str(loader), "--library-path", str(library.parent), str(binary)]
    return [*program, "--foreground", str(source), str(mountpoint)]


def bindfs(source: Path, mountpoint: Path) -> list[str]:
    """Its command; the kernel may keep names and attributes for a second."""
    return ["bindfs", "-f", str(source), str(mountpoint)]


def _example(name: str, compiler: str) -> Path:
    """The binary of an example in Debian's source package."""
    folder = source_files("fuse3", (f"example/{name}", *_HEADERS))
    command = ["pkg-config", "--cflags", "--libs", "fuse3"]
    flags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return _compiled(folder / name, compiler, flags)


def _compiled(source: Path, compiler: str, flags: list[str]) -> Path:
    """A source file's binary, beside it; compiled if it does not exist yet."""
    binary = source.with_suffix("")
    if not binary.exists():
        part = binary.with_suffix(".part")
        flags = [*flags, "-O2", "-w", "-pthread", *(f"-DHAVE_{name}" for name in _FOUND)]
        subprocess.run([compiler, "-o", str(part), str(source), *flags], check=True)
        part.rename(binary)
    return binary


@contextmanager
def served_by(command: list[str], mountpoint: Path) -> Iterator[int]:
    """Another file system's server, in the foreground, for the block: its process."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: mounts_at(mountpoint), 10, f"{command[0]} has mounted")
            yield process.pid
        finally:
            if mounts_at(mountpoint):
                tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
                subprocess.run([*tool, str(mountpoint)], check=True)
            process.terminate()
