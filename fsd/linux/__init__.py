"""What Python's library lacks of Linux. Knows nothing of shares, guests or events."""
