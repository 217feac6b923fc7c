"""One server after another on a mount: images, `fsd checkpoint`, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fsd.checkpoint.file import state_path
from fsd.servers import autosave
from harness.mounts import Mount, command, mounted, mounts_at, wait_until

NO_AGENT = "--no-agent"


class Place:
    """Where servers come and go."""

    def __init__(self, tmp_path: Path) -> None:
        self.source, self.mountpoint = tmp_path / "source", tmp_path / "mount"
        self.source.mkdir()
        self.mountpoint.mkdir()
        self.socket = tmp_path / "socket"
        self.state = tmp_path / "state"
        self.image = state_path(self.state, str(self.source), str(self.mountpoint))
        self.options = ("--socket", str(self.socket), "--state-dir", str(self.state), NO_AGENT)

    def kill(self, mount: Mount) -> None:
        """End a server as the kernel does when memory is short."""
        mount.process.kill()
        mount.process.wait()
        tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*tool, self.mountpoint], check=True, timeout=20)
        assert not mounts_at(self.mountpoint)

    def status(self) -> dict[str, object]:
        state: dict[str, object] = json.loads((self.mountpoint / ".fsd/status").read_text())
        return state


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Watching:
    """`fsd-guest watch --socket`, a process."""

    def __init__(self, place: Place, output: Path) -> None:
        self.output = output
        with output.open("wb") as stdout:
            self.process = subprocess.Popen(
                [command("fsd-guest"), "watch", "/", "--socket", place.socket, "--mask", "create"],
                stdout=stdout,
                stderr=subprocess.PIPE,
            )
        assert self.process.stderr is not None
        assert self.process.stderr.readline() == b"watches established\n"

    @property
    def names(self) -> list[str]:
        return [line.split()[-1] for line in self.output.read_text().splitlines()]

    def saw(self, *names: str) -> None:
        wait_until(lambda: len(self.names) >= len(names), 20, f"{names}, not {self.names}")
        assert self.names == list(names)

    def end(self) -> str:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        return errors.decode()


@pytest.fixture
def watching(place: Place, tmp_path: Path) -> Iterator[list[Watching]]:
    """Processes to end with the test."""
    processes: list[Watching] = []
    yield processes
    for process in processes:
        process.process.kill()
        process.end()


def test_a_watcher_does_not_notice_a_restart(
    place: Place, tmp_path: Path, watching: list[Watching]
) -> None:
    with mounted(place.source, place.mountpoint, *place.options):
        watcher = Watching(place, tmp_path / "out")
        watching.append(watcher)
        (place.source / "before").touch()
        watcher.saw("before")
    (place.source / "between").touch()
    with mounted(place.source, place.mountpoint, *place.options):
        watcher.saw("before", "between")
        (place.source / "after").touch()
        watcher.saw("before", "between", "after")
        assert watcher.end() == ""


def test_a_killed_server_has_left_an_image(
    place: Place, tmp_path: Path, watching: list[Watching]
) -> None:
    with ExitStack() as running:
        served = mounted(place.source, place.mountpoint, *place.options)
        mount = running.enter_context(served)
        watcher = Watching(place, tmp_path / "out")
        watching.append(watcher)
        (place.source / "before").touch()
        watcher.saw("before")
        # Its time alone does not say that: it may have been taken before, and written after.
        wait_until(lambda: place.image.exists() and b"before" in place.image.read_bytes(), 20)
        running.pop_all()  # it will not stop as it should
    place.kill(mount)
    (place.source / "between").touch()
    with mounted(place.source, place.mountpoint, *place.options):
        watcher.saw("before", "between")


def test_at_rest_nothing_is_written(place: Place, tmp_path: Path, watching: list[Watching]) -> None:
    with mounted(place.source, place.mountpoint, *place.options):
        watching.append(Watching(place, tmp_path / "out"))
        (place.source / "x").touch()
        wait_until(place.image.exists, 20)
        time.sleep(1.2 * autosave.EVERY)
        written = place.image.stat().st_mtime_ns
        time.sleep(1.2 * autosave.EVERY)
        assert place.image.stat().st_mtime_ns == written


def test_nobody_to_come_back_to_nothing_is_written(place: Place) -> None:
    with mounted(place.source, place.mountpoint, *place.options):
        for number in range(10):
            (place.source / str(number)).touch()
            (place.mountpoint / str(number)).stat()
        time.sleep(1.5 * autosave.EVERY)
        assert not place.image.exists()
    assert place.image.exists()  # a clean stop keeps the nodes


def test_the_checkpoint_command(place: Place) -> None:
    with mounted(place.source, place.mountpoint, *place.options):
        done = subprocess.run(
            [command("fsd"), "checkpoint", place.mountpoint], capture_output=True, check=True
        )
        assert done.stdout.decode().startswith(f"{place.image}: 1 inodes, ")
        assert place.image.stat().st_mode & 0o777 == 0o600
        asked = subprocess.run(
            [command("fsd"), "checkpoint", "--json", place.mountpoint],
            capture_output=True,
            check=True,
        )
        assert json.loads(asked.stdout)["bytes"] == place.image.stat().st_size
    refused = subprocess.run(
        [command("fsd"), "checkpoint", place.mountpoint], capture_output=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.decode() == (
        f"fsd: {place.mountpoint}: not an fsd mount, or another user's\n"
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], "the image is cut short"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "the image is damaged"),
        (lambda _: b"x" * 1000, "not an fsd image"),
    ],
)
def test_a_bad_image_is_refused_in_one_line(
    damage: Callable[[bytes], bytes],
    says: str,
    place: Place,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with mounted(place.source, place.mountpoint, *place.options):
        pass
    place.image.write_bytes(damage(place.image.read_bytes()))
    with mounted(place.source, place.mountpoint, *place.options):
        assert place.status()["source"] == str(place.source)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fsd:")]
    (line,) = lines
    assert says in line
    assert line.endswith("; starting without it")


def test_restoring_can_be_turned_off_and_insisted_on(
    place: Place, tmp_path: Path, watching: list[Watching], capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(place.source, place.mountpoint, *place.options, "--restore"):
        watching.append(Watching(place, tmp_path / "out"))
    assert "No such file or directory; starting without it" in capfd.readouterr().err
    with mounted(place.source, place.mountpoint, *place.options, "--no-restore"):
        (place.source / "x").touch()
        wait_until(lambda: "observer" in str(place.status()["guests"]), 20)
    assert "replaced by one that does not know this watch" in watching[0].end()


def test_a_state_directory_that_cannot_be(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.state.write_text("a file")
    with mounted(place.source, place.mountpoint, *place.options):
        asked = subprocess.run(
            [command("fsd"), "checkpoint", place.mountpoint], capture_output=True, check=False
        )
        assert asked.returncode == 1
        assert asked.stderr.decode().count("\n") == 1
    assert f"image {place.image} cannot be written: " in capfd.readouterr().err
