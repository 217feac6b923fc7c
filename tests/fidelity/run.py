"""Runs one case: a watcher below the source, one below the mount, and random work on the host.

Also a command, for long runs by hand:

    python -m tests.fidelity.run --seed 7 --ops 100000 --mode burst --files SOURCE MOUNTPOINT

It mounts SOURCE unless something is mounted at MOUNTPOINT already; without a MOUNTPOINT it compares
native with native, which must be equal. Exit code 0: equal; 1: different.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from harness.mounts import Mount, mounted, mounts_at
from tests.fidelity.calls import Executor, Step
from tests.fidelity.compare import (
    CONTROL,
    IN_Q_OVERFLOW,
    Comparison,
    Difference,
    Stream,
    first_difference,
    first_difference_but_deaths,
    load,
    since,
)
from tests.fidelity.operations import WEIGHTS, Generator, Plan

IN_CLOSE_WRITE, IN_CREATE, IN_DELETE = 0x8, 0x100, 0x200
IN_MODIFY, IN_ATTRIB, IN_MOVE, IN_SELF = 0x2, 0x4, 0xC0, 0xC00
IN_ALL_EVENTS = 0xFFF
IN_EXCL_UNLINK, IN_ONESHOT = 0x04000000, 0x80000000
MASKS = {
    "all": IN_ALL_EVENTS,
    "changes": IN_MODIFY | IN_ATTRIB | IN_CREATE | IN_DELETE | IN_MOVE | IN_SELF,
    "names": IN_CREATE | IN_DELETE | IN_MOVE,
    "typical": IN_CREATE | IN_MODIFY | IN_CLOSE_WRITE | IN_DELETE | IN_MOVE,
    "close_write": IN_CLOSE_WRITE,
    "oneshot": IN_ALL_EVENTS | IN_ONESHOT,
    "excl_unlink": IN_ALL_EVENTS | IN_EXCL_UNLINK,
}

START, END = b"mark-start", b"end"
LINGER = 0.3
"""How long after the end something surplus is waited for."""
STEP_TIMEOUT = 20.0
AHEAD = 1500
"""How many operations a burst may be ahead of the slower watcher: the events of twice as many fit
into the kernel's usual queue of 16,384, and an overflow is another test's matter.
"""


@dataclass(frozen=True)
class Case:
    """What is done and how it is watched; the whole run follows from it."""

    seed: int
    steps: int
    burst: bool = False
    files: bool = False
    mask: int = IN_ALL_EVENTS
    writers: int = 1
    without: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()

    @property
    def tops(self) -> list[bytes]:
        return [b""] if self.writers == 1 else [b"w%d/" % i for i in range(self.writers)]

    def plans(self) -> list[Plan]:
        return [
            Generator(self.seed + i, self.files, top, self.without, self.only).plan(self.steps)
            for i, top in enumerate(self.tops)
        ]

    def __str__(self) -> str:
        """The command that does it again."""
        words = [
            f"--seed {self.seed} --ops {self.steps} --mode {'burst' if self.burst else 'paced'}"
        ]
        words += ["--files"] * self.files
        words += [f"--mask {self.mask:#x}"] * (self.mask != IN_ALL_EVENTS)
        words += [f"--writers {self.writers}"] * (self.writers > 1)
        words += [f"--without {','.join(sorted(self.without))}"] * bool(self.without)
        words += [f"--only {','.join(sorted(self.only))}"] * bool(self.only)
        return " ".join(["python -m tests.fidelity.run", *words, "SOURCE MOUNTPOINT"])

    @property
    def timeout(self) -> float:
        return 60 + self.steps * self.writers * 0.02


class Process(Protocol):
    """A process here, or in a guest."""

    @property
    def pid(self) -> int: ...


class Watching(Protocol):
    """A run of the watcher program, wherever it runs."""

    side: str

    @property
    def process(self) -> Process: ...
    def start(self, timeout: float = 20) -> None: ...
    def saw(self, marker: bytes, timeout: float) -> bool: ...
    def finish(self, timeout: float) -> bool: ...
    def stream(self) -> Stream: ...
    def __enter__(self) -> Watching: ...
    def __exit__(self, *_: object) -> None: ...


Arm = Callable[[Sequence[Path], Process], None]
"""Waits until the marks of a watcher on the mount are armed."""


def _lives() -> None:
    """Nothing can die where no server is."""


def _no_faults() -> list[str]:
    """Nor can anything go wrong in it."""
    return []


def faults(mountpoint: Path) -> list[str]:
    """What the server itself counts as gone wrong."""
    state = json.loads((mountpoint / ".fsd" / "status").read_text())
    count = state["counts"].get("faults", 0)
    found = [f"faults of the server: {count}"] * bool(count)
    for guest in state["guests"]:
        if guest["failed"]:
            found.append(f"failed to replay: {guest['failed']} ({guest['by_kind']})")
    return found


@dataclass(frozen=True)
class Arena:
    """Where a case is run; `outside` is on the file system of `source`, but not shared."""

    source: Path
    mountpoint: Path
    outside: Path
    arm: Arm
    lives: Callable[[], None] = _lives
    """Fails if the server has died, lest anything be waited for in vain."""
    faults: Callable[[], list[str]] = _no_faults

    def watch(self, paths: list[bytes], mask: int) -> Watching:
        """The watcher on the mount."""
        return Watcher("mount", self.mountpoint, paths, mask, self.lives)

    @classmethod
    def of(cls, mount: Mount) -> Arena:
        def lives() -> None:
            assert mount.process.poll() is None, "the server has died"

        return cls(
            mount.source,
            mount.mountpoint,
            mount.source.with_name(mount.source.name + ".outside"),
            lambda paths, watcher: mount.wait_armed(*paths, pid=watcher.pid),
            lives,
            lambda: faults(mount.mountpoint),
        )

    @classmethod
    def native(cls, source: Path) -> Arena:
        """Both watchers on the source: proves the comparison, or records what a host alone says."""
        outside = source.with_name(source.name + ".outside")
        return cls(source, source, outside, lambda *_: None)


def job(base: Path, paths: list[bytes], mask: int, output: Path) -> bytes:
    """What the watcher program gets."""
    words = {
        "base": os.fsencode(base).decode("latin-1"),
        "paths": [path.decode("latin-1") for path in paths],
        "mask": mask,
        "control": CONTROL,
        "end": END.decode(),
        "linger": LINGER,
        "output": str(output),
    }
    return json.dumps(words).encode()


class Watcher:
    """The watcher program as a process."""

    def __init__(
        self,
        side: str,
        base: Path,
        paths: list[bytes],
        mask: int,
        lives: Callable[[], None] = _lives,
    ) -> None:
        self.side = side
        self._lives = lives
        self._folder = tempfile.TemporaryDirectory(prefix="fidelity-")
        self._output = Path(self._folder.name) / "stream.json"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("watcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._lines: list[bytes] = []
        self._rest = b""
        assert self.process.stdin is not None
        self.process.stdin.write(job(base, paths, mask, self._output))
        self.process.stdin.close()

    def wait_line(self, wanted: bytes, timeout: float) -> bool:
        """Wait for a line of the watcher; False if it has not come in time."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while wanted not in self._lines:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], min(left, 1.0))[0]:
                self._lives()
                if not left:
                    return False
                continue
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                return False
            *self._lines, self._rest = (self._rest + data).split(b"\n")
        return True

    def start(self, timeout: float = 20) -> None:
        if not self.wait_line(b"READY", timeout):
            raise AssertionError(f"the {self.side} watcher did not start")

    def saw(self, marker: bytes, timeout: float) -> bool:
        return self.wait_line(b"MARK " + marker, timeout)

    def finish(self, timeout: float) -> bool:
        """Wait until it has seen the end."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(min(left, 1.0)) == 0
            self._lives()
        return False

    def stream(self) -> Stream:
        """End it if it is not at the end, and return all that it has seen."""
        self.process.terminate()
        assert self.process.wait(20) == 0, f"the {self.side} watcher failed"
        return load(self._output.read_text(encoding="ascii"))

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._folder.cleanup()


@dataclass
class Outcome:
    case: Case
    plans: list[Plan]
    native: Stream = field(default_factory=list)
    mount: Stream = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """From the first operation until both watchers had the last event."""

    def difference(self, compare: Comparison = first_difference) -> Difference | None:
        """Compare the two streams; of concurrent writers only the order of each means anything."""
        if self.case.writers == 1:
            return compare(self.native, self.mount)
        for top in self.case.tops:
            sides = (
                [event for event in stream if (event.watch + "/").startswith(top.decode())]
                for stream in (self.native, self.mount)
            )
            if found := compare(*sides):
                return found
        return None

    def report(self, compare: Comparison = first_difference) -> str:
        """Say what is wrong, as text; empty if nothing is."""
        lines = list(self.problems)
        if difference := self.difference(compare):
            lines.append(str(difference))
            if self.case.writers == 1:
                first = marker_number(difference.marker)
                last = first + marker_interval(self.case)
                lines.append(f"operations about there (of {len(self.plans[0].steps)}):")
                steps = self.plans[0].steps[max(0, first - 6) : last]
                lines += [f"  {max(0, first - 6) + i}: {step}" for i, step in enumerate(steps)]
        return "\n".join([f"{self.case}", *lines]) if lines else ""


def marker_interval(case: Case) -> int:
    return max(20, case.steps // 500) if case.burst else 1


def marker_number(marker: bytes) -> int:
    digits = marker.removeprefix(b"mark-")
    return int(digits) if digits.isdigit() else 0


def prepare(case: Case, arena: Arena) -> list[Plan]:
    arena.outside.mkdir(parents=True)
    (arena.source / CONTROL).mkdir()
    plans = case.plans()
    executor = Executor(arena.source, arena.outside)
    for plan in plans:
        executor.run(plan.setup)
    assert not executor.failures, executor.failures
    return plans


def run(case: Case, arena: Arena, steps: Sequence[Step] | None = None) -> Outcome:
    """Run a case in an empty source; `steps` replaces the plan's, to find a smaller failure."""
    plans = prepare(case, arena)
    watched = [path for plan in plans for path in plan.directories + plan.files]
    mounted_paths = [arena.mountpoint / os.fsdecode(path) for path in [*watched, CONTROL.encode()]]
    outcome = Outcome(case, plans if steps is None else [replace(plans[0], steps=[*steps])])
    with arena.watch(watched, case.mask) as mount:
        mount.start()
        # Arming may list a directory. The native watcher starts only then, lest it sees that.
        arena.arm(mounted_paths, mount.process)
        with Watcher("native", arena.source, watched, case.mask) as native:
            native.start()
            watchers: list[Watching] = [native, mount]
            control = arena.source / CONTROL
            (control / START.decode()).mkdir()
            for watcher in watchers:
                if not watcher.saw(START, STEP_TIMEOUT):
                    raise AssertionError(f"no start marker on the {watcher.side} side")
            begin = time.monotonic()
            if case.writers > 1:
                _write_concurrently(case, arena, outcome)
            else:
                executor = Executor(arena.source, arena.outside)
                _write(case, outcome, executor, control, watchers)
                if steps is None:  # a part of a plan cannot know what will fail
                    outcome.problems += executor.unexpected()
            (control / END.decode()).touch()
            for watcher in watchers:
                if not watcher.finish(case.timeout):
                    outcome.problems.append(f"the {watcher.side} watcher has not seen the end")
            outcome.seconds = time.monotonic() - begin - LINGER
            outcome.native = since(native.stream(), START)
            outcome.mount = since(mount.stream(), START)
    outcome.problems += arena.faults()
    if any(event.mask & IN_Q_OVERFLOW for event in outcome.native + outcome.mount):
        length = 40 * case.steps * case.writers
        outcome.problems.append(
            "an inotify queue overflowed, so nothing can be compared: "
            f"sysctl -w fs.inotify.max_queued_events={length} is long enough"
        )
    return outcome


