"""Runs POSIX cases where there is no pytest: inside a guest.

    python3 -m tests.mount.posix_runner DIRECTORY HOST

HOST shows the same files another way. Standard input: a line `NAME root` or `NAME user` for each
case. Standard output: READY, then a line for each: what went wrong, as a JSON string, "" if nothing
did.
"""

import json
import shutil
import sys
import traceback
from pathlib import Path

from tests.mount.posix_cases import CASES, run_case
from tests.mount.posix_support import ALICE


def main() -> None:
    directory, host = map(Path, sys.argv[1:])
    print("READY", flush=True)
    for line in sys.stdin:
        name, who = line.split()
        try:
            run_case(CASES[name], directory / name, host / name, ALICE if who == "user" else None)
            shutil.rmtree(directory / name)
            assert not (host / name).exists(), f"{name} is still there"
            problem = ""
        except BaseException:
            problem = traceback.format_exc()
            shutil.rmtree(host / name, ignore_errors=True)
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
