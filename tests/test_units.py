"""The systemd units of examples/vm, with systemd's own tools; no systemd need run here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from harness.mounts import STOP_TIMEOUT, command, wait_until
from harness.vhost_frontend import Frontend
from harness.vm import guest

UNITS = Path(__file__).parents[1] / "examples" / "vm"
INSTANCES = {
    "fsd-virtiofs@.service": "fsd-virtiofs@share.service",
    "fsd-virtiofs@.socket": "fsd-virtiofs@share.socket",
    "fsd-guest@.service": "fsd-guest@mnt-share.service",
}
MOUNT = """[Mount]
What=share
Where=/mnt/share
Type=virtiofs
"""
"""What systemd makes of the line in the guest's /etc/fstab."""
pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze"
)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with our commands in place of those in /usr/local/bin."""
    for name in INSTANCES:
        text = (UNITS / name).read_text()
        ours = text.replace("/usr/local/bin/fsd", str(command("fsd")))
        (tmp_path / name).write_text(ours)
    (tmp_path / "mnt-share.mount").write_text(MOUNT)
    return tmp_path


def faults(units: Path) -> str:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(units / name for name in INSTANCES.values())],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stderr + (f"exit status {done.returncode}" if done.returncode else "")


def test_they_are_valid(units: Path) -> None:
    assert faults(units) == ""


def test_an_agent_is_started_again_however_often_it_fails() -> None:
    """With status 1 it asks for that; with 0 the mount has gone."""
    lines = (UNITS / "fsd-guest@.service").read_text().splitlines()
    assert {"Restart=on-failure", "RestartSec=1", "StartLimitIntervalSec=0"} <= set(lines)


@pytest.mark.parametrize("name", INSTANCES)
def test_faults_would_be_found(units: Path, name: str) -> None:
    text = (units / name).read_text()
    for old, new in (("ExecStart=", "ExecStrat="), ("ListenStream=", "ListenStreem=")):
        text = text.replace(old, new)
    (units / name).write_text(text)
    assert faults(units) != ""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces, which only root can")
def test_machines_start_the_service(units: Path, tmp_path: Path) -> None:
    """As its socket unit does, the first connection starts it; it serves that VMM and the next,
    and the guest of a third.
    """
    share, path = tmp_path / "srv", tmp_path / "s"
    share.mkdir()
    (share / "file").write_text("shared\n")
    lines = (units / "fsd-virtiofs@.service").read_text().splitlines()
    [start] = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    words = start.replace("/srv/%i", str(share)).split()
    activate = ["systemd-socket-activate", f"--listen={path}", *words]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(activate, stdout=log, stderr=log)
    try:
        wait_until(path.exists, 10, "a socket")
        assert Path(f"/proc/{process.pid}/comm").read_text() == "systemd-socket-\n"
        for _ in range(2):
            vmm = Frontend(path)
            vmm.negotiate()
            vmm.close()
        with guest({"share": path}) as vm:
            vm.mount("share")
            assert vm.run("cat /mnt/file").stdout == "shared\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT) == 0
        assert path.exists()  # it is systemd's
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT)
