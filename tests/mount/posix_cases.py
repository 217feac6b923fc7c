"""The one map of POSIX cases, run over every backend: each case takes an empty directory and
raises AssertionError. The cases themselves are in posix_*.py, by what they are about.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mount import (
    posix_data,
    posix_dirs,
    posix_host,
    posix_meta,
    posix_names,
    posix_owners,
    posix_processes,
)
from tests.mount.posix_support import ALICE, CASES, Case, User, in_child, mkdir

# Their import enters their cases into the map.
MODULES = (
    posix_names,
    posix_dirs,
    posix_data,
    posix_meta,
    posix_owners,
    posix_processes,
    posix_host,
)

__all__ = ["CASES", "MODULES", "PARAMETERS", "Case", "run_case"]
ROOT = os.geteuid() == 0


def run_case(case: Case, d: Path, host: Path, user: User | None) -> None:
    """Run a case in a new directory of the user's; `d` and `host` do not exist yet."""
    mkdir(host, 0o755)
    if user is None:
        case.run(d, host)
        return
    os.chown(host, user.uid, user.gid)
    in_child(partial(case.run, d, host), user)


def _parameters() -> Iterator[object]:
    for name, case in CASES.items():
        if ROOT or not case.needs_root:
            yield pytest.param(name, None, id=f"{name}-{'root' if ROOT else 'self'}")
        else:
            mark = pytest.mark.skip(reason="needs root: becomes other users")
            yield pytest.param(name, None, id=f"{name}-root", marks=mark)
        if ROOT and not case.needs_root:
            yield pytest.param(name, ALICE, id=f"{name}-user")


PARAMETERS = list(_parameters())
"""(name, user) of each case: as root also under an ordinary user's ids."""
