"""Turns of one guest's queues together, so that a guest with 64 queues gets no more than others.

Apart because each queue has a task of its own, which does not know the others.
"""

from __future__ import annotations

import trio

TURN = 0.002
"""Seconds for which one guest's requests are served before other guests and events get their turn.
A request is not interrupted; the longest have 1 MiB of data (MAX_WRITE), about 0.3 ms from the page
cache."""


class Turns:
    """The turns of one guest. ``left``: the remaining seconds of its turn."""

    def __init__(self) -> None:
        self.left = TURN
        self._number = 0

    async def others(self) -> None:
        """If the turn is over, let all others have one, then begin another. Queues that wait here
        at the same time share it.
        """
        number = self._number
        await trio.lowlevel.checkpoint()
        if number == self._number:
            self._number += 1
            self.left = TURN
