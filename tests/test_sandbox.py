"""The sandbox of `fsd virtiofs`, as a process in it sees it (harness/sandbox_probe.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fsd.process.sandbox import CAPABILITIES, NEEDED
from harness.namespace import ROOT, as_user, private, python_of_everybody, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")
FORBIDDEN = ("execute", "fork", "socket", "mount", "unshare", "chroot", "trace")
"""What the filter of system calls refuses."""


def command(directory: Path, options: dict[str, Any], *call: str) -> list[str]:
    """A command line that probes the sandbox of a server with these options."""
    probe = [sys.executable, "-m", "harness.sandbox_probe"]
    return [*probe, str(directory), json.dumps(options), *call]


def probed(directory: Path, **options: Any) -> dict[str, Any]:
    """What the process in the sandbox says; ``directory`` is shared, with one entry."""
    (directory / "program").write_text("#!/bin/true\n")
    os.chdir(ROOT)
    done = run(command(directory, options))
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def bits(names: frozenset[str]) -> str:
    """A set of capabilities as /proc has it."""
    return f"{sum(1 << CAPABILITIES.index(name) for name in names):016x}"


def test_namespace(tmp_path: Path) -> None:
    found = probed(tmp_path)
    assert found["root"] == found["above"] == ["program"]
    assert found["beside"] is True  # the way up from /proc/self leads nowhere
    assert (found["pid"], found["parent"]) == (1, 0)
    assert found["network"] == ["lo"]


def test_what_serving_needs_works(tmp_path: Path) -> None:
    found = probed(tmp_path)
    assert found["descriptor"] == ["program"]
    assert (found["handle"], found["thread"], found["write"]) == ("done", "done", "done")
    assert found["watch"] == ["create", "delete"]


def test_nothing_is_imported_from_the_share(tmp_path: Path) -> None:
    module = Path(sys.base_prefix, "lib", "python{}.{}".format(*sys.version_info), "this.py")
    planted = tmp_path / module.relative_to("/")
    planted.parent.mkdir(parents=True)
    planted.write_text("print('planted')\n")
    os.chdir(ROOT)
    done = run(command(tmp_path, {}))
    assert json.loads(done.stdout)["import"] == "ImportError"


@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_privileges(tmp_path: Path, mode: str) -> None:
    """CAP_MKNOD has its effect for the moments in which it makes a device node."""
    kept = bits(NEEDED | {"DAC_READ_SEARCH"})
    at_rest = bits((NEEDED | {"DAC_READ_SEARCH"}) - {"MKNOD"})
    nothing = bits(frozenset())
    assert probed(tmp_path, sandbox=mode)["status"] == {
        "CapEff": at_rest, "CapPrm": kept, "CapBnd": kept, "CapInh": nothing, "CapAmb": nothing,
        "NoNewPrivs": "1", "Seccomp": "2",
    }  # fmt: skip


def test_a_device_node_opens_no_device(tmp_path: Path) -> None:
    """Made by a guest's root in the share or in a file system below it, or by an attacker that took
    the server over; nor does a program with the suid bit gain anything, nor run.
    """
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
    try:
        found = probed(tmp_path, sandbox="namespace")
    finally:
        subprocess.run(["umount", "-l", below], check=True)
    assert found["mknod"] == "EPERM"
    assert (found["node"], found["node below"]) == ("EACCES", "EACCES")
    assert found["mounts"] == [["nodev", "noexec", "nosuid"]] * 2


@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_requests_of_ioctl(tmp_path: Path, mode: str) -> None:
    """Those that are made are let through, by their numbers."""
    found = probed(tmp_path, sandbox=mode)["ioctl"]
    assert found == {"TIOCSTI": "ENOSYS", "high bits": "ENOSYS", "FS_IOC_GETFLAGS": "done"}


def test_no_file_handles(tmp_path: Path) -> None:
    found = probed(tmp_path, file_handles="never")
    assert found["handle"] == "EPERM"
    assert found["status"]["CapBnd"] == bits(NEEDED)


@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_system_calls(tmp_path: Path, mode: str) -> None:
    found = probed(tmp_path, sandbox=mode)
    assert {name: found[name] for name in FORBIDDEN} == dict.fromkeys(FORBIDDEN, "ENOSYS")


def test_without_the_filter_privileges_are_missing_all_the_same(tmp_path: Path) -> None:
    found = probed(tmp_path, seccomp="none")
    for name in ("mount", "unshare", "chroot", "trace"):
        assert found[name] == "EPERM", name
    assert found["network"] == ["lo"]
    assert found["root"] == ["program"]
    assert found["status"]["Seccomp"] == "0"


def test_seccomp_kill(tmp_path: Path) -> None:
    os.chdir(ROOT)
    done = run(command(tmp_path, {"seccomp": "kill"}, "execve"))
    assert done.returncode == 256 - signal.SIGSYS


def test_chroot(tmp_path: Path) -> None:
    found = probed(tmp_path, sandbox="chroot")
    assert found["root"] == found["above"] == ["program"]
    assert found["descriptor"] == ["program"]
    assert found["import"] == "ImportError"
    assert found["pid"] != 1  # but for its root it is among the host's processes


def test_a_read_only_share_is_read_only_to_the_server(tmp_path: Path) -> None:
    assert probed(tmp_path, read_only=True)["write"] == "EROFS"
    assert os.listdir(tmp_path) == ["program"]


def test_an_ordinary_user(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fsd-user-") as top:
        os.chmod(top, 0o777)
        Path(top, "program").write_text("")
        os.chdir(ROOT)
        done = run(private(python_of_everybody(tmp_path), *as_user(), *command(Path(top), {})))
        assert done.returncode == 0, done
        found = json.loads(done.stdout)
    assert found["root"] == ["program"]
    assert (found["pid"], found["network"]) == (1, ["lo"])
    assert int(found["status"]["CapEff"], 16) & ~int(bits(NEEDED | {"DAC_READ_SEARCH"}), 16) == 0
    assert found["write"] == "done"


def test_threads_under_the_strictest_filter() -> None:
    """As for an fsync, or to close what a VMM must not have sent: the call that is refused ends the
    process there.
    """
    program = (
        "import trio; from fsd.process.seccomp import Filter; Filter('kill').install()\n"
        "trio.run(trio.to_thread.run_sync, int); print('alive', flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")
