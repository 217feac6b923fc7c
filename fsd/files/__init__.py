"""Which host object a nodeid stands for, and the operations on it. Knows nothing of events."""
