"""The POSIX cases as parameters of tests: apart from posix_cases.py, which knows no pytest."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.mount.posix_cases import CASES
from tests.mount.posix_support import ALICE

ROOT = os.geteuid() == 0


def _parameters() -> Iterator[Any]:
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
