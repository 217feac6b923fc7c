"""The one map of POSIX cases, run over every backend: each case takes an empty directory and
raises AssertionError. The cases themselves are in posix_*.py, by what they are about. Standard
library only, as they run inside a guest too.
"""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tests.mount import (
    posix_appends,
    posix_data,
    posix_dirs,
    posix_host,
    posix_meta,
    posix_names,
    posix_owners,
    posix_processes,
)
from tests.mount.posix_support import CASES, Case, User, in_child, mkdir, settling

# Their import enters their cases into the map.
MODULES = (
    posix_names,
    posix_dirs,
    posix_data,
    posix_appends,
    posix_meta,
    posix_owners,
    posix_processes,
    posix_host,
)

__all__ = ["CASES", "MODULES", "Case", "run_case"]


def run_case(case: Case, d: Path, host: Path, user: User | None) -> None:
    """Run a case in a new directory of the user's; `d` and `host` do not exist yet."""
    mkdir(host, 0o755)
    if user is not None:
        os.chown(host, user.uid, user.gid)
    with settling(d) if case.is_two_sided else nullcontext(d) as place:
        if user is None:
            case.run(place, host)
        else:
            in_child(partial(case.run, place, host), user)
