"""Unix sockets that guests connect to: created at a path, or inherited from another process."""

from __future__ import annotations

import grp
import os
import socket
import stat


def listen(path: str, group: str | None = None) -> socket.socket:
    """A listening socket at ``path``, for its owner only, or also for ``group``. Raises OSError,
    and LookupError if there is no such group.
    """
    gid = -1 if group is None else grp.getgrnam(group).gr_gid
    unlink_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177 if group is None else 0o117)
    try:
        listener.bind(path)
        if group is not None:
            os.chown(path, -1, gid)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old)
    return listener


def from_fd(fd: int) -> socket.socket:
    """The socket that a service manager or a VMM has left open for this process: a listener, or the
    connection itself. Raises OSError.
    """
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def unlink_stale(path: str) -> None:
    """Remove a socket on which no process listens. Otherwise bind raises OSError EADDRINUSE."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # an ordinary file: it answers a connect just as a dead socket does
    except OSError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass
    finally:
        probe.close()
