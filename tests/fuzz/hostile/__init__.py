"""A fuzzer that lasts: hostile guests, a hostile host user and a well-behaved guest on one server.

    python -m tests.fuzz.hostile SECONDS [--seed N] [--bound MILLISECONDS]

`operations`, `channels` and `faults` are the table of what a hostile `guest` does; `host` changes
the share from outside; `neighbour` is the guest that must not notice; `monitor` looks at the
server's process; `__main__` starts them all and judges, `report` says so.
"""
