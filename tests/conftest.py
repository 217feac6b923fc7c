"""Fixtures of all tests, and the rule that a machine which can run everything skips nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

# The cases of the POSIX map assert in modules of their own, which several tests import.
pytest.register_assert_rewrite(
    *(f"tests.mount.{path.stem}" for path in Path(__file__).parent.glob("mount/posix_*.py"))
)

from harness.mounts import Mount, mounted  # noqa: E402

FUSE = Path("/dev/fuse")
TESTS = Path(__file__).parent

QUICK = {
    "protocol", "core", "virtio", "test_decisions.py", "test_imports.py", "test_limits.py",
    "test_locks.py", "test_threat_model.py",
}  # fmt: skip
"""Folders, and files of tests itself, that need no mount and no virtual machine."""

ORDER = [
    "protocol", "core", "virtio", "", "fuzz", "agent", "checkpoint", "guest", "fidelity",
    "mount", "clients", "suites", "cli",
]  # fmt: skip
"""Of the folders: the fast ones first; then the longest, for several processes end together where
what is left is short.
"""

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("fsd", deadline=None)
hypothesis.settings.load_profile("fsd")


def _mount(tmp_path: Path, *options: str) -> Iterator[Mount]:
    if not FUSE.exists():
        pytest.skip(f"there is no {FUSE}: nothing can be mounted")
    source, mountpoint = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    with mounted(source, mountpoint, *options) as mount:
        yield mount


@pytest.fixture(scope="session", autouse=True)
def state_directory() -> Iterator[None]:
    """Where servers of tests leave their images, those of ordinary users too."""
    with tempfile.TemporaryDirectory(prefix="fsd-state-") as path:
        os.chmod(path, 0o1777)
        os.environ["STATE_DIRECTORY"] = path
        yield


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Mount]:
    """An empty directory, mounted, with the guest's agent."""
    yield from _mount(tmp_path)


@pytest.fixture
def share_no_agent(tmp_path: Path) -> Iterator[Mount]:
    """The counterpart of ``share``: nothing announces the host's changes to the guest."""
    yield from _mount(tmp_path, "--no-agent")


def _folder(item: pytest.Item) -> str:
    """Of tests, in which the test is; "" for tests itself."""
    parent = item.path.parent.relative_to(TESTS)
    return parent.parts[0] if parent.parts else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and run the fast ones first."""
    for item in items:
        folder = _folder(item)
        if folder in QUICK or item.path.name in QUICK:
            item.add_marker(pytest.mark.quick)
        if folder:
            item.add_marker(folder)
    items.sort(key=lambda item: ORDER.index(_folder(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On CI as root with /dev/fuse a skip is a hole in the checks: make it a failure."""
    report = yield
    able = os.environ.get("CI") == "true" and os.geteuid() == 0 and FUSE.exists()
    if able and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
    return report