def _write(
    case: Case, outcome: Outcome, executor: Executor, control: Path, watchers: list[Watching]
) -> None:
    interval = marker_interval(case)
    for number, step in enumerate(outcome.plans[0].steps):
        executor.run(step.calls)
        if (number + 1) % interval:
            continue
        marker = f"mark-{number + 1}"
        (control / marker).mkdir()
        if case.burst:
            if number + 1 <= AHEAD:
                continue
            marker = f"mark-{number + 1 - AHEAD // interval * interval}"
        for watcher in watchers:
            if not watcher.saw(marker.encode(), STEP_TIMEOUT):
                outcome.problems.append(
                    f"not seen on the {watcher.side} side in {STEP_TIMEOUT} s: what follows {step}"
                )
                executor.close()
                return
    executor.close()


def _write_concurrently(case: Case, arena: Arena, outcome: Outcome) -> None:
    with contextlib.ExitStack() as stack:
        writers = []
        for index, top in enumerate(case.tops):
            command = [sys.executable, "-m", "tests.fidelity.operations"]
            command += [str(arena.source), str(arena.outside), f"--seed={case.seed + index}"]
            command += [f"--ops={case.steps}", f"--top={top.decode()}"]
            command += [f"--without={','.join(case.without)}", f"--only={','.join(case.only)}"]
            command += ["--files"] * case.files
            writer = stack.enter_context(
                subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            stack.callback(writer.kill)
            writers.append(writer)
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"READY\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=case.timeout)
            if writer.returncode:
                outcome.problems.append(f"a writer failed: {errors.decode()}")


# --- the command ---------------------------------------------------------------------------------


def minimise(
    case: Case, steps: list[Step], arenas: Callable[[], Arena], compare: Comparison
) -> Outcome | None:
    """Find few steps that still make a difference (delta debugging); None if it does not recur."""

    def failing(part: list[Step]) -> Outcome | None:
        for _ in range(3 if case.burst else 1):  # what happens in a burst depends on its pace
            outcome = run(replace(case, steps=len(part)), arenas(), part)
            if outcome.difference(compare):
                return outcome
        return None

    if not (best := failing(steps)):
        return None
    pieces = 2
    while len(steps) > 1:
        size = -(-len(steps) // pieces)
        for start in range(0, len(steps), size):
            part = steps[:start] + steps[start + size :]
            if part and (outcome := failing(part)):
                steps, best, pieces = part, outcome, max(2, pieces - 1)
                break
        else:
            if size == 1:
                break
            pieces = min(len(steps), pieces * 2)
    return best


def _mount(source: Path, mountpoint: Path, process: Process) -> Mount:
    assert isinstance(process, subprocess.Popen)
    return Mount(source, mountpoint, process)


def fresh_arenas(top: Arena, folders: list[Path]) -> Callable[[], Arena]:
    """Give every run an empty directory of its own in the share."""

    def fresh() -> Arena:
        name = f"fidelity-{os.getpid()}-{len(folders) // 2}"
        folder = top.source / name
        folder.mkdir()
        outside = top.outside / name
        folders.extend([folder, outside])
        return replace(top, source=folder, mountpoint=top.mountpoint / name, outside=outside)

    return fresh


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def parse_mask(text: str) -> int:
    return MASKS[text] if text in MASKS else int(text, 0)


def _steps(text: str) -> frozenset[str]:
    names = frozenset(filter(None, text.split(",")))
    if unknown := names - WEIGHTS.keys():
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)} (of {', '.join(WEIGHTS)})")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fidelity.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("mountpoint", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--ops", type=int, default=1000, help="steps; each is a few system calls")
    parser.add_argument("--mode", choices=["burst", "paced"], default="paced")
    parser.add_argument("--files", action="store_true", help="watch files as well as directories")
    parser.add_argument(
        "--mask",
        type=parse_mask,
        default=IN_ALL_EVENTS,
        help="number or one of " + ", ".join(MASKS),
    )
    parser.add_argument("--writers", type=int, default=1, help="concurrent processes (bursts)")
    parser.add_argument("--without", type=_steps, default=frozenset(), help="leave out these steps")
    parser.add_argument("--only", type=_steps, default=frozenset(), help="only these steps")
    parser.add_argument(
        "--loose-deaths",
        action="store_true",
        help="IN_DELETE_SELF and IN_IGNORED in the order of their watch only",
    )
    parser.add_argument("--transport", default="auto", help="of fsd mount")
    parser.add_argument("--minimise", action="store_true", help="then look for a smaller failure")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unmounts
    case = Case(
        args.seed,
        args.ops,
        args.mode == "burst" or args.writers > 1,
        args.files,
        args.mask,
        args.writers,
        args.without,
        args.only,
    )
    compare = first_difference_but_deaths if args.loose_deaths else first_difference
    source: Path = args.source.resolve()
    folders: list[Path] = []
    with contextlib.ExitStack() as stack:
        if args.mountpoint is None:
            top = Arena.native(source)
        elif mounts_at(args.mountpoint.resolve()):
            mountpoint = args.mountpoint.resolve()
            top = Arena(
                source,
                mountpoint,
                Arena.native(source).outside,
                # The process that wait_armed looks after is any that must live meanwhile.
                lambda paths, w: _mount(source, mountpoint, w).wait_armed(*paths, pid=w.pid),
                faults=lambda: faults(mountpoint),
            )
        else:
            option = f"--transport={args.transport}"
            top = Arena.of(stack.enter_context(mounted(source, args.mountpoint.resolve(), option)))
        stack.callback(_remove, folders)
        arenas = fresh_arenas(top, folders)
        print(f"seed {case.seed}, {case.steps} operations, {args.mode}", flush=True)
        outcome = run(case, arenas())
        print(
            f"{len(outcome.native)} events natively, {len(outcome.mount)} on the mount, "
            f"{outcome.seconds:.1f} s"
        )
        report = outcome.report(compare)
        print(report or "equal")
        difference = outcome.difference(compare)
        if difference and args.minimise and case.writers == 1:
            steps = outcome.plans[0].steps
            last = marker_number(difference.marker) + marker_interval(case)
            smaller = minimise(case, steps[:last], arenas, compare) or minimise(
                case, steps, arenas, compare
            )
            print("\nminimised:", smaller.report(compare) if smaller else "did not recur")
        return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main())
