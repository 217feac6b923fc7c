"""What tests in real guests have in common."""

from __future__ import annotations

import shutil

import pytest

from harness.vm import QEMU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No QEMU, no guests."""
    if shutil.which(QEMU) is None:
        for item in items:
            if "tests/guest" in item.path.as_posix():
                item.add_marker(
                    pytest.mark.skip(f"there is no {QEMU}: script/bootstrap installs it")
                )
