"""Every window and wait of the search for related events, which decides what a guest gets. The
effect of smaller and larger values: docs/decisions/windows.md.

Seconds unless stated otherwise. Limits on memory are not here (docs/limits.md).
"""

from __future__ import annotations

# Of one system call

RENAME_WAIT = 0.005
"""How long a MOVED_FROM waits for its other half."""
RENAME_WINDOW = 1024
"""Events behind a MOVED_FROM after which its other half is no longer expected."""
SELF_WAIT = 0.0002
"""How long to wait for a self event when the event with the name has come."""
WAY_BACK_WAIT = 0.01
"""How long to wait for the second rename of an exchange that the file system shows already."""
CALL_WINDOW = 8
"""Events behind one with a name among which to look for others of the same system call."""

# Of one file that is open

SETTLE = 0.00003
"""Time for a program that has just opened a file to close it."""
CLOSE_WAIT = 0.002
"""How long an OPEN waits for its CLOSE."""
OPEN_WAIT = 0.05
"""How long an OPEN waits for a read or write; then for /proc; as long again for a CLOSE on its
way."""
OPENERS_WAIT = 1.0
"""How long an OPEN waits for the result from /proc."""
OPENERS_POLL = 0.005
"""Time between two checks for it."""
OPEN_AHEAD = 8192
"""Events among which to look for an OPEN's CLOSE."""
PLAN_AHEAD = 1024
"""Events that a mount guest collects before it plans, while more are coming."""

# Directories that a guest, or the kernel, has just looked at

KEEP = 3.0
"""How long to watch a directory that a guest has looked up, for a mark that may come."""
KEEP_RENEWALS = 9
"""How often KEEP starts again if the agent has not answered yet."""
HOLD = 0.25
"""How long events wait behind those of a directory that may have a new mark, for the agent's
answer."""
WARM = 1.0
"""How long the kernel is assumed to keep the dentries of a directory that was just used."""
UNMARKED = 0.008
"""How long after a look-up a program is known to have set no mark yet, if the agent has looked and
seen none."""
