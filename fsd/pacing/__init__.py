"""How the one thread spends its time: long work in parts, waits, rates, and
guarded steps."""
