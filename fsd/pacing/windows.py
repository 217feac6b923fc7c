"""How long, and how far ahead, is looked for what belongs together: every window and wait that
decides what a guest is told. What breaks where one is smaller or larger: docs/decisions/windows.md.

Seconds where not said otherwise. Limits on what may be kept are not here (docs/limits.md).
"""

from __future__ import annotations

# Of one system call

RENAME_WAIT = 0.005
"""That a MOVED_FROM waits for its other half."""
RENAME_WINDOW = 128
"""Events behind a MOVED_FROM after which its other half is no longer expected."""
OWN_WAIT = 0.0002
"""That an object's own event is waited for where the one with the name has come."""
TWIN_WINDOW = 8
"""Events behind one with a name among which the others of the same system call stand."""

# Of one file that is open

SETTLE = 0.00003
"""Given to a program that has just opened a file, to close it."""
CLOSE_WAIT = 0.002
"""That an OPEN waits for its CLOSE."""
OPEN_WAIT = 0.05
"""That an OPEN waits for a read or write; then for /proc; as long again for a CLOSE on its way."""
OPENERS_WAIT = 1.0
"""That an OPEN waits for what /proc says of it."""
OPENERS_POLL = 0.005
"""From one look at that to the next."""
OPEN_AHEAD = 8192
"""Events among which an OPEN's CLOSE is looked for."""
PLAN_AHEAD = 1024
"""Events that a replaying guest holds before it plans, while more are coming."""

# Of what a guest, or the kernel, has just looked at

KEEP = 3.0
"""That a directory stays watched that a guest has looked up, for the mark that may come."""
HOLD = 0.25
"""That events wait behind those of a directory that may have a new mark, for the agent's answer."""
WARM = 1.0
"""That the kernel is taken to keep the dentries of a directory that was just used."""
