"""What runs in a guest: agent, mark reader, replayer, commands. Standard library and protocol only."""
