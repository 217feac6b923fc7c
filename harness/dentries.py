"""Has the kernel drop its dentries of one file system, as it does when memory is short.

Not /proc/sys/vm/drop_caches: that is the whole machine's, and disturbs what else runs there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path


def drop_dentries(mountpoint: Path) -> None:
    """Of all that is not in use: a remount does (reconfigure_super in fs/super.c). Of FUSE the
    inodes go with them.
    """
    subprocess.run(["mount", "-i", "-o", "remount", mountpoint], check=True)
