"""The one map of POSIX cases, run over every backend: each case takes an empty directory and
raises AssertionError. The cases themselves are in posix_*.py, by what they are about. Standard
library only, as they run inside a guest too.
"""

import os
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
from tests.mount.posix_support import CASES, Case, User, in_child, mkdir

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
    if user is None:
        case.run(d, host)
        return
    os.chown(host, user.uid, user.gid)
    in_child(partial(case.run, d, host), user)
