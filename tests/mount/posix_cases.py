"""The one map of POSIX cases, run over every backend: each case takes an empty directory and
raises AssertionError. The cases themselves are in posix_*.py, by what they are about.
"""

from tests.mount import (
    posix_data,
    posix_dirs,
    posix_host,
    posix_meta,
    posix_names,
    posix_owners,
    posix_processes,
)
from tests.mount.posix_support import CASES, Case

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

__all__ = ["CASES", "MODULES", "Case"]
