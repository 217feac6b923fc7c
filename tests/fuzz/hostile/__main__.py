"""Runs the fuzzer and judges: exit status 0 = every promise was kept, 1 = not.

See docs/decisions/fuzzing.md for what is promised. As root, for it mounts a tmpfs to share.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.mounts import await_ready, command
from harness.share_server import inside
from protocol import fuse
from protocol.fuse import Opcode

from . import channels, faults  # noqa: F401 - they enter their operations in the table
from .guest import Guest
from .host import HostUser
from .machine import Broken, Gone, Machine
from .monitor import MIB, Held, Oversleep, busy_with, complaints, descriptors, held
from .neighbour import FILES, Neighbour
from .operations import TABLE
from .report import Result, judge_waits

SECRET = b"what no guest may see: 6f1d2c"
BOUND = 250.0
"""Milliseconds that the well-behaved guest may wait."""
RETURN = 60.0
"""Seconds after which what gone guests held must have been given back: a session waits 30 s for a
VMM that connects again."""
SLACK = 24 * MIB
"""By how much memory may be above its level after WARM: an arena of Python's stays while a part of
it is used."""
WARM = 3.0
"""Seconds of hostile guests before the level of memory is taken: all code has run then."""
STOP = 20.0
_libc = ctypes.CDLL(None, use_errno=True)
_MS_SHARED, _MNT_DETACH = 1 << 20, 2


# The share, and the server


@contextmanager
def _share() -> Iterator[tuple[Path, Path]]:
    """A tmpfs to share, and a directory beside it with a secret."""
    with tempfile.TemporaryDirectory(prefix="fsd-hostile-") as scratch:
        base = Path(scratch)
        share, outside = base / "share", base / "outside"
        share.mkdir()
        outside.mkdir()
        (outside / "secret").write_bytes(SECRET)
        target = os.fsencode(share)
        if _libc.mount(b"hostile", target, b"tmpfs", 0, b"size=384m,nr_inodes=60000") != 0:
            raise SystemExit("a tmpfs to share cannot be mounted: root is needed")
        try:
            _libc.mount(None, target, None, _MS_SHARED, None)  # what is mounted below is seen
            neighbour = share / "neighbour"
            neighbour.mkdir()
            for number in range(FILES):
                (neighbour / f"f{number}").write_bytes(b"n" * 4096)
            yield share, outside
        finally:
            _libc.umount2(os.fsencode(share / "volume"), _MNT_DETACH)
            while _libc.umount2(target, _MNT_DETACH) == 0:  # whatever is mounted over it
                pass
            # Else all that guests have made would be removed one by one, however deep it is.
            assert not share.is_mount(), f"{share} cannot be unmounted: errno {ctypes.get_errno()}"


@contextmanager
def _served(share: Path, scratch: Path, options: list[str]) -> Iterator[tuple[Any, list[Path]]]:
    paths = [scratch / f"guest{n}" for n in range(3)]
    log = scratch / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                command("fsd"), "virtiofs", f"--shared-dir={share}", "--xattr", "--posix-acl",
                *(f"--socket-path={path}" for path in paths), *options,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        assert await_ready(process, process.stdout).startswith("fsd: ready: "), log.read_text()
        yield process, paths
    finally:
        inner = inside(process.pid)
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(inner, signal.SIGKILL)
        process.wait(STOP)
        process.stdout.close()


# Processes


def _start(work: Callable[[], Any]) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Do ``work`` in a process; what it returns, or its failure, can be received."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            theirs.send(("", work()))
        except BaseException as error:  # noqa: BLE001 - the parent reports it
            kind = "broken" if isinstance(error, Broken) else "failed"
            if isinstance(error, Gone):
                kind = "gone"
            theirs.send((f"{kind}: {error!r}\n{traceback.format_exc()}", None))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    return process, ours


def _attack(paths: list[Path], seed: int, until: float, journal: Path) -> dict[str, Any]:
    """Two hostile guests in turns, so that their order is the seed's."""
    rng = random.Random(seed)
    names, weights = list(TABLE), [weight for weight, _ in TABLE.values()]
    Machine.HIDE = SECRET
    with journal.open("w") as file:

        def note(begun: float, ended: float, what: str) -> None:
            file.write(f"{begun:.6f} {ended:.6f} {what}\n")

        guests = [Guest(path, f"guest{n}", rng, note) for n, path in enumerate(paths)]
        anew = 0
        steps: Counter[str] = Counter()
        while time.monotonic() < until:
            guest = rng.choice(guests)
            (name,) = rng.choices(names, weights)
            steps[name] += 1
            before = guest.front
            begun = time.monotonic()
            try:
                faults.step(guest, name)
            except Broken as error:
                raise Broken(f"in {name}: {error}") from error
            if guest.front is not before:
                anew += 1
                note(begun, time.monotonic(), f"{guest.name} {name}")
        counts = sum((Counter(guest.counts) for guest in guests), Counter[str]())
        errors = sum((Counter(guest.errors) for guest in guests), Counter[str]())
        for guest in guests:
            guest.close()
    return {"counts": counts, "errors": errors, "anew": anew, "steps": steps}


