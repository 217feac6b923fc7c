"""Runs POSIX cases where there is no pytest: inside a guest.

    python3 -m tests.mount.posix_runner DIRECTORY HOST

HOST shows the same files another way. Standard input: a line `NAME root` or `NAME user` for each
case. Standard output: READY, then a line for each: what went wrong, as a JSON string, "" if nothing
did.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from tests.mount.posix_cases import CASES, run_case
from tests.mount.posix_support import ALICE


def _remove(directory: Path) -> None:
    """All of it, also what an ordinary user has closed to himself."""
    for path, names, _ in os.walk(directory):
        for name in names:
            below = os.path.join(path, name)
            if not os.path.islink(below):
                os.chmod(below, 0o700)
    shutil.rmtree(directory)


def main() -> None:
    directory, host = map(Path, sys.argv[1:])
    print("READY", flush=True)
    for line in sys.stdin:
        name, who = line.split()
        try:
            run_case(CASES[name], directory / name, host / name, ALICE if who == "user" else None)
            _remove(directory / name)
            assert not (host / name).exists(), f"{name} is still there"
            problem = ""
        except BaseException:  # noqa: BLE001 - the other process raises it
            problem = traceback.format_exc()
            shutil.rmtree(host / name, ignore_errors=True)
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
