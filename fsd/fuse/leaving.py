"""What a guest that has gone has left, given back a part at a time: a million nodes or thousands of
open files take seconds, for which other guests would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from ..pacing.guard import Guard

AT_ONCE = 2000
"""Steps that are done at once, some 20 ms: all that most guests have."""
AT_A_TIME = 300
"""Steps between which others have their turn, some 3 ms."""


def give_back(
    steps: Iterator[Callable[[], None]],
    soon: Callable[[Callable[[], None]], None],
    then: Callable[[], None],
    count: int = AT_ONCE,
) -> None:
    """Take the steps, and call ``then`` at their end: now, or later by ``soon``. One that fails is
    lost, and the others are not.
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
