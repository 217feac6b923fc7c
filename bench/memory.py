"""Memory of server and agent per watch: the difference that 10,000 watches make."""

from __future__ import annotations

from .report import Report, number
from .usage import Usage
from .watching import WATCHES, served_tree, settled


def measure() -> Report:
    """Run it: some 40 s."""
    report = Report("memory")
    with served_tree(WATCHES) as served:
        settled(served)
        before = {name: Usage(pid).memory_kib for name, pid in served.processes()}
        served.watch(WATCHES)
        settled(served)
        after = {name: Usage(pid).memory_kib for name, pid in served.processes()}
    rows = []
    for name in before:
        each = (after[name] - before[name]) * 1024 / WATCHES
        rows.append([name, number(before[name] / 1024), number(after[name] / 1024), number(each)])
        report.add(f"{name}, a watch", each, "bytes")
    heads = ["process", "MiB before", f"MiB with {WATCHES:,} watches", "bytes a watch"]
    report.table("memory of their own (RssAnon)", heads, rows)
    report.notes.append("the kernel's own memory for inotify watches, on both sides, comes on top")
    return report
