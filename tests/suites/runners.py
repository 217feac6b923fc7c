"""How each suite is started, and how its words are read.

A runner takes a place and the scratch directory beside it, runs the suite there and returns what
became of each of its tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from tests.suites import sources
from tests.suites.place import Place

Status = Literal["passed", "failed", "skipped"]
PASSED: Status = "passed"
FAILED: Status = "failed"
SKIPPED: Status = "skipped"


class Result(NamedTuple):
    """What became of one test, and what was said of it."""

    status: Status
    detail: str = ""


Results = dict[str, Result]
Runner = Callable[[Place, Path, Sequence[str]], Results]
"""Place, scratch directory, and the tests to run: none for all."""


def run(
    command: Sequence[str | Path], cwd: Path, env: Mapping[str, str], seconds: int
) -> tuple[str, bool]:
    """What a suite said, and whether it ended in time; nothing of it is left running."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group to end as a whole
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        ended = True
    except subprocess.TimeoutExpired:
        ended = False
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if not ended:
        output, _ = process.communicate(timeout=20)
    return output.decode(errors="replace"), ended


# -- Python's ------------------------------------------------------------------------------------


def _pytest(place: Place, work: Path, root: Path, tests: Sequence[str]) -> Results:
    report = work / "report.xml"
    command = [
        *(sys.executable, "-B", "-m", "pytest", "-c", "pyproject.toml", "--rootdir", "."),
        *("-p", "no:cacheprovider", "-o", "timeout=60", "--no-header", "-q"),
        *(f"--basetemp={place.mount}/tmp", f"--junit-xml={report}"),
        *tests,
    ]
    env = {**place.env, "PYTHONPATH": str(sources.PYTHON), "PY_COLORS": "0"}
    report.unlink(missing_ok=True)
    said, _ = run(command, root, env, 600)
    assert report.exists(), said
    found: Results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        result = Result(PASSED)
        for part in case:
            if part.tag in ("failure", "error"):
                result = Result(FAILED, part.text or "")
            elif part.tag == "skipped":
                result = Result(SKIPPED, part.get("message") or "")
        if name not in found or result.status == FAILED:  # its teardown may fail, too
            found[name] = result
    return found


WATCHDOG_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("emitter", "inotify_c", "inotify_emitter", "inotify_watch_group", "observer")
)
"""The others look at no file system, or at watchdog's own polling; watchmedo wants PyYAML."""
EXHAUSTS_THE_MACHINE = "tests/test_inotify_c.py::test_import_with_exhausted_inotify_instances"
"""It takes all inotify instances of the user, and other tests of this machine find none."""


def watchdog(place: Place, work: Path, tests: Sequence[str] = ()) -> Results:
    root = sources.WATCHDOG.path
    return _pytest(
        place, work, root, tests or (*WATCHDOG_TESTS, "--deselect", EXHAUSTS_THE_MACHINE)
    )


NOT_OURS = (
    # It watches / and all that is below: processes come and go there meanwhile.
    *("--deselect", "tests/test_rust_notify.py::test_ignore_permission_denied"),
    # It polls, and within half a second.
    *("--deselect", "tests/test_rust_notify.py::test_polling"),
)


def watchfiles(place: Place, work: Path, tests: Sequence[str] = ()) -> Results:
    """Without its Python files, as the installed ones are meant, and the docs that it tests."""
    root = place.copy(sources.WATCHFILES.path, "watchfiles", "test_docs.py")
    try:
        return _pytest(place, work, root, tests or ("tests", *NOT_OURS))
    finally:
        shutil.rmtree(place.source / root.name)


# -- inotify-tools -------------------------------------------------------------------------------


def _build_inotify_tools(work: Path) -> Path:
    """The suite's directory with the two programs, built as autoconf would have them on Linux."""
    tree = work / "inotify-tools"
    if tree.exists():
        return tree
    shutil.copytree(sources.INOTIFY_TOOLS.path, tree)
    library = tree / "libinotifytools/src"
    for name in ("inotify", "fanotify"):
        text = (library / f"inotifytools/{name}.h.in").read_text()
        made = text.replace("#undef SYS_", "#define SYS_").replace("_WORKS\n", "_WORKS 1\n", 1)
        (library / f"inotifytools/{name}.h").write_text(made)
    (tree / "config.h").write_text('#define PACKAGE_VERSION "3.22.6.0"\n')
    parts = [library / f"{name}.c" for name in ("inotifytools", "redblack", "stats")]
    options = ["-w", "-O1", "-D_GNU_SOURCE", f"-I{library}", f"-include{tree}/config.h"]
    mains = [tree / "src/inotifywait.c", tree / "src/common.c"]
    for name, define in (("inotifywait", "NO"), ("fsnotifywait", "ENABLE")):
        made_of: list[str | Path] = [f"-D{define}_FANOTIFY", *mains, *parts]
        command: list[str | Path] = ["gcc", *options, *made_of, "-o", tree / "src" / name]
        subprocess.run(command, check=True, timeout=110)
    return tree


