"""A server for test_restart: an Echo session behind a socket, with a store."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import trio

from fsd.process.logs import log_to_stderr
from fsd.process.systemd import Manager, Store, listen_fds
from fsd.transports.unix import listen
from fsd.transports.virtiofs import VirtiofsTransport
from fsd.virtio.device import Device
from protocol.vhostuser import Request
from tests.virtio.conftest import Echo


def may_die(deadly: Path) -> None:
    """Make the next message of the VMM's kill this process if that file is there, and remove it."""
    handle = Device.handle

    def handle_or_die(device: Device, request: Request) -> bytes:
        if deadly.exists():
            deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return handle(device, request)

    Device.handle = handle_or_die  # type: ignore[assignment, method-assign]


async def main(path: str) -> None:
    """Serve there until SIGTERM; print the process's number once it does."""
    manager = Manager()
    store = Store(manager, listen_fds().kept)
    fd = store.take("listen")
    listener = listen(path) if fd < 0 else socket.socket(fileno=fd)
    if fd < 0:
        store.put("listen", listener.fileno())
    transport = VirtiofsTransport(Echo, name="echo", store=store)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.serve, listener)
            manager.notify("READY=1")
            print(os.getpid(), flush=True)
            async for number in signals:
                if number == signal.SIGUSR1:
                    raise RuntimeError("a fault of the server's, in a task of its own")
                store.stopping()
                transport.leave()
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    log_to_stderr("info")
    may_die(Path(f"{sys.argv[1]}.deadly"))
    trio.run(main, sys.argv[1])
