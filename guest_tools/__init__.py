"""What runs in a guest: agent, mark reader, replayer, commands; on the standard library alone."""
