"""Releases what a disconnected guest has left, a part at a time: a million nodes or thousands of
open files take seconds, for which other guests would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from ..pacing.guard import Guard

AT_ONCE = 2000
"""Steps that are done at once, about 20 ms: all that most guests have."""
AT_A_TIME = 300
"""Steps between which others get their turn, about 3 ms."""


def give_back(
    steps: Iterator[Callable[[], None]],
    soon: Callable[[Callable[[], None]], None],
    then: Callable[[], None],
    count: int = AT_ONCE,
) -> None:
    """Take the steps, and call ``then`` at their end: now, or later through ``soon``. If one fails,
    the others are still taken.
    """
    done = 0
    for step in islice(steps, count):
        with Guard("giving back"):
            step()
        done += 1
    if done < count:
        then()
    else:
        soon(lambda: give_back(steps, soon, then, AT_A_TIME))
