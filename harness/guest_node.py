"""A guest that can run the host's node, with the node packages of tests/clients.

Apart because an example and a benchmark need it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness.share_server import shared
from harness.vm import Guest, guest

CLIENTS = Path(__file__).parents[1] / "tests/clients"
NODE = "/tools/node"
ENVIRONMENT = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/tools", "HOME": "/tmp"}
MEMORY = 1024  # MiB


@contextmanager
def node_guest(source: Path) -> Iterator[Guest]:
    """A guest with ``source`` at /mnt, node and its libraries in /tools, tests/clients at
    /clients."""
    node = shutil.which("node")
    assert node is not None, "there is no node: script/bootstrap installs it"
    with ExitStack() as stack:
        tools = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fsd-node-")))
        linked = subprocess.run(["ldd", node], capture_output=True, text=True, check=True).stdout
        guest_has = re.compile(r"/(ld-|lib(c|m|dl|pthread|rt|z|expat|ffi)\.so)")
        for path in [node, *re.findall(r"=> (/\S+)", linked)]:
            if not guest_has.search(path):
                shutil.copy(path, tools)
        fixed = ("--readonly", "--log-level=error")
        servers = {
            "share": shared(source, 1, "--log-level=error"),
            "tools": shared(tools, 1, *fixed, cache="always"),
            "clients": shared(CLIENTS, 1, *fixed, cache="always"),
        }
        paths = {tag: stack.enter_context(server).paths[0] for tag, server in servers.items()}
        vm = stack.enter_context(guest(paths, memory=MEMORY))
        for tag in paths:
            vm.mount(tag, "/mnt" if tag == "share" else f"/{tag}")
        vm.run("ip link set lo up")
        yield vm
