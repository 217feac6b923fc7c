"""`fsd status` as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protocol import masks

_ROWS = (
    ("transport", "transport"), ("agent", "agent"), ("marks", "marks"), ("queued", "depth"),
    ("forwarded", "forwarded"), ("own echo", "echo"), ("coalesced", "coalesced"),
    ("replayed", "replayed"), ("failed", "failed"), ("refused", "refused"), ("missed", "missed"),
    ("overflows", "overflows"), ("resyncs", "resyncs"), ("requests waited", "waited"),
    ("waits cut short", "waits_cut"), ("repeated", "repeated"),
)  # fmt: skip
_BESIDE = 4
"""Guests shown side by side: their columns fit an ordinary terminal."""


def render(path: str, state: dict[str, Any]) -> None:
    """Print one mount's state."""
    console = Console(highlight=False)
    counts = state["counts"]
    for line in (
        f"[bold]{escape(path)}[/bold] shares {escape(state['source'])}",
        f"  server pid {state['pid']}, inodes {state['inodes']}, host watches"
        f" {state['host_watches']} ({len(state['unwatched'])} refused by the host)",
        f"  events in {counts.get('in', 0)}, backlog {state['backlog']}, host overflows"
        f" {counts.get('overflows', 0)}, resyncs {counts.get('resyncs', 0)}",
    ):
        console.print(line, soft_wrap=True)
    guests = state["guests"]
    for guest in guests:
        if cache := guest.get("cache"):
            console.print(_kept(guest["name"], cache), soft_wrap=True)
        if backed := guest.get("passthrough"):
            console.print(_moved(guest["name"], backed), soft_wrap=True)
    for start in range(0, len(guests), _BESIDE):
        console.print(_table(guests[start : start + _BESIDE]))
    console.print(_by_kind([state, *guests]))


def _kept(name: str, cache: dict[str, Any]) -> str:
    """A line on what a guest's kernel keeps, and how often it was not given something to keep."""
    kept = ", ".join(f"{cache[key]} {key}" for key in ("names", "attributes", "contents"))
    line = f"  {escape(name)}: the kernel keeps {kept} of {cache['directories']} directories"
    short = [f"{reason} {count}" for reason, count in sorted(cache["short"].items())]
    if cache["disabled"]:
        short = [cache["disabled"]]
    return f"{line}; not kept: {', '.join(short)}" if short else line


def _moved(name: str, backed: dict[str, Any]) -> str:
    """A line on the files whose data a guest's kernel moves itself, and why it does not others'."""
    if backed["disabled"]:
        return f"  {escape(name)}: the server moves all file data: {escape(backed['disabled'])}"
    line = f"  {escape(name)}: the kernel moves the data of {backed['files']} files itself"
    others = [f"{reason} {count}" for reason, count in sorted(backed["not_so"].items())]
    line += f", {backed['opens']} opens so far"
    return f"{line}; the server's: {', '.join(others)}" if others else line


def _table(guests: list[dict[str, Any]]) -> Table:
    """One column per guest: more guests fit next to each other than so many figures would."""
    table = Table()
    table.add_column("guest", no_wrap=True)
    for guest in guests:
        table.add_column(escape(guest["name"]), justify="right", overflow="fold")
    rows = [(title, [guest.get(key) for guest in guests]) for title, key in _ROWS]
    rows += [(f"{p} ms", [guest["latency_ms"][p] for guest in guests]) for p in ("p50", "p99")]
    for title, cells in rows:
        table.add_row(title, *map(_cell, cells))
    return table


_FATES = (
    ("in", "in"), ("forwarded", "forwarded"), ("own echo", "echo"), ("coalesced", "coalesced"),
    ("replayed", "replayed"), ("failed", "failed"),
)  # fmt: skip


def _by_kind(states: list[dict[str, Any]]) -> Table:
    """The events of each kind and how they were handled, all guests together (--json has each)."""
    table = Table()
    table.add_column("events")
    for title, _ in _FATES:
        table.add_column(title, justify="right")
    for kind in masks.names(int(masks.EVENTS)):
        rows = [state["by_kind"][kind] for state in states if kind in state["by_kind"]]
        if rows:
            table.add_row(kind, *(str(sum(row.get(key, 0) for row in rows)) for _, key in _FATES))
    return table


def _cell(value: object) -> str:
    return (
        {True: "yes", False: "no", None: "-"}[value]
        if isinstance(value, bool | None)
        else str(value)
    )