def _host(share: Path, outside: Path, seed: int, until: float, journal: Path) -> dict[str, Any]:
    with journal.open("w") as file:

        def note(begun: float, ended: float, what: str) -> None:
            file.write(f"{begun:.6f} {ended:.6f} {what}\n")

        os.chroot(share)  # no link that a guest makes leads this process out of the share
        os.chdir("/")
        user = HostUser(outside, random.Random(seed + 1), note)
        user.run(until)
    return {"counts": user.counts, "stuck": user.stuck}


def _neighbour(path: Path, seed: int, server: int, until: float) -> dict[str, Any]:
    guest = Neighbour(path, random.Random(seed + 2), server)
    try:
        guest.run(until)
    except Gone as error:
        guest.wrong.append(f"no answer: {error}")
    return {"waits": guest.waits, "events": guest.events, "wrong": guest.wrong}


def _control(until: float) -> dict[str, Any]:
    control = Oversleep()
    control.run(until)
    return {"late": control.late, "worst": control.worst}


# Judging


def _seen(outside: Path) -> object:
    """What shows whether somebody was outside of the share."""
    stats = [os.lstat(path) for path in (outside, outside / "secret")]
    return (
        sorted(os.listdir(outside.parent)),
        os.listdir(outside),
        [(s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns, s.st_ctime_ns) for s in stats],
        stats[1].st_size,
    )


def _status(path: Path) -> dict[str, Any]:
    """`.fsd/status` for a new guest."""
    machine = Machine(path, random.Random(0))
    try:
        node = 1
        for name in (b".fsd", b"status"):
            error, payload = machine.ask(Opcode.LOOKUP, node, name + b"\0")
            assert not error
            node = fuse.ENTRY_OUT.unpack(payload)[0]
        _, payload = machine.ask(Opcode.OPEN, node, fuse.OPEN_IN.pack(os.O_RDONLY, 0))
        fh = fuse.OPEN_OUT.unpack(payload)[0]
        body = fuse.READ_IN.pack(fh, 0, 65536, 0, 0, 0)
        error, payload = machine.ask(Opcode.READ, node, body, room=70_000)
        found: dict[str, Any] = json.loads(payload) if payload else {}
        return found
    finally:
        machine.close()


def _come_back(pid: int, level: Held, slack: int) -> tuple[Held, float]:
    """What the server holds once it is at the start's level, or after RETURN."""
    begun = time.monotonic()
    while True:
        now = held(pid)
        taken = time.monotonic() - begun
        back = (
            now.fds <= level.fds and now.watches <= level.watches and now.rss <= level.rss + slack
        )
        if back or taken > RETURN:
            return now, taken
        time.sleep(0.5)


def fuzz(seconds: float, seed: int, bound: float, options: list[str], keep: Path) -> Result:
    """Run for so long."""
    result = Result(seed)
    with (
        tempfile.TemporaryDirectory(prefix="fsd-hostile-") as scratch_name,
        _share() as (
            share,
            outside,
        ),
    ):
        scratch = Path(scratch_name)
        before = _seen(outside)
        with _served(share, scratch, options) as (process, paths):
            pid = inside(process.pid)
            fresh = held(pid)
            _round(result, pid, process, paths, share, outside, seed + 100, WARM, scratch, None)
            level, _ = _come_back(pid, fresh, 1 << 40)
            result.say(f"start: {fresh}; after {WARM:.0f} s of use: {level}")
            if not result.failures:
                begun = time.monotonic()
                _round(result, pid, process, paths, share, outside, seed, seconds, scratch, bound)
                result.say(f"ran {time.monotonic() - begun:.0f} s of {seconds:.0f}")
            if process.poll() is None:
                _judge_end(result, pid, process, paths[2], fresh, level)
            else:
                result.fail(f"the server has ended with {process.returncode}")
        if _seen(outside) != before:
            result.fail(f"something outside of the share was touched: {before} {_seen(outside)}")
        log = (scratch / "log").read_text(errors="replace")
        result.say(f"log: {len(log)} bytes, {len(log.splitlines())} lines")
        found = complaints(log)
        if found:
            result.fail(f"{len(found)} complaints in the log, first: {found[0]}")
        if result.failures:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"hostile-{seed}.log").write_text(log)
            result.say(f"the server's log is in {keep}/hostile-{seed}.log")
    return result


