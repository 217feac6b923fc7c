"""Turns of one guest's queues: of all of them together, so that one with 64 of them gets no more.

Apart as each queue has a task of its own, which knows nothing of the others.
"""

from __future__ import annotations

import trio

TURN = 0.002
"""Seconds for which one guest's requests are served before other guests and events get their turn.
A request is not interrupted; the longest have 1 MiB of data (MAX_WRITE), some 0.3 ms from the page
cache."""


class Turns:
    """Of one guest. ``left`` are the seconds that its turn has still."""

    def __init__(self) -> None:
        self.left = TURN
        self._number = 0

    async def others(self) -> None:
        """The turn may be over: everybody else has one, and then the guest another. Queues that
        wait here at the same time share that.
        """
        number = self._number
        await trio.lowlevel.checkpoint()
        if number == self._number:
            self._number += 1
            self.left = TURN
