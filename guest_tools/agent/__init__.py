"""The agent: publishes what a mount's programs watch, and replays the host's events there."""
