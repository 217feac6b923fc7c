"""Linux interfaces that Python's library lacks. Knows nothing of shares, guests or events."""
