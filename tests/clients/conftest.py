"""Places for the watchers: a plain directory, a mount, and a mount without an agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.mounts import Mount
from tests.clients.watchers import Place


@pytest.fixture
def native(tmp_path: Path) -> Place:
    """A plain directory; what does not work here is the driver's fault or the program's nature."""
    source = tmp_path / "native"
    source.mkdir()
    return Place(source, source)


@pytest.fixture(params=["native", "mount"])
def place(request: pytest.FixtureRequest) -> Place:
    """The same test natively and on a mount, where the change is made on the host's side."""
    if request.param == "native":
        plain: Place = request.getfixturevalue("native")
        return plain
    share: Mount = request.getfixturevalue("share")
    return Place(share.source, share.mountpoint, share)


@pytest.fixture
def silent(share_no_agent: Mount) -> Place:
    """The counterpart: mounted, and nothing announces what the host does."""
    return Place(share_no_agent.source, share_no_agent.mountpoint)
