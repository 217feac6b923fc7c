"""The file of a server's image in the state directory: one for each share and place.

Only this server's user may write it, because its handles are opened (docs/checkpoint.md).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from protocol.images import ImageError

SIZE_LIMIT = 1 << 30
"""Bytes of an image: about ten million inodes. A longer file is not an image of fsd."""


def state_directory() -> Path:
    """The default state directory: file-hierarchy(7), systemd.exec(5)."""
    if given := os.environ.get("STATE_DIRECTORY"):  # of a systemd unit with StateDirectory=
        return Path(given.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/fsd")
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, "fsd")


def state_path(directory: Path, source: str, where: str) -> Path:
    """The image file of a share and a place: a mountpoint, or a VMM's socket."""
    words = [os.path.realpath(path) for path in (source, where)]
    digest = hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(words[0])) or "root"
    return directory / f"{readable[:60].lstrip('.')}-{digest[:16]}.image"


class StateFile:
    """One image on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> bytes | None:
        """The image; None if there is none. Raises OSError, and ImageError for a file that another
        user could have written.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                raise ImageError("another user could have written it; chown or remove it")
            if status.st_size > SIZE_LIMIT:
                raise ImageError(f"longer than {SIZE_LIMIT} bytes")
            return file.read(SIZE_LIMIT)

    def write(self, data: bytes) -> None:
        """Replace the image in one step, so that there is always a complete one. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.path.with_suffix(f".{os.getpid()}.new")
        with suppress(FileNotFoundError):
            new.unlink()
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                os.fchmod(fd, 0o600)
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.rename(new, self.path)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot
                raise
        finally:
            os.close(directory)
