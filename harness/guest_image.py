"""The image that guests boot: Debian's stock kernel and an initramfs of Debian's binaries, in
.cache.

Nothing is installed on the host. The image changes with the versions that apt offers. Files of this
checkout (the runner, fsd-guest.pyz) are appended at each start: the kernel accepts several archives
in a row.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness import debian

ROOT = Path(__file__).parents[1]
RUNNER = Path(__file__).with_name("guest_runner.py")
PYTHON = ("{}-minimal", "lib{}-minimal", "lib{}-stdlib")
LIBRARIES = ("libc6", "zlib1g", "libexpat1", "libffi8")
PROGRAMS = ("busybox-static", "inotify-tools", "libinotifytools0")
MODULES = (  # in the order of insmod; their dependencies are added
    "virtio_pci",
    "virtio_console",
    "fuse",
    "virtiofs",
)
LEFT_OUT = re.compile(  # of the packages: large, and no test wants it
    r"usr/share/|etc/(?!ld)|.*/(idlelib|lib2to3|distutils|ensurepip|pydoc_data|turtledemo|unittest"
    r"|asyncio|config-[^/]*|gconv|xml|email|sqlite3|curses|multiprocessing|dbm|wsgiref)/"
    r"|.*/lib-dynload/_?(test|xxtest|codecs_|sqlite|ssl|curses|decimal|dbm|nis)"
)
SUITE = ("tests/__init__.py", "tests/mount/__init__.py", "tests/mount/posix_*.py",
         "tests/fidelity/__init__.py", "tests/fidelity/watcher.py", "harness/__init__.py",
         "harness/open_files.py", "harness/busy_files.py",
         "harness/appending.py")  # fmt: skip
"""Of this checkout, in the guest's /suite: programs for tests; standard library only."""
INIT = """#!/bin/busybox sh
export PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs none /tmp
mount -t tracefs none /sys/kernel/tracing
for module in {modules}; do insmod /lib/modules/$module; done
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" = {port} ] && exec python3 /runner.py /dev/${{port##*/}}
done
echo "no port {port}"
"""
PORT = "fsd.run"


@dataclass(frozen=True)
class Image:
    """A kernel that QEMU boots by PVH, and the initramfs for it."""

    kernel: Path
    initramfs: Path


