"""How the one thread spends its time: guarded steps, long work in parts, slow calls in threads."""
