"""The programs that run in a guest: the agent and the fsd-guest commands. Standard library only."""
