"""Makes the kernel drop its dentries of one file system, as it does when memory is short.

Not /proc/sys/vm/drop_caches, which affects the whole machine and disturbs other programs.
"""

from __future__ import annotations

import subprocess
from pathlib import Path


def drop_dentries(mountpoint: Path) -> None:
    """Drop all unused ones by a remount (reconfigure_super in fs/super.c). For FUSE this also drops
    the inodes.
    """
    subprocess.run(["mount", "-i", "-o", "remount", mountpoint], check=True)
