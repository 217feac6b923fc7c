"""Storms in watched directories: a `git checkout` between two trees, an unpacked archive.

One program watches the host's directories, another the same ones through the mount, and both get
the events of the same storm. What the host's reader got and the mount's did not is lost.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from harness.mounts import mounted
from protocol.masks import Mask

from .readers import Seen, reading
from .report import Report, number
from .usage import Usage

FOLDERS, CHECKED_OUT, UNPACKED = 500, 50_000, 200_000
TYPICAL = Mask.CREATE | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.DELETE | Mask.MOVED_FROM
TYPICAL |= Mask.MOVED_TO
PATIENCE = 600.0
GIT = ["git", "-c", "user.name=b", "-c", "user.email=b@b.invalid", "-c", "gc.auto=0", "-C"]


class Storm(NamedTuple):
    """What both readers got of it; times in seconds."""

    alone: float
    """How long it takes on a directory that nobody watches."""
    beside: float
    """The same, watched."""
    last: float
    """From its begin to the last event of the mount's reader."""
    cpu: float
    """Processor time of server and agent."""
    host: list[Seen]
    mount: list[Seen]


def measure() -> Report:
    """Run it: some 10 minutes."""
    report = Report("storms")
    rows = []
    for title, make, blow in (
        (f"git checkout, {CHECKED_OUT:,} files", _two_trees, _check_out),
        (f"tar, {UNPACKED:,} files", _archive, _unpack),
    ):
        storm = _measured(make, blow)
        host, mount = _by_name(storm.host), _by_name(storm.mount)
        kinds = [Counter((n, m) for n, masks in s.items() for m in masks) for s in (host, mount)]
        lost, more = ((a - b).total() for a, b in (kinds, kinds[::-1]))
        orders = sum(mount.get(name) != masks for name, masks in host.items())
        values = [len(storm.host), storm.alone, storm.beside, storm.last]
        values += [
            len(storm.mount) / storm.last,
            storm.cpu / len(storm.mount) * 1e6,
            lost,
            more,
            orders,
        ]
        rows.append([title, *map(number, values)])
        report.add(f"{title}: done, times its own", storm.last / storm.alone, "", goal=2.0)
        report.add(f"{title}: lost", lost, "events", goal=0)
    heads = ["storm", "events", "s alone", "s watched", "s to the last event"]
    heads += ["events/s", "us CPU", "lost", "too many", "files that differ"]
    report.table(f"{FOLDERS} watched directories; {TYPICAL!r}", heads, rows)
    return report


def _by_name(events: list[Seen]) -> dict[str, list[int]]:
    """The events of each file, without repeats, which a slow reader's queue merges."""
    found: dict[str, list[int]] = {}
    for _, mask, name in events:
        masks = found.setdefault(name, [])
        if name != "~end" and masks[-1:] != [mask]:
            masks.append(mask)
    return found


def _measured(make: Callable[[Path], None], blow: Callable[[Path], None]) -> Storm:
    with tempfile.TemporaryDirectory() as scratch:
        source, mountpoint, other = (Path(scratch, name) for name in ("source", "mount", "other"))
        for path in (source / "tree", mountpoint, other / "tree"):
            path.mkdir(parents=True)
        for path in (source, other):
            make(path)
        begun = time.monotonic()
        blow(other)
        alone = time.monotonic() - begun
        tree = source / "tree"
        with (
            mounted(source, mountpoint) as mount,
            reading(tree, tree, TYPICAL, recursive=True) as native,
            reading(tree, mountpoint / "tree", TYPICAL, recursive=True) as watcher,
        ):
            mount.wait_armed(mountpoint / f"tree/d{FOLDERS - 1}", pid=watcher.process.pid)
            state = json.loads((mountpoint / ".fsd/status").read_text())
            pids = [mount.process.pid, state["guests"][0]["agent_pid"]]
            cpu = sum(Usage(pid).seconds for pid in pids)
            begun = time.monotonic()
            blow(source)
            beside = time.monotonic() - begun
            host = native.finish()
            seen = watcher.finish(PATIENCE)
            last = seen[-1].when / 1e9 - begun
            cpu = sum(Usage(pid).seconds for pid in pids) - cpu
            return Storm(alone, beside, last, cpu, host, seen)


def _folders(source: Path, files: int) -> list[tuple[Path, range]]:
    each = files // FOLDERS
    return [(source / f"tree/d{n}", range(each)) for n in range(FOLDERS)]


def _two_trees(source: Path) -> None:
    """A repository with two branches that differ in each file."""
    git = [*GIT, str(source / "tree")]
    subprocess.run([*git, "init", "-q", "-b", "0"], check=True)
    for branch in ("0", "1"):
        if branch == "1":
            subprocess.run([*git, "checkout", "-q", "-b", branch], check=True)
        for folder, files in _folders(source, CHECKED_OUT):
            folder.mkdir(exist_ok=True)
            for index in files:
                (folder / f"{folder.name}-{index}").write_text(f"{branch}{folder.name}{index}\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", branch], check=True)


def _check_out(source: Path) -> None:
    subprocess.run([*GIT, str(source / "tree"), "checkout", "-q", "0"], check=True)


def _archive(source: Path) -> None:
    with tarfile.open(source / "a.tar", "w") as tar:
        for folder, files in _folders(source, UNPACKED):
            folder.mkdir()
            for index in files:
                member = tarfile.TarInfo(f"tree/{folder.name}/{folder.name}-{index}")
                member.size = 16
                tar.addfile(member, BytesIO(b"0123456789abcdef"))


def _unpack(source: Path) -> None:
    subprocess.run(["tar", "-xf", str(source / "a.tar"), "-C", str(source)], check=True)
