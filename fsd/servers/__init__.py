"""The servers of a mount and of virtual machines, from start to end."""
