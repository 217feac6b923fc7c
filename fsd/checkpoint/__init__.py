"""Checkpoints of a server: the state is taken, written, verified and restored."""