def inotify_tools(place: Place, work: Path, tests: Sequence[str] = ()) -> Results:
    """Four scripts at once: they mostly sleep."""
    root = place.copy(_build_inotify_tools(work), "man", "m4")

    def one(script: Path) -> Results:
        said, _ = run(["bash", script.name, "--verbose"], script.parent, place.env, 60)
        found: Results = {}
        for word, number, name in re.findall(r"^(ok|not ok) (\d+) - (.*)$", said, re.MULTILINE):
            result = Result(PASSED) if word == "ok" else Result(FAILED, said)
            found[f"{script.stem} {number}: {name}"] = result
        if not re.search(rf"^1\.\.{len(found)}$", said, re.MULTILINE):
            found[f"{script.stem} {len(found) + 1}"] = Result(FAILED, f"did not end: {said}")
        return found

    scripts = [path for path in (root / "t").glob("*.t") if not tests or path.stem in tests]
    try:
        with ThreadPoolExecutor(4) as pool:
            return dict(item for found in pool.map(one, sorted(scripts)) for item in found.items())
    finally:
        shutil.rmtree(place.source / root.name)


# -- entr ----------------------------------------------------------------------------------------


def entr(place: Place, work: Path, tests: Sequence[str] = ()) -> Results:
    """Its script with two changes: it continues after what fails, and pauses for 0.5 s, not 0.25,
    which is less than what programs take to start on a busy machine."""
    tree = work / "entr"
    if not tree.exists():
        shutil.copytree(sources.ENTR.path, tree)
        options = ["-w", "-O1", "-D_GNU_SOURCE", "-D_LINUX_PORT", '-DRELEASE="5.7"', "-Imissing"]
        parts = ["entr.c", "status.c", "missing/kqueue_inotify.c", "missing/strlcpy.c"]
        command = ["gcc", *options, *parts, "-o", "entr"]
        subprocess.run(command, cwd=tree, check=True, timeout=110)
    script = (tree / "system_test.sh").read_text()
    shim = """function assert {
    let asserts+=1
    if [[ "$1" == "$2" ]]; then echo "ok $asserts - $this"
    else printf "not ok %d - %s\\n%q != %q\\n" "$asserts" "$this" "$1" "$2"; fi
}"""
    script, count = re.subn(r"function assert \{.*?^\}", lambda _: shim, script, flags=re.S | re.M)
    assert count == 1
    script = script.replace("function zz { sleep 0.25; }", "function zz { sleep 0.5; }")
    (tree / "reported.sh").write_text(script)
    (place.source / "tmp").mkdir(exist_ok=True)
    said, ended = run(
        ["bash", "reported.sh"], tree, {**place.env, "TMPDIR": str(place.mount / "tmp")}, 150
    )
    found: Results = {}
    for word, number, name, more in re.findall(
        r"^(ok|not ok) (\d+) - (.*)\n(?:(.* != .*)\n)?", said, re.MULTILINE
    ):
        found[f"{number} {name}"] = Result(PASSED) if word == "ok" else Result(FAILED, more)
    if not ended or "tests PASSED" not in said:
        found[f"{len(found) + 1}"] = Result(FAILED, f"the script did not end: {said}")
    return found


# -- chokidar ------------------------------------------------------------------------------------


def chokidar(place: Place, work: Path, tests: Sequence[str] = ()) -> Results:
    """The half that watches; the other polls."""
    root = place.copy(sources.CHOKIDAR.path)
    try:
        (place.source / root.name / "node_modules").symlink_to(sources.NODE)
        report = work / "report.json"
        report.unlink(missing_ok=True)
        command: list[str | Path] = [
            *("node", sources.NODE / "mocha/bin/mocha.js", "--exit", "--timeout", "20000"),
            *("--reporter", "json", "--reporter-option", f"output={report}"),
            *("--grep", tests[0] if tests else "non-polling", "test.js"),
        ]
        said, _ = run(command, root, place.env, 900)
        assert report.exists(), said
        done = json.loads(report.read_text())
    finally:
        shutil.rmtree(place.source / root.name)
    pending = {test["fullTitle"] for test in done["pending"]}
    return {
        test["fullTitle"]: Result(SKIPPED)
        if test["fullTitle"] in pending
        else Result(FAILED, test["err"].get("stack", ""))
        if test["err"]
        else Result(PASSED)
        for test in done["tests"]
    }


RUNNERS: dict[str, Runner] = {
    "watchdog": watchdog,
    "watchfiles": watchfiles,
    "inotify-tools": inotify_tools,
    "entr": entr,
    "chokidar": chokidar,
}
