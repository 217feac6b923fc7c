"""The random host and the watcher, without any mount: what the fidelity tests rest on."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fidelity.calls import Executor
from tests.fidelity.compare import CONTROL, first_difference, normalise
from tests.fidelity.operations import WEIGHTS, Generator, Plan
from tests.fidelity.run import MASKS, Arena, Case, Outcome, faults, minimise, run

IN_MOVED_TO = 0x80


def fresh(tmp_path: Path, name: str = "source") -> Arena:
    (tmp_path / name).mkdir()
    return Arena.native(tmp_path / name)


def names(plan: Plan) -> set[bytes]:
    paths = (
        argument
        for step in plan.steps
        for call in step.calls
        for argument in call.args
        if isinstance(argument, bytes)
    )
    return {path.rsplit(b"/", 1)[-1] for path in paths}


def test_a_plan_follows_from_its_seed() -> None:
    one = Generator(7, watch_files=True).plan(300)
    assert one == Generator(7, watch_files=True).plan(300)
    assert one != Generator(8, watch_files=True).plan(300)
    assert one.steps[:100] == Generator(7, watch_files=True).plan(100).steps


def test_a_plan_is_about_everything() -> None:
    plan = Generator(1, watch_files=True).plan(2000)
    assert {step.kind for step in plan.steps} == WEIGHTS.keys()
    for what, found in {
        "255 bytes": [n for n in names(plan) if len(n) == 255],
        "a newline": [n for n in names(plan) if b"\n" in n],
        "a space": [n for n in names(plan) if b" " in n],
        "not UTF-8": [n for n in names(plan) if n != n.decode(errors="ignore").encode()],
        "not ASCII": [n for n in names(plan) if not n.isascii()],
    }.items():
        assert found, what
    assert any(b"/" in path for path in plan.directories), "a nested directory is watched"
    assert len(plan.directories) < 9, "a directory is not watched"
    assert len(plan.files) == 10


def test_steps_can_be_left_out() -> None:
    plan = Generator(1, without=frozenset({"rename_dir", "chmod"})).plan(500)
    assert not {step.kind for step in plan.steps} & {"rename_dir", "chmod"}
    plan = Generator(1, only=frozenset({"mkdir", "rmdir"})).plan(50)
    assert {step.kind for step in plan.steps} == {"mkdir", "rmdir"}


@pytest.mark.parametrize("seed", range(4))
def test_the_model_is_exact(tmp_path: Path, seed: int) -> None:
    """Nothing fails but what is meant to, and at the end the tree is the model's."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    generator = Generator(seed, watch_files=True)
    plan = generator.plan(3000)
    executor = Executor(root, outside)
    executor.run(plan.setup)
    for step in plan.steps:
        executor.run(step.calls)
    executor.close()
    assert executor.unexpected() == []
    assert executor.failures, "RENAME_NOREPLACE was never refused"
    found = {os.fsencode(path.relative_to(root)) for path in root.rglob("*")}
    assert found == generator.paths()


@pytest.mark.parametrize("files", [False, True], ids=["dirs", "files"])
@pytest.mark.parametrize("burst", [False, True], ids=["paced", "burst"])
@pytest.mark.parametrize("mask", ["all", "names", "oneshot", "excl_unlink"])
def test_native_equals_native(tmp_path: Path, mask: str, burst: bool, files: bool) -> None:
    """Through a second path to the same inodes, so the paths differ as they do for a mount."""
    arena = fresh(tmp_path)
    (tmp_path / "second").symlink_to(arena.source)
    case = Case(11, 400, burst=burst, files=files, mask=MASKS[mask])
    outcome = run(case, replace(arena, mountpoint=tmp_path / "second"))
    assert not outcome.report()
    assert len(outcome.native) > (20 if mask == "oneshot" else 300)


def test_two_writers_equal_natively(tmp_path: Path) -> None:
    case = Case(3, 400, burst=True, files=True, writers=2)
    outcome = run(case, fresh(tmp_path))
    assert not outcome.report()
    seen = {event.watch.split("/")[0] for event in outcome.native}
    assert seen == {"w0", "w1", CONTROL}


def test_the_same_operations_make_the_same_stream_again(tmp_path: Path) -> None:
    case = Case(5, 500, files=True)
    streams = [run(case, fresh(tmp_path, name)).native for name in ("first", "second")]
    assert first_difference(*streams) is None


def test_a_late_or_surplus_event_is_seen(tmp_path: Path) -> None:
    """What comes after the end is part of the stream."""
    outcome = run(Case(2, 50), fresh(tmp_path))
    assert normalise(outcome.native)[-1].watch == CONTROL
    assert outcome.native[-1].name == b"end"


def test_a_lost_event_is_noticed(tmp_path: Path) -> None:
    case = Case(4, 60, files=True)
    outcome = run(case, fresh(tmp_path))
    for lost in range(0, len(outcome.native), 7):
        broken = [event for index, event in enumerate(outcome.native) if index != lost]
        same = normalise(broken) == normalise(outcome.native)  # it was a repeat
        assert bool(Outcome(case, outcome.plans, outcome.native, broken).report()) is not same


def test_what_the_server_counts_as_wrong_is_noticed(tmp_path: Path) -> None:
    (tmp_path / ".fsd").mkdir()
    guest = {"failed": 0, "by_kind": {}}
    state = {"counts": {"in": 1}, "guests": [guest]}
    (tmp_path / ".fsd/status").write_text(json.dumps(state))
    assert faults(tmp_path) == []
    state["counts"] = {"faults": 2}
    guest |= {"failed": 1, "by_kind": {"moved_from": {"failed": 1}}}
    (tmp_path / ".fsd/status").write_text(json.dumps(state))
    assert len(faults(tmp_path)) == 2


def test_minimising_finds_the_step(tmp_path: Path) -> None:
    """As if IN_MOVED_TO never arrived: few of the steps remain."""
    case = Case(6, 40)
    counter = itertools.count()
    outcome = minimise(
        case,
        case.plans()[0].steps,
        lambda: fresh(tmp_path, f"run-{next(counter)}"),
        lambda native, mount: first_difference(
            native, [event for event in mount if not event.mask & IN_MOVED_TO]
        ),
    )
    assert outcome is not None
    assert len(outcome.plans[0].steps) <= 2  # the rename, and at most one that it needs
    assert any(event.mask & IN_MOVED_TO for event in outcome.native)
