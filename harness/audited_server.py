"""`fsd virtiofs` that records each absolute path it opens in its sandbox, and has a bug.

``python -m harness.audited_server REPORT ARGUMENTS…``
"""

from __future__ import annotations

import os
import sys
from typing import Any

from fsd.cli import virtiofs
from fsd.export.arming import Arming
from fsd.linux import syscalls

_EVENTS = ("open", "os.listdir", "os.scandir", "os.chdir", "os.mkdir", "import")


def main() -> None:
    """Serve."""
    report = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    expire = Arming.expire

    def expire_once(self: Arming, now: float) -> None:
        Arming.expire = expire  # type: ignore[method-assign]
        raise ZeroDivisionError("a bug, whose traceback is logged")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and not syscalls.sees_processes():
            what = arguments[0]
            if what in ("/", b"/"):  # the share itself
                return
            if event == "import" or (isinstance(what, str | bytes) and what[:1] in ("/", b"/")):
                os.write(report, f"{event} {what!r}\n".encode())

    Arming.expire = expire_once  # type: ignore[method-assign]
    sys.addaudithook(hook)
    virtiofs.main()


if __name__ == "__main__":
    main()
