"""The file of a Unix socket that this process or its child has bound. At the end it is removed only
if it is still the same file in the same directory.

Apart because code that removes files as root must not rely on a path, nor on what others report.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress


class SocketFile:
    """The socket at ``path`` as it is now. Call ``remove`` or ``close`` at the end."""

    def __init__(self, path: str) -> None:
        """Raises OSError: ENOENT if there is none, ENOTSOCK if it is another kind of file."""
        folder, self._name = os.path.split(os.path.abspath(path))
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._identity = self._look()
        except OSError:
            self.close()
            raise

    def _look(self) -> tuple[int, int]:
        status = os.lstat(self._name, dir_fd=self._folder)
        if not stat.S_ISSOCK(status.st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        return status.st_dev, status.st_ino

    def remove(self) -> None:
        """Remove it, unless another file has its name now."""
        with suppress(OSError):
            if self._look() == self._identity:
                os.unlink(self._name, dir_fd=self._folder)
        self.close()

    def close(self) -> None:
        """Leave it where it is."""
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)
