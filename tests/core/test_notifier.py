"""The thread that sends notifications for which the kernel may wait: here a pipe that is full."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

from fsd.cache.notifier import PATIENCE, Notifier
from harness.mounts import wait_until


def test_a_notification_that_waits_delays_events_for_a_moment() -> None:
    reading, writing = os.pipe()
    settled = threading.Event()
    notifier = Notifier(writing, settled.set)
    try:
        notifier.post([bytes(1 << 17)])  # more than a pipe takes
        begun = time.monotonic()
        assert not notifier.is_settled
        wait_until(lambda: notifier.is_settled)
        assert time.monotonic() - begun >= PATIENCE / 2
        assert not notifier.is_idle
        left = 1 << 17
        while left:
            left -= len(os.read(reading, left))
        assert settled.wait(10)
        assert notifier.is_idle
    finally:
        notifier.close()
        os.close(reading)
        os.close(writing)


def test_a_fault_does_not_end_the_thread() -> None:
    reading, writing = os.pipe()
    notifier = Notifier(writing, lambda: None)

    def broken() -> Iterator[bytes]:
        yield b"first"
        raise ValueError("a message that cannot be made")

    try:
        notifier.post(broken())
        notifier.post([b"next"])
        wait_until(lambda: notifier.is_idle)
        assert os.read(reading, 20) == b"firstnext"
    finally:
        notifier.close()
        os.close(reading)
        os.close(writing)