@cache
def image() -> Image:
    """The image of this checkout, made if it does not exist yet."""
    python = debian.depends("python3-minimal", r"(python3\.\d+)-minimal")
    linux = debian.depends("linux-image-cloud-amd64", r"(linux-image-\S+)")
    packages = [linux, *(name.format(python) for name in PYTHON), *LIBRARIES, *PROGRAMS]
    made_for = [*debian.versions(packages), Path(__file__).read_text()]
    digest = hashlib.sha256("\n".join(made_for).encode()).hexdigest()[:16]
    folder = debian.CACHE / f"guest-{digest}"
    with (debian.cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes make it once
        if not folder.exists():
            _make(folder, packages, python)
    return Image(folder / "vmlinux", folder / "initramfs")


def _make(folder: Path, packages: list[str], python: str) -> None:
    with tempfile.TemporaryDirectory(dir=debian.cache()) as scratch:
        tree = Path(scratch, "tree")
        debian.extract(packages, tree)
        made = Path(scratch, "made")
        made.mkdir()
        (made / "vmlinux").write_bytes(vmlinux(next(tree.glob("boot/vmlinuz-*")).read_bytes()))
        (made / "initramfs").write_bytes(b"".join(_base(tree, python)))
        made.rename(folder)  # in one step: there or not
        for other in debian.CACHE.glob("guest-*"):
            if other != folder:
                shutil.rmtree(other)


@cache
def overlay() -> bytes:
    """The files of this checkout, as an archive to append."""
    with tempfile.TemporaryDirectory() as scratch:
        guest = Path(scratch, "fsd-guest.pyz")
        subprocess.run(
            [sys.executable, ROOT / "script" / "build", guest],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        files = [
            entry("runner.py", stat.S_IFREG | 0o644, RUNNER.read_bytes()),
            entry("fsd-guest.pyz", stat.S_IFREG | 0o755, guest.read_bytes()),
        ]
    suite = [path for pattern in SUITE for path in sorted(ROOT.glob(pattern))]
    parents = {parent for path in suite for parent in path.relative_to(ROOT.parent).parents}
    folders = sorted(Path("suite", *parent.parts[1:]) for parent in parents if parent.name)
    files += [entry(folder.as_posix(), stat.S_IFDIR | 0o755) for folder in folders]
    for path in suite:
        name = path.relative_to(ROOT).as_posix()
        files.append(entry(f"suite/{name}", stat.S_IFREG | 0o644, path.read_bytes()))
    return b"".join([*files, trailer()])


# The kernel


def vmlinux(bzimage: bytes) -> bytes:
    """The ELF file inside a bzImage (Documentation/x86/boot.rst: payload_offset and _length)."""
    assert bzimage[0x202:0x206] == b"HdrS", "no bzImage"
    setup = (bzimage[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    payload = bzimage[setup + offset : setup + offset + length - 4]  # after it: its size
    assert payload.startswith(b"\x02\x21\x4c\x18"), "the kernel's payload is not LZ4"
    command = ["lz4", "-d", "-c", "-q"]
    elf = subprocess.run(command, input=payload, capture_output=True, check=True, timeout=60).stdout
    assert elf.startswith(b"\x7fELF")
    return elf


def _module_order(tree: Path) -> Iterator[tuple[str, bytes]]:
    """The modules, each behind those that its `depends=` names."""
    files = {path.name.partition(".")[0]: path for path in tree.rglob("*.ko*")}
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done:
            return
        done.add(name)
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        assert depends is not None
        for other in depends[1].decode().split(","):
            if other:
                yield from visit(other.replace("-", "_"))
        yield name, data

    for name in MODULES:
        yield from visit(name)


# The initramfs (Documentation/driver-api/early-userspace/buffer-format.rst: newc)


def entry(name: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a newc archive; inode number 0, because no file here has two names."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def trailer() -> bytes:
    """The end of an archive."""
    return entry("TRAILER!!!", 0)


def _base(tree: Path, python: str) -> Iterator[bytes]:
    modules = dict(_module_order(tree))
    shutil.rmtree(tree / "boot")
    shutil.rmtree(tree / "lib" / "modules", ignore_errors=True)
    shutil.rmtree(tree / "usr" / "lib" / "modules", ignore_errors=True)
    library = tree / "usr" / "lib" / python
    # Compiled only, without the sources: Python then starts in half the time.
    compiler = tree / "usr" / "bin" / python
    subprocess.run([compiler, "-m", "compileall", "-q", "-b", library], timeout=120, check=False)
    for source in library.rglob("*.py"):
        source.unlink()
    directories = {"proc", "sys", "dev", "tmp", "root", "etc", "mnt", "usr", "usr/bin", "usr/lib"}
    files: list[bytes] = []
    for path in sorted(tree.rglob("*")):
        name = path.relative_to(tree).as_posix()
        if LEFT_OUT.match(name + "/" * path.is_dir()) or (path.is_dir() and not path.is_symlink()):
            continue
        if not name.startswith(("usr/", "etc/")):
            name = f"usr/{name}"  # bin, lib and lib64 are links to it
        directories |= {parent.as_posix() for parent in Path(name).parents if parent.name}
        mode = path.lstat().st_mode
        data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        files.append(entry(name, mode, data))
    for link in ("bin", "lib", "lib64", "sbin"):
        target = "usr/bin" if link == "sbin" else f"usr/{link}"
        files.append(entry(link, stat.S_IFLNK | 0o777, target.encode()))
    directories |= {"usr/lib64", "usr/lib/modules"}
    files += [
        entry(f"usr/bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in _applets(tree)
    ]
    files.append(entry("usr/bin/python3", stat.S_IFLNK | 0o777, python.encode()))
    for name, data in modules.items():
        files.append(entry(f"usr/lib/modules/{name}.ko", stat.S_IFREG | 0o644, data))
    init = INIT.format(modules=" ".join(f"{name}.ko" for name in modules), port=PORT)
    files.append(entry("init", stat.S_IFREG | 0o755, init.encode()))
    accounts = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n"
    accounts += "nobody:x:65534:65534::/tmp:/bin/sh\n"
    files.append(entry("etc/passwd", stat.S_IFREG | 0o644, accounts.encode()))
    groups = "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n"
    files.append(entry("etc/group", stat.S_IFREG | 0o644, groups.encode()))
    files.append(entry("dev/console", stat.S_IFCHR | 0o600, rdev=(5, 1)))
    for directory in sorted(directories):
        mode = 0o1777 if directory == "tmp" else 0o755
        yield entry(directory, stat.S_IFDIR | mode)
    yield from files
    yield trailer()


def _applets(tree: Path) -> list[str]:
    """Programs of busybox that have no file of their own."""
    done = subprocess.run(
        [tree / "bin" / "busybox", "--list"], capture_output=True, text=True, check=True, timeout=60
    )
    return [name for name in done.stdout.split() if name != "busybox"]
