"""The agent: publishes what a mount's programs watch, and repeats the host's events there."""
