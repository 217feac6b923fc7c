"""How the single thread spends its time: long work in parts, waits, rates, guarded steps."""
