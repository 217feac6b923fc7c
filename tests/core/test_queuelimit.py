"""fs.inotify.max_queued_events is the administrator's to set: a server only says how."""

from __future__ import annotations

import pytest

from fsd.linux.queuelimit import queue_length, require_queue


def test_a_queue_that_is_long_enough() -> None:
    before = queue_length()
    require_queue(before)
    require_queue(1)
    assert queue_length() == before


def test_a_longer_one_is_refused_with_the_command() -> None:
    before = queue_length()
    command = rf"is {before}: .*sysctl -w fs\.inotify\.max_queued_events={before + 1}$"
    with pytest.raises(OSError, match=command):
        require_queue(before + 1)
    assert queue_length() == before