def _judge_end(
    result: Result, pid: int, process: Any, path: Path, fresh: Held, level: Held
) -> None:
    peak = held(pid)
    level = Held(level.rss, fresh.fds, fresh.watches, fresh.threads)
    now, taken = _come_back(pid, level, SLACK)
    result.say(f"last guest gone: {peak}; {taken:.0f} s later: {now}")
    if now.fds > level.fds:
        names = Counter(descriptors(pid))
        result.fail(f"{now.fds - level.fds} descriptors are left, among {list(names.items())[:30]}")
    if now.watches > level.watches:
        result.fail(f"{now.watches - level.watches} inotify watches are left")
    if now.rss > level.rss + SLACK:
        result.fail(f"memory is {(now.rss - level.rss) / MIB:.0f} MiB above the start's")
    try:
        status = _status(path)
    except (Gone, AssertionError) as error:
        result.fail(f"no guest can come any more: {error!r}")
        return
    for name, value in _numbers(status):
        if name.rpartition(".")[2] == "faults" and value:
            result.fail(f"{name} is {value}: a fault of the server's own")
    process.terminate()
    try:
        begun = time.monotonic()
        code = process.wait(STOP)
        result.say(f"SIGTERM ended it within {time.monotonic() - begun:.1f} s, status {code}")
        if code:
            result.fail(f"after SIGTERM the exit status is {code}")
    except subprocess.TimeoutExpired:
        result.fail(f"SIGTERM did not end it within {STOP:.0f} s: {busy_with(pid)}")


def _numbers(tree: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _numbers(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _numbers(value, f"{path}.{number}")
    elif isinstance(tree, int):
        yield path.lstrip("."), tree


def _round(
    result: Result, pid: int, process: Any, paths: list[Path], share: Path, outside: Path,
    seed: int, seconds: float, scratch: Path, bound: float | None,
) -> None:  # fmt: skip
    """Everybody at work for so long. Judged where there is a bound."""
    until = time.monotonic() + seconds
    journals = [scratch / "guests", scratch / "host"]
    works = {
        "guests": _start(lambda: _attack(paths[:2], seed, until, journals[0])),
        "host": _start(lambda: _host(share, outside, seed, until, journals[1])),
        "neighbour": _start(lambda: _neighbour(paths[2], seed, pid, until)),
        "control": _start(lambda: _control(until)),
    }
    got: dict[str, dict[str, Any]] = {}
    peak = held(pid)
    levels: list[int] = []
    begun = time.monotonic()
    while len(got) < len(works):
        for name, (_, pipe) in works.items():
            if name not in got and pipe.poll():
                failure, value = pipe.recv()
                got[name] = value or {}
                if failure:
                    result.fail(f"{name} {failure}")
        if process.poll() is not None:
            result.fail(f"the server has ended with {process.returncode}")
            break
        with suppress(OSError):
            now = held(pid)
            peak = max(peak, now)
            if time.monotonic() - begun > len(levels) * seconds / 10:
                levels.append(now.rss >> 20)
        if time.monotonic() > until + 3 * STOP:
            result.fail(f"no end: {sorted(set(works) - set(got))}, server: {busy_with(pid)}")
            break
        time.sleep(0.2)
    for worker, pipe in works.values():
        if worker.is_alive() and len(got) < len(works):
            worker.kill()
        worker.join(STOP)
        pipe.close()
    if bound is None:
        return
    late = got.get("control", {}).get("late", [])
    worst = got.get("control", {}).get("worst", 0.0)
    result.say(
        f"control: woke at most {worst * 1e3:.1f} ms too late, {len(late)} times over "
        f"{Oversleep.LATE * 1e3:.0f} ms; load {os.getloadavg()[0]:.1f}"
    )
    guest = got.get("neighbour", {})
    for kind in ("waits", "events"):
        judge_waits(result, kind, guest.get(kind, []), late, bound, journals)
    wrong = guest.get("wrong", [])
    if wrong:
        result.fail(f"{len(wrong)} wrong answers to the well-behaved guest: {wrong[0]}")
    if not guest.get("events"):
        result.fail("the well-behaved guest received no event")
    counts: Counter[str] = got.get("guests", {}).get("counts", Counter())
    errors: Counter[str] = got.get("guests", {}).get("errors", Counter())
    result.say(
        f"hostile: {sum(counts.values())} answers, {sum(errors.values())} of them errors, "
        f"{got.get('guests', {}).get('anew', 0)} VMMs anew; never done: "
        f"{sorted(set(TABLE) - set(got.get('guests', {}).get('steps', ())))}"
    )
    host = got.get("host", {})
    result.say(
        f"host: {sum(host.get('counts', {}).values())} acts; a mount below could not be taken away "
        f"{host.get('stuck', 0)} times"
    )
    result.say(f"peak: {peak}; MiB each tenth of the time: {levels}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.hostile", description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--bound", type=float, default=BOUND, help="milliseconds")
    parser.add_argument("--option", action="append", default=[], help="of fsd virtiofs")
    parser.add_argument("--keep", type=Path, default=Path(".cache/fuzz"), help="where logs stay")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    result = fuzz(given.seconds, given.seed, given.bound, given.option, given.keep)
    for line in result.lines:
        print(line)
    for line in result.failures:
        print(f"FAILED: {line}")
    if not result.failures:
        print("every promise was kept")
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main())
